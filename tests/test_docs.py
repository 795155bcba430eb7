"""The pages of docs/ tell the truth: their code runs, their commands parse, and what they name exists."""

import contextlib
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from timm_npu_irv2 import UserError
from timm_npu_irv2.cli.command_lines import COMMAND_LINES
from timm_npu_irv2.cli.main import COMMANDS
from timm_npu_irv2.training.options import parse_args

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / 'train_scripts'
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*(ROOT / 'docs').rglob('*.md'), *ROOT.glob('README*.md')])
TRANSLATED = sorted(path.relative_to(ROOT / 'docs/zh').as_posix() for path in (ROOT / 'docs/zh').glob('*.md'))
LAUNCHERS = {'dist_train_npu.sh': 1, 'measure_npu.sh': 0, 'train_full_1p.sh': 0, 'train_full_8p.sh': 0,
             'train_performance_1p.sh': 0, 'train_performance_8p.sh': 0}  # words before the options of train.py
# The parameters of Ascend ModelZoo's script, with a value each.
ZOO = ('--data=.', '--addr=10.0.0.1', '--arch=inceptionresnetv2', '--workers=4', '--epoch=1', '--epochs=1',
       '--batch-size=8', '--lr=0.1', '--learning-rate=0.1', '--momentum=0.9', '--mom=0.9', '--weight_decay=1e-4',
       '--weight-decay=1e-4', '--amp', '--loss-scale=128', '--opt-level=O2', '--multiprocessing-distributed',
       '--device-list=0', '--seed=49', '--print-freq=10', '--label-smoothing=0.1', '--dist-url=tcp://10.0.0.1:29500',
       '--dist-backend=gloo', '--world-size=2', '--rank=0', '--device=cpu')


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding='utf-8')


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf'```{language}\n(.*?)```', text_of(page), flags=re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Return (page, command line) of every line of shell, each line once."""
    found: dict[str, str] = {}
    for page in PAGES:
        for block in code_blocks(page, 'bash'):
            for line in block.replace('\\\n', ' ').splitlines():
                found.setdefault(line.strip(), page)
    return [(page, line) for line, page in found.items() if line]


def script_and_options(words: list[str]) -> tuple[str, list[str]] | None:
    """Return the file in train_scripts/, or the module, that a command line runs and its options; None for others."""
    while words and re.match(r'[A-Z_]+=', words[0]):
        words = words[1:]
    if words[:1] == ['timm-npu-irv2']:
        command = COMMANDS[words[1]]
        return command.target, [*command.arguments, *words[2:]]
    if words[:2] == ['python', '-m']:
        return words[2], words[3:]
    for index, word in enumerate(words[:10] if words[:1] and words[0] in ('python', 'bash', 'torchrun') else ()):
        if word.startswith('train_scripts/'):
            return word.removeprefix('train_scripts/'), words[index + 1:]
    return None


def parse(script: str, options: list[str]) -> None:
    """Parse options as the script does; SystemExit is argparse's answer to --help and to what is wrong."""
    if script in ('train.py', *LAUNCHERS):
        parse_args(options[LAUNCHERS.get(script, 0):])
    elif script == 'quickstart.sh':
        assert not options
    elif script == 'timm_npu_irv2.cli.doctor':
        assert set(options) <= {'--json'}
    else:
        script = {'train_eval_8p.sh': 'validate.py'}.get(script, script)
        module = importlib.import_module(script.removesuffix('.py')) if script.endswith('.py') else None
        (module.parse if hasattr(module, 'parse') else COMMAND_LINES[script].parse)(options)


@pytest.fixture
def placeholders(tmp_path, monkeypatch):
    """A working folder with the files that the pages' commands name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'train_scripts').symlink_to(SCRIPTS)
    for run in ('run', 'first', 'short', 'cifar'):
        folder = tmp_path / 'output/train' / run
        folder.mkdir(parents=True)
        (folder / 'args.yaml').write_text('data_dir: flowers\nnum_classes: 5\nimg_size: 224\n')
        (folder / 'model_best.pth.tar').touch()
    for name in ('model.onnx', 'zoo_best.pth.tar', 'weights.pth'):
        (tmp_path / name).touch()


@pytest.mark.parametrize('page, line', commands())
@pytest.mark.usefixtures('placeholders')
def test_every_command_parses(page, line):
    words = shlex.split(line.split(' -- ')[-1] if ' -- ' in line else line, comments=True)
    found = script_and_options(words)
    if found is not None:
        with contextlib.suppress(SystemExit) if '--help' in words else contextlib.nullcontext():
            parse(*found)


def test_commands_are_recognised_and_wrong_ones_refused():
    assert len([line for _, line in commands() if script_and_options(shlex.split(line, comments=True))]) > 50
    with pytest.raises(UserError, match='--epoch-count'):
        parse('train.py', ['--data-dir', 'x', '--epoch-count', '3'])


@pytest.mark.parametrize('page', PAGES)
def test_every_file_that_is_named_exists(page):
    for path in re.findall(r'(?:train_scripts|tests|recipes|timm_npu_irv2)/[\w./-]*\w', text_of(page)):
        assert (ROOT / path).exists() or (SCRIPTS / path).exists(), f'{page}: {path}'


@pytest.mark.parametrize('block', dict.fromkeys(block for page in PAGES for block in code_blocks(page, 'python')))
def test_the_python_code_runs(block):
    done = subprocess.run([sys.executable, '-c', block], capture_output=True, text=True, check=False, cwd='/',
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('page', PAGES)
def test_options_in_the_text_exist(page):
    known = option_names()
    for span in re.findall(r'(?<!`)`([^`\n]+)`(?!`)', text_of(page)):
        for option in re.findall(r'(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]', span):
            names = {option.replace('_', '-'), option.replace('--no-', '--')}  # a three-state switch has both forms
            assert names & known, f'{page}: {option}'


def option_names() -> set[str]:
    """Return the options of all scripts, and those of torchrun, docker and the example --name."""
    sources = [*SCRIPTS.glob('*.py'), *(ROOT / 'timm_npu_irv2').rglob('*.py'), *(ROOT / 'tests/ascend').glob('*.py')]
    names = {name for path in sources for name in re.findall(r'--[a-z][a-z0-9-]+', path.read_text(encoding='utf-8'))}
    return names | {'--shm-size', '--nproc-per-node', '--name'}


@pytest.mark.parametrize('page', TRANSLATED)
@pytest.mark.parametrize('language', ['bash', 'python', 'text'])
def test_a_translation_has_the_code_of_the_original(page, language):
    assert code_blocks(f'docs/zh/{page}', language) == code_blocks(f'docs/{page}', language)


def test_the_readmes_have_the_same_code():
    for language in ('bash', 'python'):
        assert code_blocks('README.md', language) == code_blocks('README.zh.md', language)


def test_pictures_are_small_and_used():
    pages = ''.join(map(text_of, PAGES))
    pictures = sorted((ROOT / 'docs/images').iterdir())
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < 150_000, picture.name
        assert f'images/{picture.name}' in pages, picture.name


@pytest.mark.parametrize('parameter', ZOO)
def test_the_parameters_of_the_model_zoo_are_explained_and_work(parameter):
    assert f'`{parameter.split("=")[0]}`' in text_of('docs/model_zoo.md')
    needed = {'--device-list=0': ['--multiprocessing-distributed'], '--loss-scale=128': ['--amp']}
    parse_args(['.', parameter, *needed.get(parameter, [])])


def test_the_table_of_versions_is_that_of_doctor():
    facts = json.loads((ROOT / 'timm_npu_irv2/ascend.json').read_text())['compatibility']['torch_for_cann']
    rows = dict(re.findall(r'^\| (\d\S+) \| ([\d., ]+) \|$', text_of('docs/versions.md'), flags=re.MULTILINE))
    assert {cann: versions.split(', ') for cann, versions in rows.items()} == facts


def test_messages_in_troubleshooting_are_those_of_the_code():
    source = ' '.join(re.sub(r"'\s*\n\s*f?'", '', path.read_text(encoding='utf-8'))
                      for path in [*(ROOT / 'timm_npu_irv2').rglob('*.py'), *SCRIPTS.glob('*.py')])
    headings = re.findall(r'^### `([^`]+)`$', text_of('docs/troubleshooting.md'), flags=re.MULTILINE)
    of_torch_npu = ('do not support internal format', 'fall back to run on the CPU')
    ours = [heading for heading in headings if heading not in of_torch_npu]
    assert len(ours) > 5
    for heading in ours:
        for part in re.split(r'\d+|…|\bnpu\b', heading):
            assert part.strip() in source, heading

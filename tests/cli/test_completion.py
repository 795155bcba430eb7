"""Completion of the console command, as argcomplete's shell function asks for it."""

import os
import subprocess
import sys

import pytest

pytest.importorskip('argcomplete')


def completions(folder, line: str) -> list[str]:
    out = folder / 'completions'
    subprocess.run(
        [sys.executable, '-m', 'timm_npu_irv2'], check=True, env={
            **os.environ, '_ARGCOMPLETE': '1', '_ARGCOMPLETE_IFS': '\n', '_ARGCOMPLETE_STDOUT_FILENAME': str(out),
            'COMP_LINE': line, 'COMP_POINT': str(len(line))})
    return [word.strip() for word in out.read_text().split('\n')]


@pytest.mark.parametrize('line, expected', [
    ('timm-npu-irv2 tr', ['train']),
    ('timm-npu-irv2 train --warmup', ['--warmup-epochs', '--warmup-lr', '--warmup-prefix']),
    ('timm-npu-irv2 launch 8 --resum', ['--resume']),
    ('timm-npu-irv2 validate --results-format ', ['csv', 'json']),
    ('timm-npu-irv2 infer --output-type l', ['logit']),
    ('timm-npu-irv2 export-onnx --soc', ['--soc-version']),
    ('timm-npu-irv2 quantize --met', ['--method']),
    ('timm-npu-irv2 hub pu', ['pull', 'push']),
    ('timm-npu-irv2 hub export a b --dty', ['--dtype']),
    ('timm-npu-irv2 weights a b --to t', ['timm']),
    ('timm-npu-irv2 benchmark infer --lat', ['--latencies']),
    ('timm-npu-irv2 tune --tas', ['--task']),
    ('timm-npu-irv2 shards a b --see', ['--seed']),
])
def test_commands_options_and_choices_are_completed(tmp_path, line, expected):
    assert sorted(completions(tmp_path, line)) == expected

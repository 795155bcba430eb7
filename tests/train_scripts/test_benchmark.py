"""benchmark.py counts right, writes what it prints, and refuses nonsense in a line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from timm_npu_irv2.benchmarks import report
from timm_npu_irv2.benchmarks.counting import cost_of

SCRIPT = Path(__file__).parents[2] / 'train_scripts' / 'benchmark.py'


def benchmark(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_calls_and_bytes_of_a_known_piece_of_work():
    x, row = torch.ones(10, 10), torch.ones(10).expand(10, 10)
    cost = cost_of(lambda: x.view(100).view(10, 10).add(row).mul_(2))
    assert cost.calls == {'add': 1, 'mul_': 1}
    assert cost.bytes == 4 * (100 + 10 + 100 + 100 + 100)  # what is expanded counts once


def test_step_tells_the_cost_of_an_image_from_that_of_a_step(tmp_path):
    result = benchmark('step', '--device', 'cpu', '--img-size', 75, '--float32', '--batch-sizes', 2, 4, '--recompute',
                       '--json', tmp_path / 'step.json', '--chart', tmp_path / 'step.png')
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / 'step.json').read_text())['rows']
    ours, theirs, recomputing = (dict(zip(('calls', 'image', 'step'), row, strict=False)) for row in rows.values())
    assert ours['calls'] < 0.75 * theirs['calls'] and ours['image'] < 0.8 * theirs['image']
    # Again: norms, activations, concatenations and pools, the scales of 39 activations, and 41 copies of slices.
    assert recomputing['calls'] == ours['calls'] + 135 + 135 + 47 + 39 + 41
    assert ours['step'] == pytest.approx(theirs['step'], rel=0.02)  # the same weights
    assert (tmp_path / 'step.png').stat().st_size > 10_000
    assert all(name in result.stdout for name in rows)


def test_train_and_ops_print_a_ratio_with_its_spread(tmp_path):
    small = ('--device', 'cpu', '--img-size', 75, '--batch-size', 2, '--rounds', 1, '--json', tmp_path / 'out.json')
    result = benchmark('train', *small, '--steps', 1, '--warmup', 0)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / 'out.json').read_text())
    assert f"ratio {found['ratio']:.3f} (from" in result.stdout
    rates = found['rounds']
    ours, theirs = rates['inception_resnet_v2_npu'][0], rates['inception_resnet_v2 (timm)'][0]
    assert found['ratio'] == pytest.approx(ours / theirs)
    result = benchmark('ops', *small)
    assert result.returncode == 0, result.stderr
    assert len(json.loads((tmp_path / 'out.json').read_text())['rows']) == 13


@pytest.mark.parametrize('arguments, words', [
    (['train', '--img-size', '74'], '--img-size 74: must be at least 75'),
    (['train', '--batch-size', '0'], '--batch-size 0: must be at least 1'),
    (['step', '--device', 'tpu'], 'no such device'),
    (['step', '--zoo'], 'needs apex, which is not on PyPI'),
    (['step', '--zoo', '--float32'], 'leave --float32 out'),
    (['fly'], "unknown command 'fly'"),
    (['step', '--json', 'no/folder/step.json'], '--json: cannot write no/folder/step.json: there is no folder'),
    (['step', '--chart', 'no/folder/step.png'], '--chart: cannot write no/folder/step.png: there is no folder'),
])
def test_nonsense_is_refused_in_a_line(arguments, words):
    result = benchmark(*arguments)
    assert result.returncode == 2
    assert words in result.stderr.splitlines()[-1]
    assert 'Traceback' not in result.stderr


def test_a_table_has_a_dash_for_what_is_not_known(capsys):
    report.print_table('Title', ('a', 'b'), {'first': [1.5, None], 'second one': [1234.5, 3]})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == 'Title' and lines[3].split() == ['first', '1.500', '–']
    assert lines[4].split() == ['second', 'one', '1234.5', '3']


def test_reports_become_rows_of_the_readmes_table(tmp_path):
    report = {'world_size': 8, 'device': {'type': 'npu', 'name': 'Ascend910B3'}, 'top1': 79.141,
              'images_per_second': 2603.06, 'epochs': 2, 'precision': 'O2', 'loss': 1.0}
    (tmp_path / 'report.json').write_text(json.dumps(report))
    result = benchmark('table', tmp_path / 'report.json')
    assert result.stdout == '| this package, 8 × npu | 79.14 | 2603.1 | 2 | O2 |\n'
    (tmp_path / 'report.json').write_text(json.dumps({**report, 'top1': None, 'precision': 'a|b\x1b'}))
    result = benchmark('table', tmp_path / 'report.json')  # of a run without validation
    assert result.stdout == '| this package, 8 × npu | – | 2603.1 | 2 | a\\|b\\\\x1b |\n'
    for content in '{}', json.dumps({**report, 'images_per_second': 'x'}), '[' * 100_000:
        (tmp_path / 'report.json').write_text(content)
        result = benchmark('table', tmp_path / 'report.json')
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1) and 'report.json' in result.stderr


def test_measuring_an_npu_without_data_is_refused_in_a_line():
    result = subprocess.run(['bash', SCRIPT.with_name('measure_npu.sh')], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and 'usage: measure_npu.sh --data_path=DIR' in result.stderr


def test_input_has_a_row_for_each_loader(tmp_path):
    for index in range(3):
        Image.effect_noise((90, 80), 50).convert('RGB').save(tmp_path / f'{index}.jpg')
    small = ('--img-size', 75, '--batch-size', 2, '--images', 4, '--rounds', 1)
    result = benchmark('input', *small, '--data-dir', tmp_path, '--json', tmp_path / 'out.json')
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / 'out.json').read_text())
    assert {'timm', 'pillow', 'fast'} <= found['rows'].keys()
    assert all(len(row) == len(found['columns']) and min(row) > 0 for row in found['rows'].values())
    assert found['rows']['timm'][5] == 1 and found['rows']['fast'][5] != 1


def test_input_needs_images(tmp_path):
    for words in ['input'], ['input', '--data-dir', tmp_path]:
        result = benchmark(*words)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr

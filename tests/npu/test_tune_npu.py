"""`benchmark.py tune` on an NPU: it runs from end to end, names what fails, and its result is for exactly this chip."""

import json
import sys
from pathlib import Path

from ..ascend.environment import only_here

only_here()

BENCHMARK = str(Path(__file__).parents[2] / 'train_scripts' / 'benchmark.py')


def test_tune_measures_what_runs_and_names_what_fails(start_on_standin, tmp_path):
    words = ('--device', 'npu', '--img-size', '75', '-b', '2')
    process = start_on_standin(
        sys.executable, BENCHMARK, 'tune', *words, '--rounds', '1', '--budget', '6000', '--opt-level', 'O2', '--only',
        'lazy_fusion', 'residual', '--output', 'result.json')
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    report = json.loads((tmp_path / 'result.json').read_text())
    rows = {row['name']: row for row in report['measured']}
    assert report['workload']['name'] == 'Ascend910B3' and report['workload']['precision'] == 'O2 float16'
    # The stand-in has none of the kernels that lazy fusion makes.
    assert rows['lazy_fusion=on']['result'] == 'failed: RuntimeError: stoi'
    assert rows['residual=addition']['result'] in ('taken', 'not faster') and rows['residual=addition']['error'] < 0.1
    assert 'lazy_fusion=on' in output

    path = tmp_path / 'result.json'
    path.write_text(json.dumps({**report, 'chosen': {'lazy_fusion': True, 'residual': 'addition'}}))
    ops = (sys.executable, BENCHMARK, 'ops', *words, '--amp', '--rounds', '1', '--tuned', str(path))
    output, errors = start_on_standin(*ops).communicate()
    assert 'Tuned settings: lazy_fusion=True, residual=addition (from ' in output, errors
    assert 'Start with TORCH_NPU_LAZY_FUSION=True for all of them: torch_npu reads that when it is loaded.' in output
    process = start_on_standin(*ops, chip='Ascend910B2')
    _, errors = process.communicate()
    assert process.returncode == 2 and 'device Ascend910B3, not Ascend910B2' in errors.splitlines()[-1]


def test_the_settings_that_exist_on_an_npu_are_named(start_on_standin):
    process = start_on_standin(sys.executable, BENCHMARK, 'tune', '--device', 'npu', '--only', 'engine')
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.splitlines()[-1].endswith(
        'there are pointwise, siblings, lazy_fusion, task_queue, jit_compile, allow_internal_format, allow_hf32, '
        'residual, fused_optimizer, torchcompile, recompute.'), errors

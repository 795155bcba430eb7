"""benchmark.py tune: alternatives are measured and written, wrong and failing ones are named, Ctrl-C loses nothing, and
the other scripts run with the result."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from timm_npu_irv2.benchmarks import tune
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.tuning import Workload, is_complete, load_tuned, save_tuned

from ..pictures import write_pictures

SCRIPTS = Path(__file__).parents[2] / 'train_scripts'
CPU, WORKLOAD = torch.device('cpu'), {'batch_size': 2, 'img_size': 75, 'precision': 'float32'}
SMALL = ['--device', 'cpu', '--img-size', '75', '-b', '2', '--rounds', '1', '--budget', '6000']


def start_in(folder: Path, name: str, *options: str, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, 'TIMM_NPU_IRV2_CACHE': str(folder / 'cache'), **variables}
    return subprocess.Popen(
        [sys.executable, str(SCRIPTS / name), *options], env=environment, cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)


@pytest.fixture
def start(tmp_path):
    return functools.partial(start_in, tmp_path)


@pytest.fixture(scope='module')
def tuned(tmp_path_factory) -> tuple[Path, str]:
    """The file of a result, and what was printed."""
    folder = tmp_path_factory.mktemp('tuned')
    process = start_in(folder, 'benchmark.py', 'tune', *SMALL, '--only', 'pointwise', 'fused_optimizer')
    output, errors = process.communicate(timeout=6000)
    assert process.returncode == 0, errors
    (path,) = (folder / 'cache' / 'tuned').iterdir()
    return path, output


def rows(path: Path) -> dict[str, dict]:
    return {row['name']: row for row in json.loads(path.read_text())['measured']}


def test_what_was_measured_is_written_beside_the_default(tuned):
    path, output = tuned
    assert str(path) in output
    report, found = json.loads(path.read_text()), rows(path)
    assert list(found)[:3] == ['default', 'pointwise=large', 'pointwise=product']
    assert found['default']['error'] < 1e-2
    for name in 'pointwise=product', 'fused_optimizer=on':
        row = found[name]
        assert row['error'] < 1e-2 and len(row['ratio']) == 3 and row['result'] in ('taken', 'not faster')
    taken = {name.partition('=')[0] for name, row in found.items() if row['result'] == 'taken'}
    assert report['chosen'].keys() <= taken
    assert (report['workload']['batch_size'], report['workload']['img_size']) == (2, 75)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_write_what_was_measured_and_end_the_workers(start, tmp_path, number):
    output = tmp_path / 'result.json'
    process = start('benchmark.py', 'tune', *SMALL, '--output', str(output))
    workers = wait_for_workers(process, 1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=6000)
    assert process.returncode == 128 + number and 'Traceback' not in errors, errors
    assert load_tuned(output).report['interrupted'] is True and not is_complete(output)
    stop_at = time.monotonic() + 6000
    while any(map(runs, workers)):
        assert time.monotonic() < stop_at
        time.sleep(0.1)


def test_ctrl_c_during_an_alternative_is_a_row_and_leaves_an_earlier_result(start, tmp_path):
    process = start('benchmark.py', 'tune', *SMALL, '--only', 'pointwise', '--rounds', '9999')
    wait_for_workers(process, 2)  # the default, and the first alternative
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=6000)
    assert process.returncode == 130 and 'Traceback' not in errors, errors
    assert 'interrupted' in output and output.splitlines()[-1].endswith('the default settings; nothing was written')
    assert not (tmp_path / 'cache').exists()


def wait_for_workers(process: subprocess.Popen, count: int) -> set[int]:
    """Wait until a process has started as many workers, and return them."""
    stop_at, seen = time.monotonic() + 6000, set()
    while len(seen) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < stop_at
        time.sleep(0.1)
        seen |= set(_workers(process.pid))
    return seen


def runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return ') Z ' not in Path(f'/proc/{pid}/stat').read_text()
    return False


def _workers(pid: int) -> list[int]:
    """Return the processes that measure; the parent may have other children before and beside them."""
    found = []
    for task in Path(f'/proc/{pid}/task').glob('*/children'):
        for child in task.read_text().split():
            with contextlib.suppress(OSError):
                if 'tune_worker' in Path(f'/proc/{child}/cmdline').read_text():
                    found.append(int(child))
    return found


def test_what_was_measured_is_printed_where_it_cannot_be_written(monkeypatch, capsys, tmp_path):
    """The disk is full after minutes of measuring."""
    class Measured:
        chosen, rows = {'pointwise': 'product'}, [
            {'name': 'pointwise=product', 'images_per_second': 7.0, 'ratio': (0.5, 0.4, 0.6), 'result': 'taken'}]

        def __init__(self, *_, **__):
            (tmp_path / 'out').rmdir()
            (tmp_path / 'out').write_text('')  # a folder no more

        def run(self):
            return 0

        def report(self, interrupted):
            return {'chosen': self.chosen}

    (tmp_path / 'out').mkdir()
    monkeypatch.setattr(tune, 'Tuner', Measured)
    args = Namespace(
        device='cpu', img_size=75, batch_size=2, task='train', amp=False, amp_dtype=None, opt_level=None, rounds=1,
        budget=1, only=['pointwise'], output=str(tmp_path / 'out' / 'result.json'))
    with pytest.raises(UserError, match=r'^cannot write .*out'):
        tune.run(args)
    printed = capsys.readouterr().out
    assert 'pointwise=product' in printed and 'nothing was written' in printed


# A sitecustomize.py for the workers of tune: some variants are broken, some slow by a clock that no load disturbs.
BROKEN = '''
import os, signal, sys, time

if any('tune_worker' in word for word in sys.orig_argv):
    from types import SimpleNamespace

    from timm_npu_irv2 import layers
    from timm_npu_irv2.benchmarks import timing
    from timm_npu_irv2.ops import variants

    clock = SimpleNamespace(now=0.0)
    timing.time = SimpleNamespace(perf_counter=lambda: clock.now, sleep=lambda seconds: None)
    pointwise, convolve, folds = layers.pointwise_convolution, layers.Siblings.convolve, layers._folds_scales

    def mixed_up(x, weight, bias):
        return pointwise(x, weight.flip(0), bias)

    def crash_or_slow(self, x):
        if variants().siblings == 'separate':
            os.kill(os.getpid(), signal.SIGSEGV)
        clock.now += 0.2 if variants().pointwise == 'large' else 0.1
        return convolve(self, x)

    def hang_or_slow():
        if 'HANG' in os.environ and variants().residual == 'addition':
            time.sleep(10 ** 6)
        clock.now += 0.1 if variants().residual == 'folded' else 0.0
        return folds()

    layers.pointwise_convolution, layers.Siblings.convolve = mixed_up, crash_or_slow
    layers._folds_scales = hang_or_slow
'''


def tune_broken(folder: Path, *options: str, **variables: str) -> tuple[dict[str, dict], dict]:
    """Return {variant: its row} of a run with broken variants, and the report."""
    (folder / 'sitecustomize.py').write_text(BROKEN)
    path = os.pathsep.join(filter(None, [str(folder), str(SCRIPTS.parent), os.environ.get('PYTHONPATH')]))
    process = start_in(folder, 'benchmark.py', 'tune', *SMALL, '--output', 'result.json', *options, PYTHONPATH=path,
                       **variables)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    found = rows(folder / 'result.json')
    assert all(name in output and row['result'] in output for name, row in found.items())
    return found, json.loads((folder / 'result.json').read_text())


def test_wrong_crashing_and_slow_variants_are_named_and_a_fast_one_is_taken(tmp_path):
    found, report = tune_broken(tmp_path, '--only', 'pointwise', 'siblings', 'residual')
    assert found['pointwise=large']['result'] == 'not faster'
    assert found['pointwise=product']['result'].startswith('wrong: an error of ')
    assert found['siblings=separate']['result'] == 'failed: it was ended by SIGSEGV'
    assert found['residual=addition']['result'] == 'taken' and found['choice, of the default']['result'] == 'verified'
    assert report['chosen'] == {'residual': 'addition'} and report['of_default_time']['median'] < 1


@pytest.mark.long
def test_a_variant_that_hangs_leaves_time_for_the_others(tmp_path):
    found, report = tune_broken(tmp_path, '--only', 'residual', 'fused_optimizer', '--budget', '400', HANG='1')
    assert found['residual=addition']['result'].startswith('failed: it did not answer within ')
    assert found['fused_optimizer=on']['result'] in ('taken', 'not faster')
    assert 'residual' not in report['chosen']


def test_a_group_that_does_not_exist_is_one_line(start):
    process = start('benchmark.py', 'tune', *SMALL, '--only', 'jit_compile')
    _, errors = process.communicate(timeout=6000)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith('benchmark.py: error: --only jit_compile: no such group here; there are ')


def test_the_engine_that_tune_finds_is_what_auto_stands_for(start, tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime')
    process = start('benchmark.py', 'tune', *SMALL, '--task', 'eval', '--only', 'engine')
    _, errors = process.communicate(timeout=6000)
    assert process.returncode == 0, errors
    (path,) = (tmp_path / 'cache' / 'tuned').iterdir()
    monkeypatch.setenv('TIMM_NPU_IRV2_CACHE', str(tmp_path / 'cache'))
    (record,) = (tmp_path / 'cache' / 'engines').iterdir()
    chosen = json.loads(path.read_text())['chosen'].get('engine', 'torch')
    assert json.loads(record.read_text())['engine'] == chosen
    assert 'engine=onnxruntime' in rows(path)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp('pictures'))


def test_train_runs_with_the_result_and_goes_on_with_it(start, tuned, tmp_path, pictures):
    """What tune has written is found and said in a line, and a resumed run keeps its settings without the file."""
    path = tmp_path / 'cache' / 'tuned' / tuned[0].name
    path.parent.mkdir(parents=True)
    chosen = {'residual': 'addition', 'recompute': 'cheap'}  # others may have been faster
    path.write_text(json.dumps({**json.loads(tuned[0].read_text()), 'chosen': chosen}))

    def train(*words: str) -> str:
        process = start(
            'train.py', '--data-dir', str(pictures), '--device', 'cpu', '--img-size', '75', '-b', '2', '-j', '0',
            '--num-classes', '3', '--train-batches-per-epoch', '1', '--val-split', '', '--output', str(tmp_path),
            '--experiment', 'run', *words)
        _, errors = process.communicate(timeout=6000)
        assert process.returncode == 0, errors
        return errors

    log = train('--epochs', '1')
    assert f'Tuned settings: residual=addition, recompute=cheap (from {path}; --tuned off ignores it).' in log
    assert 'recompute: null' in (tmp_path / 'run' / 'args.yaml').read_text()  # the options, as they were given
    path.unlink()
    log = train('--epochs', '2', '--resume', 'auto')
    assert 'Tuned settings: residual=addition, recompute=cheap, as before (from the checkpoint' in log
    assert 'Changed since the checkpoint: --epochs 2 (before: 1), --warmup-epochs 1 (before: 0).' in log


@pytest.mark.parametrize('task, chosen, words', [
    ('train', {'residual': 'addition'}, ['step', '--float32', '--batch-sizes', '2', '3']),
    ('train', {'memory_format': 'contiguous'}, ['ops', '-b', '2', '--rounds', '1']),
    ('eval', {'siblings': 'separate'}, ['infer', '-b', '2', '--rounds', '1', '--latencies', '1', '--only', 'ours']),
])
def test_the_benchmarks_take_a_result(start, tmp_path, task, chosen, words):
    save_tuned(Workload.on(CPU, task=task, **WORKLOAD), {'chosen': chosen}, tmp_path / 'result.json')
    process = start('benchmark.py', *words, '--device', 'cpu', '--img-size', '75', '--tuned', 'result.json')
    output, errors = process.communicate(timeout=6000)
    assert process.returncode == 0, errors
    (name, value), = chosen.items()
    assert f'Tuned settings: {name}={value} (from result.json; --tuned off ignores it).' in output


def test_a_result_for_another_task_is_refused_in_a_line(start, tmp_path):
    save_tuned(Workload.on(CPU, task='eval', **WORKLOAD), {'chosen': {}}, tmp_path / 'result.json')
    process = start('benchmark.py', 'train', '--device', 'cpu', '--img-size', '75', '--tuned', 'result.json')
    _, errors = process.communicate(timeout=6000)
    assert process.returncode == 2
    assert '--tuned result.json: it is for eval on cpu, not for train on cpu.' in errors.splitlines()[-1]

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
from pathlib import Path

import pytest
import torch

from timm_npu_irv2.tuning import Workload, save_tuned

from ..pictures import write_pictures

SCRIPTS = Path(__file__).parents[2] / 'train_scripts'
CPU, WORKLOAD = torch.device('cpu'), {'batch_size': 2, 'img_size': 75, 'precision': 'float32'}
SMALL = ['--device', 'cpu', '--img-size', '75', '-b', '2', '--rounds', '1', '--budget', '6000']


def start_in(folder: Path, name: str, *options: str) -> subprocess.Popen:
    environment = {**os.environ, 'TIMM_NPU_IRV2_CACHE': str(folder / 'cache')}
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


def test_ctrl_c_writes_what_was_measured_and_ends_the_workers(start, tmp_path):
    output = tmp_path / 'result.json'
    process = start('benchmark.py', 'tune', *SMALL, '--output', str(output))
    workers = wait_for_workers(process, 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=6000)
    assert process.returncode == 130 and 'Traceback' not in errors, errors
    assert json.loads(output.read_text())['interrupted'] is True
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

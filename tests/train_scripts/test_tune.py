"""benchmark.py tune: alternatives are measured and written, wrong and failing ones are named, Ctrl-C loses nothing, and
the other scripts run with the result."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / 'train_scripts'
SMALL = ['--device', 'cpu', '--img-size', '75', '-b', '2', '--rounds', '1']


@pytest.fixture
def start(tmp_path):
    def start_script(name: str, *options: str, **variables: str) -> subprocess.Popen:
        environment = {**os.environ, 'TIMM_NPU_IRV2_CACHE': str(tmp_path / 'cache'), **variables}
        return subprocess.Popen(
            [sys.executable, str(SCRIPTS / name), *options], env=environment, cwd=tmp_path, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True)

    return start_script


def rows(path: Path) -> dict[str, dict]:
    return {row['name']: row for row in json.loads(path.read_text())['measured']}


def test_what_was_measured_is_written_beside_the_default(start, tmp_path):
    process = start('benchmark.py', 'tune', *SMALL, '--only', 'pointwise', 'fused_optimizer')
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    (path,) = (tmp_path / 'cache' / 'tuned').iterdir()
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
    stop_at = time.monotonic() + 120
    while not (workers := _children(process.pid)) and time.monotonic() < stop_at:
        time.sleep(0.1)
    assert workers
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in errors, errors
    assert json.loads(output.read_text())['interrupted'] is True
    assert not any(Path(f'/proc/{worker}').exists() for worker in workers)


def test_ctrl_c_during_an_alternative_is_a_row_and_leaves_an_earlier_result(start, tmp_path):
    process = start('benchmark.py', 'tune', *SMALL, '--only', 'pointwise', '--rounds', '9999')
    stop_at, seen = time.monotonic() + 200, set()
    while len(seen) < 2 and time.monotonic() < stop_at:  # the default, and the first alternative
        seen |= set(_children(process.pid))
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in errors, errors
    assert 'interrupted' in output and output.splitlines()[-1].endswith('the default settings; nothing was written')
    assert not (tmp_path / 'cache').exists()


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f'/proc/{pid}/task').glob('*/children'):
        found += map(int, task.read_text().split())
    return found


def test_a_group_that_does_not_exist_is_one_line(start):
    process = start('benchmark.py', 'tune', *SMALL, '--only', 'jit_compile')
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith('benchmark.py: error: --only jit_compile: no such group here; there are ')

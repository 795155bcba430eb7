"""Several machines: network namespaces of this one, on each of which dist_train_npu.sh starts processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.machines import PORT, SCRIPTS, Machines, obstacle
from tests.pictures import write_pictures
from timm_npu_irv2.serialization import read_checkpoint

OBSTACLE = obstacle()
pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)
WITNESS = Path(__file__).parent / 'witness'
# Without BatchNorm the gradient of a batch is the mean of those of its images, however it is divided.
GRADIENT = ('--device cpu --model test_vit --num-classes 3 --epochs 1 --warmup-epochs 0 --opt momentum --momentum 0 '
            '--weight-decay 0 --lr 1 --sched none --workers 0').split()


@pytest.fixture
def images(tmp_path) -> Path:
    return write_pictures(tmp_path / 'images', train=8, val=1)


def options(images: Path, output: Path, *words: str) -> list[str]:
    return ['--data-dir', str(images), '--output', str(output), '--experiment', 'run', *words]


def weights(output: Path) -> dict:
    return read_checkpoint(output / 'run' / 'last.pth.tar')['state_dict']


@pytest.mark.parametrize('count', [2, pytest.param(3, marks=pytest.mark.long)])
def test_machines_have_the_gradients_of_one(images, tmp_path, count):
    """With the same number of processes on one machine each bit is the same.

    Batches that are divided in another way, on one machine too, are summed in another order. In float32 each order is
    1.3e-6 away from the gradient in float64, where the orders differ by 2e-15.
    """
    words, usual = ['--train-batches-per-epoch', '1'], {**os.environ, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1'}
    for name, processes, batch_size in ('same', 2 * count, 2), ('other', 2, 2 * count):
        alone = [*options(images, tmp_path / name, *GRADIENT), '--batch-size', str(batch_size), *words]
        if name == 'same' or count > 2:  # two processes are on one machine in tests/test_distributed.py
            subprocess.run(['bash', SCRIPTS / 'dist_train_npu.sh', str(processes), *alone], check=True,
                           capture_output=True, env=usual)
    with Machines(count) as machines:
        every = [
            machines.start(
                index, [*options(images, tmp_path / f'machine{index}', *GRADIENT), '--batch-size', '2', *words],
                tmp_path / f'{index}.log', NNODES=str(count), NODE_RANK=str(index), MASTER_ADDR=machines.address(0))
            for index in range(count)]
        for index, process in enumerate(every):
            assert process.wait(timeout=12000) == 0, (tmp_path / f'{index}.log').read_text()
    expected, found = weights(tmp_path / 'same'), weights(tmp_path / 'machine0')
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    if count > 2:
        other = weights(tmp_path / 'other')
        # They begin at 0 and the learning rate is 1, so they are the gradients.
        names = [name for name in found if name.endswith('.bias')]
        gradient, theirs = (torch.cat([each[name] for name in names]) for each in (found, other))
        assert 0 < (gradient - theirs).norm() <= 5e-6 * gradient.norm()
    assert not (tmp_path / 'machine1').exists(), 'only machine 0 writes'


# The others are in tests/train_scripts/test_launchers.py, where they need no machines.
@pytest.mark.parametrize(('rank', 'variables', 'message'), [
    ('1', {'MASTER_ADDR': '10.213.0.9'}, 'machine 1 ({}) cannot reach machine 0 at 10.213.0.9:29500'),
    pytest.param('1', {'MASTER_ADDR': 'no-such-host'}, 'machine 1 ({}) cannot reach machine 0 at no-such-host:29500',
                 marks=pytest.mark.long),
    pytest.param('0', {'MASTER_ADDR': '10.213.0.2'}, 'machine 0 ({}) cannot reach machine 0 at 10.213.0.2:29500',
                 marks=pytest.mark.long),
], ids=['wrong address', 'wrong name', "another machine's address"])
def test_machines_that_cannot_meet_are_named_in_one_line(images, tmp_path, rank, variables, message):
    with Machines(2) as machines:
        log = tmp_path / 'log'
        process = machines.start(
            int(rank), options(images, tmp_path / 'out', *GRADIENT), log, NNODES='2', NODE_RANK=rank,
            MEETING_TIMEOUT='3', **variables)
        assert process.wait(timeout=6000) == 2, log.read_text()
    lines = [line for line in log.read_text().splitlines() if line]
    host = subprocess.run(['hostname'], capture_output=True, text=True, check=True).stdout.strip()
    assert len(lines) == 1 and message.format(host) in lines[0], log.read_text()


def wait_until(condition: Callable[[], bool], seconds: float, logs: list[Path]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, '\n'.join(log.read_text() for log in logs)
        time.sleep(0.2)


@pytest.mark.long
def test_a_machine_that_is_cut_off_comes_back_and_the_run_goes_on(images, tmp_path):
    """Machine 0, where all meet, goes on alone from its newest checkpoint, and with both later."""
    interval, samples = 5, tmp_path / 'samples-0'
    words = ('--device cpu --model test_resnet --img-size 32 --num-classes 3 --batch-size 2 --epochs 100 --lr 0.01 '
             f'--epoch-repeats 1000 --recovery-interval {interval} --workers 0 --elastic --resume auto '
             '--warmup-epochs 0 --device-modules sample_log').split()
    path = os.pathsep.join(filter(None, [str(WITNESS), os.environ.get('PYTHONPATH')]))
    variables = {'NNODES': '1:2', 'RDZV_ENDPOINT': f'10.213.0.1:{PORT}', 'COLLECTIVE_TIMEOUT': '10', 'PYTHONPATH': path,
                 'LAST_CALL_TIMEOUT': '5', 'MEETING_TIMEOUT': '300', 'SAMPLE_LOG': str(tmp_path / 'samples')}
    logs = [tmp_path / '0.log', tmp_path / '1.log']

    def starts(what: str) -> int:
        return logs[0].read_text().count(f'px; {what} × cpu')

    def batches() -> list[int]:
        """Return the batches of the first epoch that rank 0 has loaded, in the order in which it did."""
        return [int(line.split()[1]) for line in samples.read_text().splitlines()] if samples.exists() else []

    def progresses(what: str) -> None:
        known = len(batches())
        wait_until(lambda: len(batches()) > known + 4 * interval, 1500, logs)
        assert logs[0].read_text().rpartition('px; ')[2].startswith(f'{what} × cpu')

    with Machines(2) as machines:
        machines.start(0, options(images, tmp_path / 'out', *words), logs[0], **variables)
        machines.start(1, options(images, tmp_path / 'out', *words), logs[1], **variables)
        wait_until(lambda: starts('4') == 1, 1500, logs)
        progresses('4')
        machines.link(1, 'down')
        wait_until(lambda: starts('2') >= 1, 1500, logs)
        progresses('2')
        machines.link(1, 'up')
        wait_until(lambda: starts('4') == 2, 2400, logs)
        progresses('4')
    done = batches()
    restarts = [place for place in range(1, len(done)) if done[place] != done[place - 1] + 1]
    assert len(restarts) == 2
    # An update is a batch of each of four processes, or two batches of each of two; one batch is loaded ahead.
    lost = [done[restarts[0] - 1] + 1 - done[restarts[0]] // 2, (done[restarts[1] - 1] + 1) // 2 - done[restarts[1]]]
    assert all(0 <= each <= interval + 1 for each in lost), lost


HOLDER = """
from tests.machines import Machines
with Machines(1) as machines:
    print(machines.name, flush=True)
    input()
"""


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_no_machine_is_left_behind_by_a_killed_test(number):
    with subprocess.Popen([sys.executable, '-c', HOLDER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as holder:
        name = holder.stdout.readline().strip()
        assert name in namespaces()
        holder.send_signal(number)
        holder.wait(timeout=3000)
    # What a killed one leaves is removed by the next, which may be that of another test.
    assert number == signal.SIGKILL or name not in namespaces()
    with Machines(1):
        assert name not in namespaces() and f'{name}-0' not in namespaces()


def namespaces() -> list[str]:
    listed = subprocess.run(['ip', 'netns', 'list'], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines()]

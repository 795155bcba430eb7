"""Several machines: network namespaces of this one, on each of which dist_train_npu.sh starts processes."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.machines import PORT, SCRIPTS, Machines, obstacle
from timm_npu_irv2.serialization import read_checkpoint

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle())
# Without BatchNorm the gradient of a batch is the mean of those of its images, however it is divided.
GRADIENT = ('--device cpu --model test_vit --num-classes 3 --epochs 1 --warmup-epochs 0 --opt momentum --momentum 0 '
            '--weight-decay 0 --lr 1 --sched none --workers 0').split()


@pytest.fixture
def images(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (('train', 24), ('val', 3)):
        for number in range(count):
            path = tmp_path / 'images' / split / f'class{number % 3}' / f'{number:02}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path / 'images'


def options(images: Path, output: Path, *words: str) -> list[str]:
    return ['--data-dir', str(images), '--output', str(output), '--experiment', 'run', *words]


def weights(output: Path) -> dict:
    return read_checkpoint(output / 'run' / 'last.pth.tar')['state_dict']


def gradients_of_machines(count: int, images: Path, folder: Path) -> None:
    """Compare a step of several machines with one of a single machine."""
    words = ['--train-batches-per-epoch', '1']
    alone = [*options(images, folder / 'alone', *GRADIENT), '--batch-size', str(2 * count), *words]
    usual = {**os.environ, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1'}
    subprocess.run(['bash', SCRIPTS / 'dist_train_npu.sh', '2', *alone], check=True, capture_output=True, env=usual)
    with Machines(count) as machines:
        every = [
            machines.start(
                index, [*options(images, folder / f'machine{index}', *GRADIENT), '--batch-size', '2', *words],
                folder / f'{index}.log', NNODES=str(count), NODE_RANK=str(index), MASTER_ADDR=machines.address(0))
            for index in range(count)]
        for index, process in enumerate(every):
            assert process.wait(timeout=240) == 0, (folder / f'{index}.log').read_text()
    expected, found = weights(folder / 'alone'), weights(folder / 'machine0')
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-6 * value.norm() + 1e-7, name
    assert not (folder / 'machine1').exists(), 'only machine 0 writes'


def test_two_machines_have_the_gradients_of_one(images, tmp_path):
    gradients_of_machines(2, images, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(('rank', 'variables', 'message'), [
    ('1', {'MASTER_ADDR': '10.213.0.9'}, 'machine 1 ({}) cannot reach machine 0 at 10.213.0.9:29500'),
    ('1', {'MASTER_ADDR': 'no-such-host'}, 'machine 1 ({}) cannot reach machine 0 at no-such-host:29500'),
    ('1', {'MASTER_ADDR': '10.213.0.1'}, 'machine 1 ({}) cannot reach machine 0 at 10.213.0.1:29500'),
    ('0', {'MASTER_ADDR': '10.213.0.1'}, 'machine 1 of 2 did not come to 10.213.0.1:29500 within 3 s'),
    ('0', {'MASTER_ADDR': '10.213.0.2'}, 'machine 0 ({}) cannot reach machine 0 at 10.213.0.2:29500'),
], ids=['wrong address', 'wrong name', 'closed port', 'missing machine', "another machine's address"])
def test_machines_that_cannot_meet_are_named_in_one_line(images, tmp_path, rank, variables, message):
    with Machines(2) as machines:
        log = tmp_path / 'log'
        process = machines.start(
            int(rank), options(images, tmp_path / 'out', *GRADIENT), log, NNODES='2', NODE_RANK=rank,
            MEETING_TIMEOUT='3', **variables)
        assert process.wait(timeout=120) == 2, log.read_text()
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
    words = ('--device cpu --model test_resnet --img-size 32 --num-classes 3 --batch-size 2 --epochs 100000 '
             '--lr 0.01 --recovery-interval 2 --workers 0 --elastic --resume auto --warmup-epochs 0').split()
    variables = {'NNODES': '1:2', 'RDZV_ENDPOINT': f'10.213.0.1:{PORT}', 'COLLECTIVE_TIMEOUT': '10',
                 'LAST_CALL_TIMEOUT': '5', 'MEETING_TIMEOUT': '300'}
    logs = [tmp_path / '0.log', tmp_path / '1.log']

    def starts(what: str) -> int:
        return logs[0].read_text().count(f'px; {what} × cpu')

    with Machines(2) as machines:
        machines.start(0, options(images, tmp_path / 'out', *words), logs[0], **variables)
        machines.start(1, options(images, tmp_path / 'out', *words), logs[1], **variables)
        wait_until(lambda: starts('4') == 1, 150, logs)
        time.sleep(5)
        machines.link(1, 'down')
        wait_until(lambda: starts('2') >= 1, 150, logs)
        machines.link(1, 'up')
        wait_until(lambda: starts('4') == 2, 240, logs)

"""train.py in several processes over HCCL, and where something is missing: memory, devices, a peer."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ..ascend.environment import only_here

only_here()

from timm_npu_irv2.serialization import read_checkpoint  # noqa: E402

from ..ascend.pieces import error, vector  # noqa: E402
from ..pictures import write_pictures  # noqa: E402

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / 'train_scripts'
COMMON = "--num-classes 3 -j 0 --lr 0.01 --warmup-epochs 0 --opt npufusedsgd --epochs 1 --val-split '' --output ."
OURS = f'{COMMON} --img-size 75 --device-modules rank_weights'
SMALL = f'{COMMON} --model test_resnet --img-size 64'
SECONDS = 560


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp('pictures'), train=20, val=1)


@pytest.fixture
def start(start_on_standin, pictures) -> Callable:
    """start(command, options, variables, switches…): a script with the options of train.py."""

    def start_script(command: list[str], options: str, variables: dict[str, str] | None = None, **switches):
        paths = os.pathsep.join([str(HERE.parent / 'witness'), os.environ['PYTHONPATH']])
        own = {'PYTHON': sys.executable, 'PYTHONPATH': paths, **(variables or {})}
        words = [word.strip("'") for word in options.split()]
        return start_on_standin(*command, '--data-dir', str(pictures), *words, variables=own, **switches)

    return start_script


@pytest.fixture
def run(start) -> Callable:
    """run(number of processes, options): (exit code, stderr) of dist_train_npu.sh."""

    def run_launcher(processes: int, options: str, **switches) -> tuple[int, str]:
        process = start(['bash', str(SCRIPTS / 'dist_train_npu.sh'), str(processes)], options, **switches)
        _, errors = process.communicate(timeout=SECONDS)
        return process.returncode, errors

    return run_launcher


def differing(folder: Path, ranks: int) -> list[str]:
    """The weights and buffers that are not the same bits in every process."""
    first, *others = (json.loads((folder / f'rank-{rank}.json').read_text()) for rank in range(ranks))
    return [name for name, digest in first.items() if any(other[name] != digest for other in others)]


def weights(folder: Path):
    return vector(read_checkpoint(folder / 'last.pth.tar')['state_dict'].values())


def test_two_processes_with_synchronised_batch_norm_are_one_with_the_joint_batch(run, tmp_path):
    # Only synchronised statistics make it the same computation.
    # A step only, on more than a pixel: rounding grows tenfold in each step, and BatchNorm over few values starts it.
    options = f'{OURS} --img-size 107 --train-batches-per-epoch 1 --no-aug --lr 0.001'
    for processes, batch_size in (2, 4), (1, 8):
        code, errors = run(processes, f'{options} -b {batch_size} --sync-bn --experiment {processes}')
        assert code == 0, errors
        if processes == 2:
            assert differing(tmp_path, 2) == []
            assert 'fall back to run on the CPU' not in errors
    apart = error(weights(tmp_path / '2'), weights(tmp_path / '1'))
    assert apart < 1e-4


def test_eight_processes_end_with_the_same_bits(run, tmp_path):
    code, errors = run(8, f'{OURS} -b 2 --train-batches-per-epoch 2 --experiment run', devices=8)
    assert code == 0, errors
    assert differing(tmp_path, 8) == []
    assert json.loads((tmp_path / 'run' / 'report.json').read_text())['world_size'] == 8


def test_more_processes_than_devices_are_one_line(run):
    code, errors = run(3, SMALL, devices=2)
    assert code == 2
    lines = [line for line in errors.splitlines() if 'error' in line.lower()]
    assert lines == ['dist_train_npu.sh: error: npu:2 does not exist: this process sees 2 npu device(s). Start at most '
                     '2 processes here, or check ASCEND_RT_VISIBLE_DEVICES.']


def test_exhausted_memory_names_a_batch_size_that_fits(start):
    command = [sys.executable, str(SCRIPTS / 'train.py')]
    options = f'{COMMON} --model test_resnet --img-size 160 --train-batches-per-epoch 1'
    process = start(command, f'{options} -b 48', memory=96 << 20)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 2, errors
    advice = 'npu:0: out of memory with --batch-size 48. Try --batch-size 24 --grad-accum-steps 2'
    assert f'train.py: error: {advice}' in errors
    assert 'Traceback' not in errors


def test_a_job_whose_peer_dies_ends_with_an_error_within_the_time_out(start, free_port):
    # As on two machines: no launcher sees both processes.
    job = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port), 'WORLD_SIZE': '2', 'HCCL_EXEC_TIMEOUT': '20'}
    options = f'{SMALL} -b 2 --epochs 50 --log-interval 1 --experiment run'
    first, second = (
        start([sys.executable, '-u', str(SCRIPTS / 'train.py')], options, {**job, 'RANK': rank, 'LOCAL_RANK': rank})
        for rank in '01')
    seen = ''
    while not re.search(r'Train 0 \[ *2/', seen):
        seen += (line := first.stderr.readline())
        assert line, seen
    second.kill()
    _, errors = first.communicate(timeout=SECONDS)  # HCCL's own time-out would be half an hour
    assert first.returncode not in (0, None)
    assert 'error' in errors.lower() or 'ascend stand-in: HCCL' in errors

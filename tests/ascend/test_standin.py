"""The stand-in for CANN: torch_npu computes on it what the CPU computes, and nothing goes wrong in silence.

Each test runs a function of pieces.py in a process of its own, whose environment must be set before it starts.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .build import build
from .environment import environment

PIECES = Path(__file__).with_name('pieces.py')
SECONDS = 170

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec('torch_npu') is None, reason='torch_npu is not installed'),
    pytest.mark.skipif(torch.version.cuda is not None,
                       reason='torch is a CUDA build: it cannot be loaded beside torch_npu'),
]


@pytest.fixture(scope='session')
def libraries(request) -> Path:
    """The stand-in, built once for these sources and this torch_npu."""
    return build(request.config.cache.mkdir('ascend_standin') / 'libraries')


@pytest.fixture
def start(libraries, tmp_path):
    """start(piece, switches…) starts a process, which ends with the test at the latest."""
    started = []

    def start_piece(name: str, variables: dict[str, str] | None = None, **switches) -> subprocess.Popen:
        base = {**os.environ, 'OMP_NUM_THREADS': '1', **(variables or {})}
        process = subprocess.Popen([sys.executable, PIECES, name], env=environment(libraries, base=base, **switches),
                                   cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start_piece
    for process in started:
        process.kill()
        process.communicate()


def result_of(process: subprocess.Popen) -> SimpleNamespace:
    """The value that a piece returned, and its standard error."""
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    return SimpleNamespace(value=json.loads(output.splitlines()[-1]), errors=errors)


def value_of(process: subprocess.Popen) -> Any:
    return result_of(process).value


def refusal_of(process: subprocess.Popen) -> str:
    """The line with which the stand-in ended a process."""
    errors = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == -signal.SIGABRT, errors
    return next(line for line in errors.splitlines() if line.startswith('ascend stand-in: '))


def test_training_equals_the_cpu_and_stays_on_the_device(start, tmp_path):
    result = result_of(start('training', operator_log=tmp_path / 'operators', trace=tmp_path / 'trace'))
    assert max(result.value['errors'].values()) < 1e-6, result.value['errors']
    cost = result.value['step']
    assert (cost['synchronizations'], cost['D2H'], cost['H2D']) == (0, 0, 0)
    assert 'fall back to run on the CPU' not in result.errors
    assert cost['names']['aclnnFusedSgd'] == 1
    assert cost['names']['aclnnAddRelu'] == 39  # one for each residual block but the last, which has no ReLU


@pytest.mark.parametrize('operator', ['aclnnConvolution', 'aclnnBatchNormBackward', 'aclnnForeachAddListV2'])
def test_an_operator_wrong_by_a_thousandth_is_caught(start, operator):
    right, wrong = start('small_training'), start('small_training', fault=(operator, 1.001))
    assert value_of(right) < 1e-6
    assert value_of(wrong) > 1e-5


def test_float16_autocast_agrees_with_the_cpu(start, tmp_path):
    result = value_of(start('autocast', operator_log=tmp_path / 'operators'))
    assert result['dtype'] == 'torch.float16'
    assert result['casts'] > 0
    assert result['cosine'] > 0.999


def test_a_dynamic_loss_scale_skips_the_overflow(start):
    assert value_of(start('loss_scale')) == {'scales': [2048.0, 1024.0, 2048.0], 'finite': True}


def test_what_a_training_script_does_equals_the_cpu(start):
    errors = value_of(start('script'))
    assert max(errors.values()) < 1e-6, errors


def test_the_journals_count_operators_copies_and_synchronisations(start, tmp_path):
    result = value_of(start('journal', operator_log=tmp_path / 'operators', trace=tmp_path / 'trace'))
    assert result['add'] == [['aclnnAdd', 8000, 4000]]
    assert result['expanded'] == [['aclnnMuls', 4000, 4_000_000]]  # an expanded input is read once
    assert [size for _, _, size in result['item']] == [4]
    assert result['item_synchronizations'] >= 1
    assert [size for _, _, size in result['upload']] == [200]
    assert result['synchronizations'] == 1
    assert result['fallback'] >= 1


def test_without_operators_the_same_work_is_asked_for(start, tmp_path):
    with_operators = value_of(start('without_operators', operator_log=tmp_path / 'with'))
    without = value_of(start('without_operators', operator_log=tmp_path / 'without', run_operators=False))
    assert without['operators'] == with_operators['operators']
    assert without['scale'] == with_operators['scale'] == 4096.0  # grew twice: no overflow was seen


def test_optimizers_equal_torchs(start):
    errors = value_of(start('optimizers'))
    assert max(errors.values()) < 1e-6, errors


def test_a_full_device_raises_out_of_memory(start):
    result = value_of(start('out_of_memory', memory=256 << 20))
    assert result['raised'].startswith('NPU out of memory')
    assert result['sum'] == 2 << 20


def test_a_missing_operator_ends_the_process_and_is_named(start):
    assert 'legacy operator Cross' in refusal_of(start('missing_operator'))


def test_a_private_format_ends_the_process(start):
    assert 'legacy operator Identity' in refusal_of(start('private_format'))  # the cast to it goes the legacy way


def test_a_misplaced_argument_ends_the_process_and_is_named(start):
    assert 'aclnnNeg: expected aclTensor, got aclScalar' in refusal_of(start('misplaced_argument'))


@pytest.fixture
def start_two(start):
    """start_two(piece, variables) starts ranks 0 and 1 of a job."""

    def start_ranks(name: str, **variables: str) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = str(free.getsockname()[1])
        job = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'WORLD_SIZE': '2', **variables}
        return [start(name, {**job, 'RANK': rank, 'LOCAL_RANK': rank}, devices=2) for rank in ('0', '1')]

    return start_ranks


def test_collectives_join_two_processes(start_two):
    for result in map(value_of, start_two('collectives')):
        assert result == {'all_reduce': True, 'all_gather': [[0.0, 0.0], [1.0, 1.0]], 'broadcast': [8.0, 8.0],
                          'objects': [{'rank': 0}, {'rank': 1}]}


def test_transfers_and_types(start_two):
    for result in map(value_of, start_two('transfers')):
        assert all(result.values()), result


def test_ranks_that_disagree_are_named(start_two):
    lines = sorted(refusal_of(process) for process in start_two('disagreement', HCCL_EXEC_TIMEOUT='20'))
    assert 'rank 0 calls HcclAllReduce of 1 elements' in lines[0]
    assert 'while rank 1 calls HcclAllReduce of 2 elements' in lines[0]


def test_two_ranks_equal_one_process_with_the_joint_batch(start_two):
    assert max(map(value_of, start_two('data_parallel'))) < 1e-6


def test_a_silent_peer_is_named_within_the_time_out(start_two):
    waiting, _ = start_two('silent_peer', HCCL_EXEC_TIMEOUT='3')
    line = refusal_of(waiting)
    assert 'rank 0 waited 3 s (HCCL_EXEC_TIMEOUT) in HcclAllReduce for rank 1, whose process' in line
    assert line.endswith('is alive')


def test_a_second_build_does_nothing(libraries):
    before = (libraries / 'libopapi.so').stat()
    build(libraries)
    assert (libraries / 'libopapi.so').stat() == before

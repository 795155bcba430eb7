"""The stand-in for CANN: torch_npu computes on it what the CPU computes, and nothing goes wrong in silence.

The tests run functions of pieces.py: here, or in processes of their own where the process ends, needs other switches
or is one of several.
"""

import json
import signal
import subprocess
import sys
from typing import Any

import pytest

from .environment import only_here, running_on

only_here()

from . import pieces  # noqa: E402 - it needs torch_npu
from .build import build  # noqa: E402

SECONDS = 170


@pytest.fixture
def start(start_on_standin):
    """start(piece, switches…) starts a process that runs a piece."""
    return lambda *names, **options: start_on_standin(sys.executable, pieces.__file__, *names, **options)


@pytest.fixture
def start_ranks(start, free_port):
    """start_ranks(n, pieces…, variables) starts the n processes of a job."""

    def start_job(size: int, *names: str, **variables: str) -> list[subprocess.Popen]:
        job = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port), 'WORLD_SIZE': str(size), **variables}
        return [start(*names, variables={**job, 'RANK': str(rank)}, devices=size) for rank in range(size)]

    return start_job


def values_of(process: subprocess.Popen) -> list[Any]:
    """What the pieces of a process returned."""
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def refusal_of(process: subprocess.Popen) -> str:
    """The line with which the stand-in ended a process."""
    errors = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == -signal.SIGABRT, errors
    return next(line for line in errors.splitlines() if line.startswith('ascend stand-in: '))


def test_an_operator_wrong_by_a_thousandth_is_caught(start):
    operators = 'aclnnConvolution', 'aclnnBatchNormBackward', 'aclnnForeachAddListV2'
    wrong = [start('small_training', fault=(operator, 1.001)) for operator in operators]
    assert pieces.small_training() < 1e-6
    assert all(values_of(process)[0] > 1e-5 for process in wrong)


def test_the_journals_count_operators_copies_and_synchronisations():
    result = pieces.journal()
    assert result['add'] == [('aclnnAdd', 8000, 4000, 'r:Float:1000:1 r:Float:1000:1 w:Float:1000:1 ')]
    expanded = 'r:Float:1000,1000:1,0 w:Float:1000,1000:1000,1 '
    assert result['expanded'] == [('aclnnMuls', 4000, 4_000_000, expanded)]  # an expanded input is read once
    assert [size for _, _, size in result['item']] == [4]
    assert result['item_synchronizations'] >= 1
    assert [size for _, _, size in result['upload']] == [200]
    assert result['synchronizations'] == 1
    assert result['fallback'] >= 1


def test_a_record_without_journals_is_refused(monkeypatch):
    monkeypatch.delenv('ASCEND_STANDIN_TRACE')
    with pytest.raises(RuntimeError, match='nothing is recorded'):
        pieces.journal()


def test_without_operators_the_same_work_is_asked_for(start):
    with_operators = pieces.without_operators()
    [without] = values_of(start('without_operators', run_operators=False))
    assert without['operators'] == [list(operator) for operator in with_operators['operators']]
    assert without['scale'] == with_operators['scale'] == 4096.0  # grew twice: no overflow was seen


def test_a_full_device_raises_out_of_memory(start):
    [result] = values_of(start('out_of_memory', memory=256 << 20))
    assert result['raised'].startswith('NPU out of memory')
    assert result['sum'] == 2 << 20


def test_a_process_sees_the_devices_that_it_is_given(start_on_standin):
    lists = {'0,2': 2, '1,8,2': 1, '7,7': 1}
    command = sys.executable, '-c', 'import torch; print(torch.npu.device_count())'
    seen = [start_on_standin(*command, devices=8, variables={'ASCEND_RT_VISIBLE_DEVICES': names}) for names in lists]
    assert [values_of(process) for process in seen] == list(lists.values())


def test_what_cannot_be_done_ends_the_process_and_is_named(start):
    lines = {'missing_operator': 'legacy operator Cross',
             'private_format': 'legacy operator Identity',  # the cast to it goes the legacy way
             'misplaced_argument': 'aclnnNeg: expected aclTensor, got aclScalar'}
    for process, line in [(start(piece), line) for piece, line in lines.items()]:
        assert line in refusal_of(process)


def test_collectives_and_transfers_join_four_processes(start_ranks):
    for results in map(values_of, start_ranks(4, 'collectives', 'transfers')):
        assert all(all(result.values()) for result in results), results


def test_ranks_that_disagree_are_named(start_ranks):
    lines = sorted(refusal_of(process) for process in start_ranks(2, 'disagreement', HCCL_EXEC_TIMEOUT='20'))
    assert 'rank 0 calls HcclAllReduce of 1 elements' in lines[0]
    assert 'while rank 1 calls HcclAllReduce of 2 elements' in lines[0]


def test_two_ranks_equal_one_process_with_the_joint_batch(start_ranks):
    assert max(values_of(process)[0] for process in start_ranks(2, 'data_parallel')) < 1e-6


def test_a_silent_peer_is_named_within_the_time_out(start_ranks):
    waiting, _ = start_ranks(2, 'silent_peer', HCCL_EXEC_TIMEOUT='3')
    line = refusal_of(waiting)
    assert 'rank 0 waited 3 s (HCCL_EXEC_TIMEOUT) in HcclAllReduce for rank 1, whose process' in line
    assert line.endswith('is alive')


def test_a_second_build_does_nothing():
    libraries = running_on()
    before = (libraries / 'libopapi.so').stat()
    build(libraries)
    assert (libraries / 'libopapi.so').stat() == before

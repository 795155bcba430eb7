"""Precision and fused optimizers on the real torch_npu: they train as on the CPU, and what a step costs there."""

import json
import sys
from collections.abc import Callable

import pytest

from ..ascend.environment import only_here

only_here()

import torch  # noqa: E402

from . import precision_pieces as pieces  # noqa: E402 - it needs torch_npu

LEVELS, OPTIMIZERS = list(pieces.LEVELS), pieces.OPTIMIZERS


@pytest.fixture(scope='module')
def found() -> Callable[[str], dict]:
    """found(piece): its result; it runs once."""
    results = {}

    def result(name: str) -> dict:
        if name not in results:
            results[name] = getattr(pieces, name)()
        return results[name]

    return result


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_name_is_the_vendors_class_and_computes_what_stands_for_it_on_the_cpu(found, name):
    module, error = found('optimizers')[name]
    assert module.startswith('torch_npu.optim.')
    assert error < 1e-4


@pytest.mark.parametrize('level', LEVELS)
def test_mixed_precision_trains_as_float32_on_the_cpu(found, level):
    error, skipped = found('levels')[level]
    assert 0 < error < 0.02
    assert skipped == 0


@pytest.mark.parametrize('level', ['O1 dynamic', 'O2 dynamic'])
@pytest.mark.parametrize('optimizer', ['npufusedsgd', 'npufusedadamw', 'sgd'])
def test_an_overflow_changes_no_bit(found, level, optimizer):
    in_first_step, later, skipped, went_on = found('overflow')[f'{level} {optimizer}']
    assert in_first_step
    assert later
    assert skipped == 2
    assert went_on


@pytest.mark.parametrize('optimizer', ['npufusedsgd', 'sgd'])
def test_an_overflow_in_the_very_first_step_leaves_no_trace(found, optimizer):
    assert found('first_overflow')[optimizer] < 1e-6


@pytest.mark.parametrize('level', LEVELS)
def test_clipping_sees_unscaled_gradients(found, level):
    assert found('clipping')[level] == pytest.approx(0.001, rel=1e-2)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_a_resumed_run_goes_on_bit_for_bit(found, optimizer):
    in_a_new_process, over_used_states = found('resumed')[optimizer]
    assert in_a_new_process
    assert over_used_states


@pytest.mark.parametrize('level', LEVELS)
def test_gradients_accumulate_in_combined_tensors(found, level):
    assert found('accumulation')[level] < 1e-2


@pytest.mark.parametrize('optimizer', ['npufusedsgd', 'sgd'])
@pytest.mark.parametrize('level, times', [('O1 128', 0), ('O2 128', 0), ('O1 dynamic', 1), ('O2 dynamic', 1)])
def test_the_host_waits_once_a_step_for_a_dynamic_scale_and_never_for_a_static_one(found, level, times, optimizer):
    cost = found('costs')[f'{level} {optimizer}']
    assert (cost['synchronizations'], cost['reads']) == (times, times)


def test_a_chip_without_infinities_gets_the_vendors_loss_scaler(monkeypatch):
    monkeypatch.setattr(torch.npu.utils, 'is_support_inf_nan', lambda: False)
    # an operator of those chips alone
    monkeypatch.setattr(torch.npu.amp.GradScaler, 'clear_npu_overflow_flag', staticmethod(lambda: None))
    answer = pieces.saturating_chip()
    assert answer.pop('scaler') == 'torch_npu.npu.amp.grad_scaler'
    assert answer == dict.fromkeys(('npufusedsgd', 'sgd'), (True, 1, True))


def test_an_o2_step_of_the_whole_network_does_not_wait(start_on_standin):
    process = start_on_standin(sys.executable, pieces.__file__, 'our_network', run_operators=False)
    output, errors = process.communicate(timeout=3000)
    assert process.returncode == 0, errors
    cost = json.loads(output.splitlines()[-1])['our_network']
    assert (cost['synchronizations'], cost['reads']) == (0, 0)
    assert cost['calls'] > 500  # it is the whole network

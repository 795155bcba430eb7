"""Precision and fused optimizers on the real torch_npu: the same training as on the CPU, and what a step costs there.

The pieces run on the stand-in for CANN (tests/ascend) in processes of their own, whose environment must be set before
they start.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..ascend.build import build
from ..ascend.environment import environment

PIECES = Path(__file__).with_name('precision_pieces.py')
LEVELS = ['O1 128', 'O1 dynamic', 'O2 128', 'O2 dynamic']
OPTIMIZERS = ['npufusedsgd', 'npufusedadam', 'npufusedadamw', 'npufusedadadelta', 'npufusedlamb', 'npufusedrmsprop',
              'npufusedrmsproptf', 'npufusedadamp']

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec('torch_npu') is None, reason='torch_npu is not installed'),
    pytest.mark.skipif(torch.version.cuda is not None,
                       reason='torch is a CUDA build: it cannot be loaded beside torch_npu'),
]


@pytest.fixture(scope='module')
def libraries(request) -> Path:
    return build(request.config.cache.mkdir('ascend_standin') / 'libraries')


def run(libraries: Path, folder: Path, *names: str, **switches) -> dict:
    """{piece: its result}."""
    variables = environment(libraries, base={**os.environ, 'OMP_NUM_THREADS': '1'}, operator_log=folder / 'operators',
                            trace=folder / 'trace', **switches)
    done = subprocess.run([sys.executable, PIECES, *names], env=variables, cwd=folder, capture_output=True, text=True,
                          timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def found(libraries, tmp_path_factory) -> dict:
    return run(libraries, tmp_path_factory.mktemp('pieces'), 'optimizers', 'levels', 'overflow', 'first_overflow',
               'clipping', 'resumed', 'accumulation', 'costs', 'saturating_chip')


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_name_is_the_vendors_class_and_computes_what_stands_for_it_on_the_cpu(found, name):
    module, error = found['optimizers'][name]
    assert module.startswith('torch_npu.optim.')
    assert error < 1e-4


@pytest.mark.parametrize('level', LEVELS)
def test_mixed_precision_trains_as_float32_on_the_cpu(found, level):
    error, skipped = found['levels'][level]
    assert 0 < error < 0.02
    assert skipped == 0


@pytest.mark.parametrize('level', ['O1 dynamic', 'O2 dynamic'])
@pytest.mark.parametrize('optimizer', ['npufusedsgd', 'npufusedadamw', 'sgd'])
def test_an_overflow_changes_no_bit(found, level, optimizer):
    in_first_step, later, skipped, went_on = found['overflow'][f'{level} {optimizer}']
    assert in_first_step
    assert later
    assert skipped == 2
    assert went_on


@pytest.mark.parametrize('optimizer', ['npufusedsgd', 'sgd'])
def test_an_overflow_in_the_very_first_step_leaves_no_trace(found, optimizer):
    assert found['first_overflow'][optimizer] < 1e-6


@pytest.mark.parametrize('level', LEVELS)
def test_clipping_sees_unscaled_gradients(found, level):
    assert found['clipping'][level] == pytest.approx(0.001, rel=1e-2)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_a_resumed_run_goes_on_bit_for_bit(found, optimizer):
    in_a_new_process, over_used_states = found['resumed'][optimizer]
    assert in_a_new_process
    assert over_used_states


@pytest.mark.parametrize('level', LEVELS)
def test_gradients_accumulate_in_combined_tensors(found, level):
    assert found['accumulation'][level] < 1e-2


@pytest.mark.parametrize('optimizer', ['npufusedsgd', 'sgd'])
@pytest.mark.parametrize('level, times', [('O1 128', 0), ('O2 128', 0), ('O1 dynamic', 1), ('O2 dynamic', 1)])
def test_the_host_waits_once_a_step_for_a_dynamic_scale_and_never_for_a_static_one(found, level, times, optimizer):
    cost = found['costs'][f'{level} {optimizer}']
    assert (cost['synchronizations'], cost['reads']) == (times, times)


def test_a_chip_without_infinities_gets_the_vendors_loss_scaler(found):
    answer = found['saturating_chip']
    assert answer.pop('scaler') == 'torch_npu.npu.amp.grad_scaler'
    assert answer == {name: [True, 1, True] for name in ('npufusedsgd', 'sgd')}


def test_an_o2_step_of_the_whole_network_does_not_wait(libraries, tmp_path):
    cost = run(libraries, tmp_path, 'our_network', run_operators=False)['our_network']
    assert (cost['synchronizations'], cost['reads']) == (0, 0)
    assert cost['calls'] > 1000  # it is the whole network

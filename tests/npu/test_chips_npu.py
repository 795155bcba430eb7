"""Training picks operators that exist on the chip at hand, by the table of chips."""

import json
import sys

import pytest

from ..ascend.environment import only_here

only_here()


def step(start_on_standin, chip: str, momentum: float = 0.9) -> dict:
    process = start_on_standin(sys.executable, '-m', 'tests.npu.chip_pieces', str(momentum), chip=chip)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


# {chip: (generation, operators that it lacks by hicann's documents, form of 1×1 convolutions)}
CHIPS = {
    'Ascend910A': ('910A', {'FusedSgd', 'ForeachMulScalarV2', 'ForeachNonFiniteCheckAndUnscale'}, 'convolution'),
    'Ascend910B2': ('A2', set(), 'large'),
    'Ascend910_9392': ('A3', set(), 'large'),
    'Ascend950PR_9599': ('950', set(), 'convolution'),
}


@pytest.mark.parametrize('chip', CHIPS)
def test_a_step_calls_no_operator_that_the_chip_lacks(start_on_standin, chip):
    found = step(start_on_standin, chip)
    generation, lacking, pointwise = CHIPS[chip]
    fused = 'FusedSgd' not in lacking
    assert found['finite'] and found['calls'] and not {f'aclnn{name}' for name in lacking} & found['calls'].keys()
    assert ('aclnnFusedSgd' in found['calls']) == fused
    told = f'SGD runs unfused on the flat buffers: the chips of generation {generation} have no fused SGD.'
    assert (told in found['log']) != fused
    assert found['pointwise'] == pointwise


def test_sgd_without_momentum_is_unfused_since_the_fused_operator_refuses_it(start_on_standin):
    found = step(start_on_standin, 'Ascend910B3', momentum=0.0)
    assert found['finite'] and 'aclnnFusedSgd' not in found['calls']
    assert 'SGD runs unfused on the flat buffers: fused SGD needs a momentum here.' in found['log']

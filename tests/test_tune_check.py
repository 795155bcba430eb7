"""The check of `benchmark.py tune` passes all forms of an operation, and names a block that computes something else."""

import functools

import pytest
import timm
import torch

from timm_npu_irv2.benchmarks.tune_check import block_errors, find_wrong
from timm_npu_irv2.ops import use_variants
from timm_npu_irv2.precision import create_precision

CPU = torch.device('cpu')


def errors(half: bool, change=None, **forms: str) -> dict[str, float]:
    torch.manual_seed(0)
    reference = timm.create_model('inception_resnet_v2', num_classes=10).train()
    images = torch.randn(2, 3, 107, 107)
    model = timm.create_model('inception_resnet_v2_npu', num_classes=10).train()
    model.load_state_dict(reference.state_dict())
    if change is not None:
        change(model)
    precision = create_precision(CPU, amp=half, opt_level='O2' if half else None)
    model, _ = precision.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    with use_variants(**forms):
        return block_errors(model, reference, images, CPU, precision.input_dtype, precision.autocast)


@pytest.fixture(scope='module', params=[False, True], ids=['float32', 'bfloat16'])
def verdict(request):
    """verdict(change, forms): what the check says of a network that was changed, beside the default."""
    default = errors(request.param)
    dtype = torch.bfloat16 if request.param else torch.float32

    def check(change=None, **forms: str) -> str:
        return find_wrong(errors(request.param, change, **forms), default, dtype)

    check.dtype, check.default = dtype, default
    return check


def test_other_forms_are_right(verdict):
    assert verdict(pointwise='product', siblings='separate', residual='addition') == ''
    assert len(verdict.default) > 700


def scale(model, factor: float) -> None:
    model.repeat_1[3].scale *= factor


def test_a_block_with_a_wrong_factor_is_named(verdict):
    factor = 1.01 if verdict.dtype == torch.float32 else 1.3
    assert ' of repeat_1.3' in verdict(functools.partial(scale, factor=factor))


def test_numbers_that_are_not_finite_are_wrong():
    assert 'inf in b' in find_wrong({'a': 0.0, 'b': float('inf')}, {'a': 0.0, 'b': 0.1}, torch.bfloat16)
    assert find_wrong({'a': 9.0}, {'a': 3.0}, torch.bfloat16) == ''  # mere rounding by default, too

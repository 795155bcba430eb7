"""Operators equal their references, with gradients, under every way PyTorch has to look at them."""

import pytest
import torch

from timm_npu_irv2.ops import scaled_residual_relu
from timm_npu_irv2.ops.residual import scaled_residual_relu_reference

SCALE = 0.17


def inputs(dtype=torch.float32, memory_format=torch.contiguous_format, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 8, 5, 7, generator=generator).to(dtype, memory_format=memory_format)
        .requires_grad_(requires_grad)
        for _ in range(2)
    ]


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_residual_equals_its_reference(dtype, memory_format):
    x, branch = inputs(dtype, memory_format)
    actual = scaled_residual_relu(x, branch, SCALE)
    expected = scaled_residual_relu_reference(x, branch, SCALE)
    assert actual.dtype == dtype and actual.is_contiguous(memory_format=memory_format)
    assert torch.allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_residual_gradients_equal_the_references(dtype):
    grads = []
    for function in (scaled_residual_relu, scaled_residual_relu_reference):
        x, branch = inputs(dtype, requires_grad=True)
        function(x, branch, SCALE).square().sum().backward()
        grads.append((x.grad, branch.grad))
    for actual, expected in zip(*grads, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_residual_passes_gradcheck():
    x, branch = inputs(torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: scaled_residual_relu(a, b, SCALE), (x, branch))


def test_residual_passes_opcheck():
    torch.library.opcheck(torch.ops.timm_npu_irv2.scaled_residual_relu, (*inputs(requires_grad=True), SCALE))


def test_residual_keeps_nan_and_infinity():
    # A loss that became NaN must be seen; a maximum that drops NaN would hide it.
    x = torch.tensor([float('nan'), float('inf'), -float('inf')])
    out = scaled_residual_relu(x, torch.zeros(3), SCALE)
    assert out[0].isnan() and out[1] == float('inf') and out[2] == 0


def test_residual_promotes_mixed_types():
    x, branch = inputs()
    branch = branch.bfloat16().requires_grad_()
    out = scaled_residual_relu(x, branch, SCALE)
    out.sum().backward()
    assert out.dtype == torch.float32 and branch.grad.dtype == torch.bfloat16

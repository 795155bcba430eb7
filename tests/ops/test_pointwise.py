"""A 1×1 convolution as a product of matrices computes what the convolution computes, alone and in the network."""

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_npu_irv2.errors import UserError
from timm_npu_irv2.ops import pointwise_convolution, use_variants, variants

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def gradients(function, *tensors):
    leaves = [each.detach().clone(memory_format=torch.preserve_format).requires_grad_() for each in tensors]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return out, *torch.autograd.grad(out, leaves, grad.to(memory_format=torch.contiguous_format))


@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
# Few positions make the weight's gradient one product, many a product for each image.
@pytest.mark.parametrize('channels, outputs, size', [(64, 48, 3), (8, 6, 17), (5, 7, 1)])
@pytest.mark.parametrize('bias', [True, False])
def test_output_and_gradients_are_those_of_the_convolution(dtype, layout, channels, outputs, size, bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, channels, size, size, generator=generator, dtype=dtype).to(memory_format=layout)
    weight = torch.randn(outputs, channels, 1, 1, generator=generator, dtype=dtype)
    tensors = (x, weight, torch.randn(outputs, generator=generator, dtype=dtype)) if bias else (x, weight)
    actual = gradients(lambda x, w, b=None: pointwise_convolution(x, w, b), *tensors)
    expected = gradients(lambda x, w, b=None: F.conv2d(x, w, b), *tensors)
    tolerance = TOLERANCES[dtype]
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 10)
    assert actual[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_the_network_computes_the_same_in_either_form(layout):
    torch.manual_seed(0)
    model = timm.create_model('inception_resnet_v2_npu', num_classes=10).double().to(memory_format=layout).train()
    images = torch.randn(2, 3, 75, 75, dtype=torch.float64).to(memory_format=layout)
    found = []
    for form in ('convolution', 'product'):
        with use_variants(pointwise=form):
            out = model(images)
        found.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    for ours, theirs in zip(*found, strict=True):
        scale = theirs.abs().max().clamp_min(1e-3)
        assert ((ours - theirs).abs().max() / scale) < 1e-8  # 100 norms over two images amplify rounding


def test_a_choice_ends_with_its_context_and_a_wrong_one_is_a_line():
    before = variants()
    with use_variants(pointwise='product') as chosen:
        assert variants() is chosen and chosen.pointwise == 'product'
    assert variants() == before
    for wrong in (dict(pointwise='sum'), dict(residual='fused')):
        with pytest.raises(UserError, match=r'no variant .* there are pointwise='), use_variants(**wrong):
            pass

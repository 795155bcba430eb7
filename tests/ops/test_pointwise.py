"""A 1×1 convolution as a product of matrices computes what the convolution computes, alone and in the network."""

from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from timm_npu_irv2.errors import UserError
from timm_npu_irv2.ops import pointwise_convolution, use_variants, variants


class _Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[operator] += 1
        return operator(*args, **(kwargs or {}))


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
@pytest.mark.parametrize('form', [{'pointwise': 'product'}, {'pointwise': 'large'}, {'siblings': 'separate'},
                                  {'siblings': 'separate', 'pointwise': 'product'}, {'residual': 'addition'}], ids=str)
def test_the_network_computes_the_same_in_every_form(layout, form, monkeypatch):
    found_calls = []
    torch.manual_seed(0)
    model = timm.create_model('inception_resnet_v2_npu', num_classes=10).double().to(memory_format=layout).train()
    images = torch.randn(2, 3, 75, 75, dtype=torch.float64).to(memory_format=layout)
    monkeypatch.setattr('timm_npu_irv2.layers.LARGE', 100)
    found = []
    for chosen in ({}, form):
        with use_variants(**chosen), _Calls() as calls:
            out = model(images)
            found.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
        found_calls.append(calls.counts)
    assert found_calls[0] != found_calls[1], 'the form was not taken'
    for ours, theirs in zip(*found, strict=True):
        scale = theirs.abs().max().clamp_min(1e-3)
        assert ((ours - theirs).abs().max() / scale) < 1e-8  # 100 norms over two images amplify rounding


def test_a_choice_ends_with_its_context_and_a_wrong_one_is_a_line():
    before = variants()
    with use_variants(pointwise='product') as chosen:
        assert variants() is chosen and chosen.pointwise == 'product'
    assert variants() == before
    for wrong in (dict(pointwise='sum'), dict(residue='fused')):
        with pytest.raises(UserError, match=r'no variant .* there are pointwise='), use_variants(**wrong):
            pass

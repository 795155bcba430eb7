"""Operators equal their references, with gradients, by every family of kernels and under every way PyTorch has to
look at them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from timm_npu_irv2 import UserError
from timm_npu_irv2.ops import (
    batch_norm_relu,
    normalize_images,
    scaled_relu,
    scaled_residual_relu,
    use_variants,
    variants,
)
from timm_npu_irv2.ops.activation import scaled_relu_reference
from timm_npu_irv2.ops.batch_norm import batch_norm_relu_reference
from timm_npu_irv2.ops.normalize import normalize_images_reference
from timm_npu_irv2.ops.residual import scaled_residual_relu_reference

SCALE, EPS = 0.17, 1e-3
LAYOUTS = [torch.contiguous_format, torch.channels_last]


# Triton decides when it is imported whether its kernels are interpreted, so those run in a process of their own: see
# `test_triton_kernels_pass_the_same_tests`.
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


@pytest.fixture(params=['triton' if INTERPRETED else 'aten'])
def kernels(request):
    """The family of kernels that this process tests."""
    with use_variants(kernels=request.param):
        yield request.param


@pytest.mark.skipif(INTERPRETED, reason='this is that process')
def test_triton_kernels_pass_the_same_tests():
    pytest.importorskip('triton')
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__, '-k', 'triton']
    environment = {**os.environ, 'TRITON_INTERPRET': '1'}
    found = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-4000:]
    assert int(re.search(r'(\d+) passed', found.stdout)[1]) >= 25


def close(actual, expected, dtype=torch.float32, rtol=1e-6, atol=1e-6):
    """Equal but for rounding; 16-bit types have 8 bits, and Triton's interpreter cuts off instead of rounding."""
    rough = dtype in (torch.float16, torch.bfloat16)
    torch.testing.assert_close(actual, expected, rtol=1e-2 if rough else rtol, atol=1e-2 if rough else atol)


def random(*shape, dtype=torch.float32, memory_format=torch.contiguous_format, requires_grad=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).to(dtype, memory_format=memory_format)
    return values.requires_grad_(requires_grad)


def inputs(dtype=torch.float32, memory_format=torch.contiguous_format, requires_grad=False):
    return [random(2, 8, 5, 7, dtype=dtype, memory_format=memory_format, requires_grad=requires_grad, seed=seed)
            for seed in range(2)]


def norm_inputs(dtype=torch.float32, memory_format=torch.contiguous_format, channels=40, requires_grad=False):
    exact = torch.promote_types(dtype, torch.float32)
    x = (random(3, channels, 5, 7) * 3 + 50).to(dtype, memory_format=memory_format)  # mean far from zero
    weight, bias = random(channels, dtype=exact, seed=1) + 1, random(channels, dtype=exact, seed=2)
    return [t.requires_grad_(requires_grad) for t in (x, weight, bias)]


# ---- the end of a residual block -----------------------------------------------------------------------------------

@pytest.mark.parametrize('memory_format', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_residual_equals_its_reference(kernels, dtype, memory_format):
    x, branch = inputs(dtype, memory_format)
    actual = scaled_residual_relu(x, branch, SCALE)
    expected = scaled_residual_relu_reference(x, branch, SCALE)
    assert actual.dtype == dtype and actual.is_contiguous(memory_format=memory_format)
    close(actual, expected, dtype)


@pytest.mark.parametrize('scale', [SCALE, 1.0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_residual_gradients_equal_the_references(kernels, dtype, scale):
    grads = []
    for function in (scaled_residual_relu, scaled_residual_relu_reference):
        x, branch = inputs(dtype, requires_grad=True)
        function(x, branch, scale).square().sum().backward()
        grads.append((x.grad, branch.grad))
    close(*grads, dtype, rtol=1e-5)


def test_residual_passes_gradcheck():
    x, branch = inputs(torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: scaled_residual_relu(a, b, SCALE), (x, branch))


def test_residual_keeps_nan_and_infinity(kernels):
    # A loss that became NaN must be seen; a maximum that drops NaN would hide it.
    x = torch.tensor([float('nan'), float('inf'), -float('inf')])
    out = scaled_residual_relu(x, torch.zeros(3), SCALE)
    assert out[0].isnan() and out[1] == float('inf') and out[2] == 0


def test_residual_promotes_mixed_types(kernels):
    x, branch = inputs(requires_grad=True)
    branch = branch.detach().bfloat16().requires_grad_()
    out = scaled_residual_relu(x, branch, SCALE)
    out.sum().backward()
    assert out.dtype == torch.float32 and x.grad.dtype == torch.float32 and branch.grad.dtype == torch.bfloat16


# ---- the activation ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('scale', [SCALE, 1.0])
@pytest.mark.parametrize('inplace', [False, True])
def test_scaled_relu_and_its_gradient_equal_the_reference(inplace, scale):
    results = []
    for function in (lambda x: scaled_relu(x * 1, scale, inplace), lambda x: scaled_relu_reference(x, scale)):
        x = random(2, 8, 5, 7, requires_grad=True)
        out = function(x)
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)


def test_scaled_relu_keeps_nan_and_infinity():
    out = scaled_relu(torch.tensor([float('nan'), float('inf'), -float('inf'), -1.0]), SCALE)
    assert out[0].isnan() and out[1] == float('inf') and out[2] == out[3] == 0


# ---- BatchNorm and ReLU --------------------------------------------------------------------------------------------

def trained(x, weight, bias, scale=SCALE):
    """The operator in training, without running statistics."""
    return batch_norm_relu(x, weight, bias, None, None, True, 0.1, EPS, scale)


@pytest.mark.parametrize('scale', [SCALE, 1.0])
@pytest.mark.parametrize('memory_format', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_batch_norm_relu_equals_its_reference(kernels, dtype, memory_format, scale):
    x, weight, bias = norm_inputs(dtype, memory_format)
    actual = trained(x, weight, bias, scale)
    expected, _, _ = batch_norm_relu_reference(x, weight, bias, EPS, scale)
    assert actual.dtype == dtype and actual.is_contiguous(memory_format=memory_format)
    close(actual, expected, dtype, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('memory_format', LAYOUTS)
def test_batch_norm_relu_gradients_equal_the_references(kernels, memory_format):
    grads = []
    for function in (trained, lambda *inputs: batch_norm_relu_reference(*inputs, EPS, SCALE)[0]):
        leaves = norm_inputs(memory_format=memory_format, requires_grad=True)
        out = function(*leaves)
        (out * random(*out.shape, seed=3)).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)


def test_batch_norm_relu_reads_channel_slices(kernels):
    x, weight, bias = norm_inputs(channels=8)
    whole = torch.cat([torch.zeros_like(x), x, torch.ones_like(x)], 1)
    actual = trained(whole[:, 8:16], weight, bias)
    torch.testing.assert_close(actual, batch_norm_relu_reference(x, weight, bias, EPS, SCALE)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('memory_format', LAYOUTS)
def test_on_a_cpu_batch_norm_gets_no_slice_of_channels(memory_format):
    # ATen's kernels for tensors with gaps take several times as long as a copy and those without: `benchmark.py ops`.
    class Inputs(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if 'batch_norm' in operator.overloadpacket.__name__:
                gaps.extend(not t.is_contiguous(memory_format=memory_format) for t in args[:2] if t.ndim == 4)
            return operator(*args, **(kwargs or {}))

    gaps, results = [], []
    for function in (batch_norm_relu, lambda x, weight, bias, *_: batch_norm_relu_reference(x, weight, bias, EPS)[0]):
        leaves = norm_inputs(memory_format=memory_format, channels=24, requires_grad=True)
        with Inputs():
            out = function(leaves[0][:, 8:16], *(leaf[8:16] for leaf in leaves[1:]), None, None, True, 0.1, EPS)
            (out * random(*out.shape, seed=3).to(memory_format=memory_format)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert gaps == [False] * 3
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_batch_norm_relu_moves_the_running_statistics_as_batch_norm_does(kernels):
    x, weight, bias = norm_inputs()
    statistics = [(torch.zeros(40), torch.ones(40)) for _ in range(2)]
    out = batch_norm_relu(x, weight, bias, *statistics[0], True, 0.1, EPS, SCALE)
    expected = torch.nn.functional.batch_norm(x, *statistics[1], weight, bias, True, 0.1, EPS).relu() * SCALE
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics[0], statistics[1], rtol=1e-5, atol=1e-5)


def test_batch_norm_relu_refuses_a_single_value_per_channel(kernels):
    with pytest.raises(ValueError, match='more than'):
        batch_norm_relu(torch.ones(1, 4, 1, 1), torch.ones(4), torch.ones(4), None, None, True, 0.1, EPS)


def test_batch_norm_relu_passes_gradcheck():
    x, weight, bias = (t.detach().double().requires_grad_() for t in norm_inputs(channels=3))
    x = (x.detach() - 50).requires_grad_()
    assert torch.autograd.gradcheck(trained, (x, weight, bias))


# ---- images --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('memory_format', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_normalize_images_equals_its_reference(kernels, dtype, memory_format):
    images = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.5]), dtype, memory_format
    actual = normalize_images(images, *settings)
    assert actual.dtype == dtype and actual.is_contiguous(memory_format=memory_format)
    close(actual, normalize_images_reference(images, *settings), dtype)
    assert images.dtype == torch.uint8


# ---- the choice of kernels -----------------------------------------------------------------------------------------

def test_an_unknown_family_of_kernels_is_one_line(monkeypatch):
    monkeypatch.setenv('TIMM_NPU_IRV2_KERNELS', 'cuda')
    monkeypatch.setattr(sys.modules['timm_npu_irv2.ops.variants'], '_current', None)  # as in a new process
    with pytest.raises(UserError, match='TIMM_NPU_IRV2_KERNELS=cuda: use auto, aten or triton'):
        variants()


@pytest.mark.skipif(INTERPRETED, reason='the interpreter compiles nothing')
def test_triton_kernels_compile_for_a_gpu(tmp_path):
    pytest.importorskip('triton')
    script = Path(__file__).with_name('compile_triton.py')
    environment = {**os.environ, 'TRITON_CACHE_DIR': str(tmp_path)}
    found = subprocess.run([sys.executable, script], env=environment, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-4000:]
    assert found.stdout.count('bytes of PTX') == 9

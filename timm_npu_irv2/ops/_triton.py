"""The operators as Triton kernels, one source for CUDA and, through triton-ascend, for the NPU.

All kernels compute in float32 and round once. A tensor (N, C, H, W) is seen as (N, C, S) with a stride for each of the
three, so NCHW, channels_last and channel slices need no copy. Each function has the arguments and results of the
operator of its name.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ['batch_norm_relu', 'batch_norm_relu_backward', 'normalize_images', 'scaled_residual_relu',
           'scaled_residual_relu_backward']

BLOCK = 1024  # elements that a program handles at a time


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of N, C and S of a tensor from :func:`_collapsible`."""
    return x.stride(0), x.stride(1), x.stride(3)


def _collapsible(x: Tensor) -> Tensor:
    """Return ``x`` itself if its rows follow one another without a gap, else a copy for which that holds."""
    return x if x.stride(2) == x.shape[3] * x.stride(3) else x.contiguous()


def _blocks(x: Tensor) -> tuple[int, int]:
    """Return the channels and positions of a program's tile: neighbours in memory lie in one tile."""
    channels = 32 if x.stride(1) == 1 and x.shape[1] > 1 else 1
    return channels, BLOCK // channels


# ---- BatchNorm and ReLU: a program has a block of channels; it reads it once for statistics, once for the result ---

@triton.jit
def _load(tensor, n, s, c, stride_n, stride_c, stride_s, mask):
    """Load a tile of (positions, channels) in float32; zero outside ``mask``."""
    place = (n * stride_n + s * stride_s)[:, None] + (c * stride_c)[None, :]
    return tl.load(tensor + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _unactivated(x, n, s, c, xn, xc, xs, mask, mean, inverse, factor, beta):
    """Load a tile of x; return it normalised, and as the input of the activation. Both directions compute it alike."""
    difference = _load(x, n, s, c, xn, xc, xs, mask) - mean[None, :]
    return difference * inverse[None, :], difference * factor[None, :] + beta[None, :]


@triton.jit
def _batch_norm_relu(x, weight, bias, out, mean_out, variance_out, total, spatial, channels, xn, xc, xs, on, oc, os,
                     eps, scale, block_c: tl.constexpr, block_s: tl.constexpr):
    c = tl.program_id(0) * block_c + tl.arange(0, block_c)
    in_c = c < channels
    # Sums of differences to the first value: the plain sum of squares would cancel where |mean| >> deviation.
    first = tl.load(x + c * xc, mask=in_c, other=0.0).to(tl.float32)
    sums = tl.zeros([block_c], tl.float32)
    squares = tl.zeros([block_c], tl.float32)
    for start in range(0, total, block_s):
        i = start + tl.arange(0, block_s)
        mask = (i < total)[:, None] & in_c[None, :]
        value = _load(x, i // spatial, i % spatial, c, xn, xc, xs, mask)
        difference = tl.where(mask, value - first[None, :], 0.0)
        sums += tl.sum(difference, 0)
        squares += tl.sum(difference * difference, 0)
    shift = sums / total
    mean = first + shift
    variance = tl.maximum(squares / total - shift * shift, 0.0)
    tl.store(mean_out + c, mean, mask=in_c)
    tl.store(variance_out + c, variance, mask=in_c)
    inverse = 1.0 / tl.sqrt(variance + eps)
    factor = tl.load(weight + c, mask=in_c, other=0.0).to(tl.float32) * inverse
    beta = tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)
    for start in range(0, total, block_s):
        i = start + tl.arange(0, block_s)
        mask = (i < total)[:, None] & in_c[None, :]
        n, s = i // spatial, i % spatial
        _, value = _unactivated(x, n, s, c, xn, xc, xs, mask, mean, inverse, factor, beta)
        value = tl.where(value < 0.0, 0.0, value) * scale  # keeps NaN, which a maximum may drop
        place = (n * on + s * os)[:, None] + (c * oc)[None, :]
        tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _batch_norm_relu_backward(grad, x, weight, bias, mean_in, variance_in, grad_x, grad_weight, grad_bias, total,
                              spatial, channels, gn, gc, gs, xn, xc, xs, dn, dc, ds, eps, scale,
                              block_c: tl.constexpr, block_s: tl.constexpr):
    c = tl.program_id(0) * block_c + tl.arange(0, block_c)
    in_c = c < channels
    mean = tl.load(mean_in + c, mask=in_c, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.load(variance_in + c, mask=in_c, other=1.0).to(tl.float32) + eps)
    factor = tl.load(weight + c, mask=in_c, other=0.0).to(tl.float32) * inverse
    beta = tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)
    sums = tl.zeros([block_c], tl.float32)
    products = tl.zeros([block_c], tl.float32)
    for start in range(0, total, block_s):
        i = start + tl.arange(0, block_s)
        mask = (i < total)[:, None] & in_c[None, :]
        n, s = i // spatial, i % spatial
        normalized, value = _unactivated(x, n, s, c, xn, xc, xs, mask, mean, inverse, factor, beta)
        h = tl.where(value > 0.0, _load(grad, n, s, c, gn, gc, gs, mask) * scale, 0.0)
        sums += tl.sum(h, 0)
        products += tl.sum(h * normalized, 0)
    tl.store(grad_bias + c, sums, mask=in_c)
    tl.store(grad_weight + c, products, mask=in_c)
    for start in range(0, total, block_s):
        i = start + tl.arange(0, block_s)
        mask = (i < total)[:, None] & in_c[None, :]
        n, s = i // spatial, i % spatial
        normalized, value = _unactivated(x, n, s, c, xn, xc, xs, mask, mean, inverse, factor, beta)
        h = tl.where(value > 0.0, _load(grad, n, s, c, gn, gc, gs, mask) * scale, 0.0)
        d = factor[None, :] * (h - sums[None, :] / total - normalized * products[None, :] / total)
        place = (n * dn + s * ds)[:, None] + (c * dc)[None, :]
        tl.store(grad_x + place, d.to(grad_x.dtype.element_ty), mask=mask)


def batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what ``ops/batch_norm.py`` defines."""
    x = _collapsible(x)
    out, mean, variance = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    n, channels, height, width = x.shape
    block_c, block_s = _blocks(x)
    _batch_norm_relu[(triton.cdiv(channels, block_c),)](
        x, weight, bias, out, mean, variance, n * height * width, height * width, channels,
        *_strides(x), *_strides(out), eps, scale, block_c, block_s,
    )
    return out, mean, variance


def batch_norm_relu_backward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what ``ops/batch_norm.py`` defines."""
    grad, x = _collapsible(grad), _collapsible(x)
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    n, channels, height, width = x.shape
    block_c, block_s = _blocks(x)
    _batch_norm_relu_backward[(triton.cdiv(channels, block_c),)](
        grad, x, weight, bias, mean, variance, grad_x, grad_weight, grad_bias, n * height * width, height * width,
        channels, *_strides(grad), *_strides(x), *_strides(grad_x), eps, scale, block_c, block_s,
    )
    return grad_x, grad_weight, grad_bias


# ---- elementwise: a program has a block of consecutive elements ----------------------------------------------------

@triton.jit
def _scaled_residual_relu(x, branch, out, scale, count, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    mask = i < count
    value = tl.load(x + i, mask=mask).to(tl.float32) + scale * tl.load(branch + i, mask=mask).to(tl.float32)
    tl.store(out + i, tl.where(value < 0.0, 0.0, value).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _scaled_residual_relu_backward(grad, out, grad_x, grad_branch, scale, count, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    mask = i < count
    y = tl.load(out + i, mask=mask, other=0.0)
    masked = tl.where(y > 0.0, tl.load(grad + i, mask=mask, other=0.0).to(tl.float32), 0.0)
    tl.store(grad_x + i, masked.to(grad_x.dtype.element_ty), mask=mask)
    tl.store(grad_branch + i, (masked * scale).to(grad_branch.dtype.element_ty), mask=mask)


@triton.jit
def _normalize_images(images, mean, std, out, count, spatial, channels, on, oc, os, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    mask = i < count
    c = i // spatial % channels
    value = tl.load(images + i, mask=mask, other=0).to(tl.float32)
    value = (value - tl.load(mean + c, mask=mask) * 255.0) / (tl.load(std + c, mask=mask, other=1.0) * 255.0)
    place = i // (spatial * channels) * on + c * oc + i % spatial * os
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the layout of the first, each without gaps."""
    first = tensors[0]
    layout = torch.channels_last if first.ndim == 4 and not first.is_contiguous() else torch.contiguous_format
    return tuple(t.contiguous(memory_format=layout) for t in tensors)


def scaled_residual_relu(x: Tensor, branch: Tensor, scale: float) -> Tensor:
    """Compute what ``ops/residual.py`` defines."""
    x, branch = _alike(x, branch)
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, branch.dtype))
    _scaled_residual_relu[(triton.cdiv(x.numel(), BLOCK),)](x, branch, out, scale, x.numel(), BLOCK)
    return out


def scaled_residual_relu_backward(
        grad: Tensor,
        out: Tensor,
        scale: float,
        x_dtype: torch.dtype,
        branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of ``x`` and ``branch``, in the types given."""
    out, grad = _alike(out, grad)
    grad_x, grad_branch = torch.empty_like(out, dtype=x_dtype), torch.empty_like(out, dtype=branch_dtype)
    _scaled_residual_relu_backward[(triton.cdiv(out.numel(), BLOCK),)](
        grad, out, grad_x, grad_branch, scale, out.numel(), BLOCK,
    )
    return grad_x, grad_branch


def normalize_images(
        images: Tensor,
        mean: Tensor,
        std: Tensor,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
) -> Tensor:
    """Compute what ``ops/normalize.py`` defines."""
    images = images.contiguous()
    out = torch.empty_like(images, dtype=dtype, memory_format=memory_format)
    _, channels, height, width = images.shape
    _normalize_images[(triton.cdiv(images.numel(), BLOCK),)](
        images, mean, std, out, images.numel(), height * width, channels, *_strides(out), BLOCK,
    )
    return out

"""The operators as Triton kernels, one source for CUDA and, through triton-ascend, for the NPU.

All kernels compute in float32 and round once. A tensor (N, C, H, W) is seen as (N, C, S) with a stride for each of the
three, so NCHW, channels_last and channel slices need no copy. Each function has the arguments and results of the
operator of its name.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ['batch_norm_relu', 'batch_norm_relu_backward', 'normalize_images', 'scaled_residual_relu',
           'scaled_residual_relu_backward']

BLOCK = 1024  # elements that a program of the elementwise kernels handles
TILE = 2048  # elements that the others handle at a time
PROGRAMS = 1024  # of the others, about: a few for each core of any device


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of N, C and S of a tensor from :func:`_collapsible`."""
    return x.stride(0), x.stride(1), x.stride(3)


def _collapsible(x: Tensor) -> Tensor:
    """Return ``x`` itself if its rows follow one another without a gap, else a copy for which that holds."""
    return x if x.stride(2) == x.shape[3] * x.stride(3) else x.contiguous()


# ---- BatchNorm and ReLU: channels are blocks of a grid, positions (N, H, W) are spans of it ------------------------
#
# Two kernels sum over a span each, two add up the spans, in the same order every time, and two compute the elements.

@triton.jit
def _channels(channels, block_c: tl.constexpr):
    """Return the channels of this program, and those of them that exist."""
    c = tl.program_id(0) * block_c + tl.arange(0, block_c)
    return c, c < channels


@triton.jit
def _positions(step, steps, total, block_s: tl.constexpr):
    """Return the positions of a step of this program, and those of them that exist."""
    i = (tl.program_id(1) * steps + step) * block_s + tl.arange(0, block_s)
    return i, i < total


@triton.jit
def _load(tensor, n, s, c, stride_n, stride_c, stride_s, mask):
    """Load a tile of (positions, channels) in float32; zero outside ``mask``."""
    place = (n.to(tl.int64) * stride_n + s * stride_s)[:, None] + (c * stride_c)[None, :]
    return tl.load(tensor + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(tensor, value, n, s, c, stride_n, stride_c, stride_s, mask):
    place = (n.to(tl.int64) * stride_n + s * stride_s)[:, None] + (c * stride_c)[None, :]
    tl.store(tensor + place, value.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def _store_sums(sums, first, second, c, in_c, channels):
    """Store what this program has summed over its positions; ``sums`` is (2, spans, channels)."""
    place = tl.program_id(1) * channels + c
    tl.store(sums + place, tl.sum(first, 0), mask=in_c)
    tl.store(sums + tl.num_programs(1) * channels + place, tl.sum(second, 0), mask=in_c)


@triton.jit
def _add_spans(sums, c, in_c, spans, channels, block_c: tl.constexpr, block_n: tl.constexpr):
    """Return both sums over all positions."""
    first = tl.zeros([block_n, block_c], tl.float32)
    second = tl.zeros([block_n, block_c], tl.float32)
    for start in range(0, spans, block_n):
        n = start + tl.arange(0, block_n)
        mask = (n < spans)[:, None] & in_c[None, :]
        place = (n * channels)[:, None] + c[None, :]
        first += tl.load(sums + place, mask=mask, other=0.0)
        second += tl.load(sums + spans * channels + place, mask=mask, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _factors(weight, bias, mean, variance, c, in_c, eps):
    """Load the channels' mean, 1 / deviation, factor and summand."""
    inverse = 1.0 / tl.sqrt(tl.load(variance + c, mask=in_c, other=1.0).to(tl.float32) + eps)
    factor = tl.load(weight + c, mask=in_c, other=0.0).to(tl.float32) * inverse
    return (tl.load(mean + c, mask=in_c, other=0.0).to(tl.float32), inverse, factor,
            tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32))


@triton.jit
def _moments(x, sums, total, spatial, channels, xn, xc, xs, steps, block_c: tl.constexpr, block_s: tl.constexpr):
    c, in_c = _channels(channels, block_c)
    # Sums of differences to the first value: the plain sum of squares would cancel where |mean| >> deviation.
    first = tl.load(x + c * xc, mask=in_c, other=0.0).to(tl.float32)
    shifts = tl.zeros([block_s, block_c], tl.float32)
    squares = tl.zeros([block_s, block_c], tl.float32)
    for step in range(steps):
        i, in_s = _positions(step, steps, total, block_s)
        mask = in_s[:, None] & in_c[None, :]
        value = _load(x, i // spatial, i % spatial, c, xn, xc, xs, mask)
        difference = tl.where(mask, value - first[None, :], 0.0)
        shifts += difference
        squares += difference * difference
    _store_sums(sums, shifts, squares, c, in_c, channels)


@triton.jit
def _statistics(x, sums, mean, variance, running_mean, running_var, momentum, spans, total, channels, xc,
                tracks: tl.constexpr, block_c: tl.constexpr, block_n: tl.constexpr):
    c, in_c = _channels(channels, block_c)
    first = tl.load(x + c * xc, mask=in_c, other=0.0).to(tl.float32)
    shifts, squares = _add_spans(sums, c, in_c, spans, channels, block_c, block_n)
    shift = shifts / total
    new_mean = first + shift
    new_variance = tl.maximum(squares / total - shift * shift, 0.0)
    tl.store(mean + c, new_mean, mask=in_c)
    tl.store(variance + c, new_variance, mask=in_c)
    if tracks:
        old = tl.load(running_mean + c, mask=in_c, other=0.0).to(tl.float32)
        tl.store(running_mean + c, (old + momentum * (new_mean - old)).to(running_mean.dtype.element_ty), mask=in_c)
        old = tl.load(running_var + c, mask=in_c, other=0.0).to(tl.float32)
        unbiased = new_variance * (total / (total - 1))
        tl.store(running_var + c, (old + momentum * (unbiased - old)).to(running_var.dtype.element_ty), mask=in_c)


@triton.jit
def _normalize_relu(x, weight, bias, mean, variance, out, total, spatial, channels, xn, xc, xs, on, oc, os,
                    eps, scale, steps, block_c: tl.constexpr, block_s: tl.constexpr):
    c, in_c = _channels(channels, block_c)
    center, _, factor, beta = _factors(weight, bias, mean, variance, c, in_c, eps)
    for step in range(steps):
        i, in_s = _positions(step, steps, total, block_s)
        mask = in_s[:, None] & in_c[None, :]
        n, s = i // spatial, i % spatial
        value = (_load(x, n, s, c, xn, xc, xs, mask) - center[None, :]) * factor[None, :] + beta[None, :]
        value = tl.where(value < 0.0, 0.0, value) * scale  # keeps NaN, which a maximum may drop
        _store(out, value, n, s, c, on, oc, os, mask)


@triton.jit
def _load_gradient(grad, x, n, s, c, gn, gc, gs, xn, xc, xs, mask, center, inverse, factor, beta, scale):
    """Return the gradient before the ReLU, and the normalised x; the sign is that of the forward, bit for bit."""
    difference = _load(x, n, s, c, xn, xc, xs, mask) - center[None, :]
    positive = difference * factor[None, :] + beta[None, :] > 0.0
    h = tl.where(positive & mask, _load(grad, n, s, c, gn, gc, gs, mask) * scale, 0.0)
    return h, difference * inverse[None, :]


@triton.jit
def _gradient_sums(grad, x, weight, bias, mean, variance, sums, total, spatial, channels, gn, gc, gs, xn, xc, xs,
                   eps, scale, steps, block_c: tl.constexpr, block_s: tl.constexpr):
    c, in_c = _channels(channels, block_c)
    center, inverse, factor, beta = _factors(weight, bias, mean, variance, c, in_c, eps)
    products = tl.zeros([block_s, block_c], tl.float32)
    gradients = tl.zeros([block_s, block_c], tl.float32)
    for step in range(steps):
        i, in_s = _positions(step, steps, total, block_s)
        mask = in_s[:, None] & in_c[None, :]
        h, normalized = _load_gradient(grad, x, i // spatial, i % spatial, c, gn, gc, gs, xn, xc, xs, mask,
                                       center, inverse, factor, beta, scale)
        products += h * normalized
        gradients += h
    _store_sums(sums, products, gradients, c, in_c, channels)


@triton.jit
def _parameter_gradients(sums, grad_weight, grad_bias, spans, channels,
                         block_c: tl.constexpr, block_n: tl.constexpr):
    c, in_c = _channels(channels, block_c)
    products, gradients = _add_spans(sums, c, in_c, spans, channels, block_c, block_n)
    tl.store(grad_weight + c, products, mask=in_c)
    tl.store(grad_bias + c, gradients, mask=in_c)


@triton.jit
def _input_gradient(grad, x, weight, bias, mean, variance, grad_weight, grad_bias, grad_x, total, spatial, channels,
                    gn, gc, gs, xn, xc, xs, dn, dc, ds, eps, scale, steps,
                    block_c: tl.constexpr, block_s: tl.constexpr):
    c, in_c = _channels(channels, block_c)
    center, inverse, factor, beta = _factors(weight, bias, mean, variance, c, in_c, eps)
    mean_product = tl.load(grad_weight + c, mask=in_c, other=0.0).to(tl.float32) / total
    mean_gradient = tl.load(grad_bias + c, mask=in_c, other=0.0).to(tl.float32) / total
    for step in range(steps):
        i, in_s = _positions(step, steps, total, block_s)
        mask = in_s[:, None] & in_c[None, :]
        n, s = i // spatial, i % spatial
        h, normalized = _load_gradient(grad, x, n, s, c, gn, gc, gs, xn, xc, xs, mask,
                                       center, inverse, factor, beta, scale)
        value = factor[None, :] * (h - mean_gradient[None, :] - normalized * mean_product[None, :])
        _store(grad_x, value, n, s, c, dn, dc, ds, mask)


class _Grid(NamedTuple):
    """The division of a tensor (N, C, H, W) among programs."""

    total: int
    spatial: int
    channels: int
    block_c: int
    block_s: int
    steps: int
    spans: int

    @classmethod
    def of(cls, x: Tensor) -> '_Grid':
        """Return the division in which neighbours in memory lie in one tile."""
        n, channels, height, width = x.shape
        total = n * height * width
        block_c = 1 if x.stride(1) != 1 or channels == 1 else 32 if channels <= 32 else 64
        block_s = TILE // block_c
        spans = triton.cdiv(PROGRAMS, triton.cdiv(channels, block_c))
        steps = triton.cdiv(total, spans * block_s)
        return cls(total, height * width, channels, block_c, block_s, steps, triton.cdiv(total, steps * block_s))

    @property
    def programs(self) -> tuple[int, int]:
        """(blocks of channels, spans)."""
        return triton.cdiv(self.channels, self.block_c), self.spans

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(positions, positions of an image, channels)."""
        return self.total, self.spatial, self.channels

    def sums(self, x: Tensor) -> Tensor:
        """Return memory for two sums over each span."""
        return x.new_empty((2, self.spans, self.channels), dtype=torch.float32)

    def add_spans(self, kernel: Any, *arguments: Any) -> None:
        """Run a kernel that adds up the spans."""
        kernel[(triton.cdiv(self.channels, 16),)](*arguments, 16, 128)


def batch_norm_relu(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what ``ops/batch_norm.py`` defines, and return the batch's mean and variance, too."""
    x = _collapsible(x)
    grid, out = _Grid.of(x), torch.empty_like(x)
    sums, tracks = grid.sums(x), running_mean is not None and running_var is not None
    mean, variance = sums.new_empty(2, grid.channels)
    _moments[grid.programs](x, sums, *grid.sizes, *_strides(x), grid.steps, grid.block_c, grid.block_s)
    grid.add_spans(_statistics, x, sums, mean, variance, running_mean if tracks else mean,
                   running_var if tracks else variance, momentum, grid.spans, grid.total, grid.channels, x.stride(1),
                   tracks)
    _normalize_relu[grid.programs](x, weight, bias, mean, variance, out, *grid.sizes, *_strides(x), *_strides(out),
                                   eps, scale, grid.steps, grid.block_c, grid.block_s)
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
    """Compute the gradients of ``x``, ``weight`` and ``bias``."""
    grad, x = _collapsible(grad), _collapsible(x)
    grid, grad_x = _Grid.of(x), torch.empty_like(x)
    sums = grid.sums(x)
    grad_weight, grad_bias = sums.new_empty(2, grid.channels)
    norm, strides = (weight, bias, mean, variance), (*_strides(grad), *_strides(x))
    _gradient_sums[grid.programs](grad, x, *norm, sums, *grid.sizes, *strides, eps, scale, grid.steps,
                                  grid.block_c, grid.block_s)
    grid.add_spans(_parameter_gradients, sums, grad_weight, grad_bias, grid.spans, grid.channels)
    _input_gradient[grid.programs](grad, x, *norm, grad_weight, grad_bias, grad_x, *grid.sizes, *strides,
                                   *_strides(grad_x), eps, scale, grid.steps, grid.block_c, grid.block_s)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


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

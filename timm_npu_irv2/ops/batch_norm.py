r"""BatchNorm and ReLU as one operator: $y = s \cdot \max(0,\; \gamma \hat x + \beta)$.

Here $\hat x = (x - \mu) / \sqrt{v + \epsilon}$, and $\mu$ and $v$ are the mean and the variance of a channel over the
batch (Ioffe & Szegedy, 2015, https://arxiv.org/abs/1502.03167). With $g$ the gradient of $y$,
$h = s \cdot g \cdot [y > 0]$ and bars for means over the batch, $\partial\beta = \sum h$,
$\partial\gamma = \sum h \hat x$ and
$\partial x = \gamma\,(h - \bar h - \hat x\,\overline{h \hat x}) / \sqrt{v + \epsilon}$.

ATen computes it with two kernels in either direction, with a tensor between them that is written and read again. The
Triton kernels (``_triton.py``) need no such tensor. The backward computes from $x$ once more where the ReLU was
positive, so it reads neither $y$ nor a mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import device as devices
from ._kernels import triton_kernels
from .activation import scaled_relu

__all__ = ['batch_norm_relu', 'batch_norm_relu_reference']


def batch_norm_relu_reference(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute, in plain operations, the output and the batch's mean and (biased) variance, (C,) each."""
    exact = x.to(weight.dtype)
    variance, mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    shape = (1, -1, 1, 1)
    normalized = (exact - mean.view(shape)) * torch.rsqrt(variance.view(shape) + eps)
    out = torch.relu(normalized * weight.view(shape) + bias.view(shape)) * scale
    return out.to(x.dtype), mean, variance


def batch_norm_relu(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        scale: float = 1.0,
) -> Tensor:
    """Compute scale * relu(batch_norm(x)), and update the running statistics in training.

    Args:
        x: Input (N, C, H, W).
        weight: Factors (C,), or None.
        bias: Summands (C,), or None.
        running_mean: Running mean (C,), or None.
        running_var: Running variance (C,), or None.
        training: Use the batch's statistics.
        momentum: Weight of the batch's statistics in the new running ones.
        eps: Constant added to the variance.
        scale: Positive factor of the output.
    """
    if not training or weight is None or bias is None or triton_kernels() is None:
        x = F.batch_norm(_without_gaps(x), running_mean, running_var, weight, bias, training, momentum, eps)
        return scaled_relu(x, scale, inplace=True)
    out, mean, variance = _fused(x, weight, bias, eps, scale)
    if running_mean is not None and running_var is not None:
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(variance.to(running_var.dtype) * (count / (count - 1)), momentum)
    return out


def _without_gaps(x: Tensor) -> Tensor:
    if not devices.backend_of(x).slow_slices:
        return x
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    channels_last = x.stride(1) == 1 and x.shape[2:].numel() > 1  # a single position has either layout
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@torch.library.custom_op('timm_npu_irv2::batch_norm_relu', mutates_args=())
def _fused(x: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == x.shape[1]:
        raise ValueError(f'BatchNorm in training needs more than one value per channel, got shape {tuple(x.shape)}.')
    kernels = triton_kernels()
    assert kernels is not None, 'the operator exists as a Triton kernel only'
    return kernels.batch_norm_relu(x, weight, bias, eps, scale)


@_fused.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


@torch.library.custom_op('timm_npu_irv2::batch_norm_relu_backward', mutates_args=())
def _fused_backward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = triton_kernels()
    assert kernels is not None, 'the operator exists as a Triton kernel only'
    return kernels.batch_norm_relu_backward(grad, x, weight, bias, mean, variance, eps, scale)


@_fused_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    x, weight, bias, ctx.eps, ctx.scale = inputs
    _, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.save_for_backward(x, weight, bias, mean, variance)


def _backward(ctx, grad: Tensor, *_: Tensor) -> tuple:
    return *_fused_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.scale), None, None


_fused.register_autograd(_backward, setup_context=_setup_context)

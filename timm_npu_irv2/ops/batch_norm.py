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

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    if x.numel() == x.shape[1]:
        raise ValueError(f'BatchNorm in training needs more than one value per channel, got shape {tuple(x.shape)}.')
    return _BatchNormReLU.apply(x, weight, bias, running_mean, running_var, momentum, eps, scale)


def _without_gaps(x: Tensor) -> Tensor:
    if not devices.backend_of(x).slow_slices:
        return x
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    channels_last = x.stride(1) == 1 and x.shape[2:].numel() > 1  # a single position has either layout
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
            ctx,
            x: Tensor,
            weight: Tensor,
            bias: Tensor,
            running_mean: Tensor | None,
            running_var: Tensor | None,
            momentum: float,
            eps: float,
            scale: float,
    ) -> Tensor:
        kernels: Any = triton_kernels()
        out, mean, variance = kernels.batch_norm_relu(x, weight, bias, running_mean, running_var, momentum, eps, scale)
        if running_mean is not None and running_var is not None:
            torch.autograd.graph.increment_version((running_mean, running_var))  # the kernels write without autograd
        ctx.save_for_backward(x, weight, bias, mean, variance)
        ctx.eps, ctx.scale = eps, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernels: Any = triton_kernels()
        found = kernels.batch_norm_relu_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.scale)
        return *found, None, None, None, None, None

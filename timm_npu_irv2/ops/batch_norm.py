r"""BatchNorm and ReLU as one operator: $y = s \cdot \max(0,\; \gamma \hat x + \beta)$.

Here $\hat x = (x - \mu) / \sqrt{v + \epsilon}$, and $\mu$ and $v$ are the mean and the variance of a channel over the
batch (Ioffe & Szegedy, 2015, https://arxiv.org/abs/1502.03167). With $g$ the gradient of $y$,
$h = s \cdot g \cdot [y > 0]$ and bars for means over the batch, $\partial\beta = \sum h$,
$\partial\gamma = \sum h \hat x$ and
$\partial x = \gamma\,(h - \bar h - \hat x\,\overline{h \hat x}) / \sqrt{v + \epsilon}$.

ATen has it as two kernels in either direction, with a tensor between them that is written and read again; the Triton
kernels (``_triton.py``) do without. What the ReLU let through is computed from $x$ once more, so the backward reads
neither $y$ nor a mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import device as devices
from ._library import LIBRARY, triton_kernels
from .activation import scaled_relu, scaled_relu_backward

__all__ = ['batch_norm_relu', 'batch_norm_relu_reference']


def batch_norm_relu_reference(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator in plain tensor operations: the output, and the batch's mean and (biased) variance, (C,) each."""
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
    """scale * relu(batch_norm(x)), with the running statistics updated in training.

    Args:
        x: (N, C, H, W).
        weight, bias: (C,), or None.
        running_mean, running_var: (C,), or None.
        training: Use the batch's statistics.
        momentum: By how much the running statistics move towards the batch's.
        eps: Added to the variance.
        scale: What the output is multiplied by.
    """
    if not training or weight is None or triton_kernels() is None or torch.compiler.is_compiling():
        x = F.batch_norm(_without_gaps(x), running_mean, running_var, weight, bias, training, momentum, eps)
        return scaled_relu(x, scale, inplace=True)
    out, mean, variance = torch.ops.timm_npu_irv2.batch_norm_relu(x, weight, bias, eps, scale)
    if running_mean is not None:
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(variance.to(running_var.dtype) * (count / (count - 1)), momentum)
    return out


def _without_gaps(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not devices.backend_of(x).slow_slices:
        return x
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    channels_last = x.stride(1) == 1 and x.shape[2:].numel() > 1  # a single position has either layout
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == x.shape[1]:
        raise ValueError(f'BatchNorm in training needs more than one value per channel, got shape {tuple(x.shape)}.')
    kernels = triton_kernels()
    if kernels is not None:
        return kernels.batch_norm_relu(x, weight, bias, eps, scale)
    out, mean, inverse_deviation = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    return scaled_relu(out, scale, inplace=True), mean, inverse_deviation.pow(-2) - eps


def _backward_kernel(
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
    if kernels is not None:
        return kernels.batch_norm_relu_backward(grad, x, weight, bias, mean, variance, eps, scale)
    out = F.batch_norm(x, mean, variance, weight, bias, eps=eps).relu_()
    return torch.ops.aten.native_batch_norm_backward(
        scaled_relu_backward(grad, out, scale), x, weight, None, None, mean, torch.rsqrt(variance + eps), True, eps,
        [True, True, True],
    )


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    x, weight, bias, ctx.eps, ctx.scale = inputs
    _, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.save_for_backward(x, weight, bias, mean, variance)


def _backward(ctx, grad: Tensor, *_: Tensor) -> tuple:
    grads = torch.ops.timm_npu_irv2.batch_norm_relu_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.scale)
    return *grads, None, None


_STATISTICS = 'Tensor mean, Tensor variance'
LIBRARY.define(f'batch_norm_relu(Tensor x, Tensor weight, Tensor bias, float eps, float scale) '
               f'-> (Tensor out, {_STATISTICS})')
LIBRARY.define(f'batch_norm_relu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, {_STATISTICS}, float eps, '
               'float scale) -> (Tensor, Tensor, Tensor)')
for _name, _kernel, _fake in (
        ('batch_norm_relu', _forward, _fake_forward),
        ('batch_norm_relu_backward', _backward_kernel, _fake_backward),
):
    LIBRARY.impl(_name, _kernel, 'CompositeExplicitAutograd')
    torch.library.register_fake(f'timm_npu_irv2::{_name}', _fake, lib=LIBRARY)
torch.library.register_autograd(
    'timm_npu_irv2::batch_norm_relu', _backward, setup_context=_setup_context, lib=LIBRARY,
)

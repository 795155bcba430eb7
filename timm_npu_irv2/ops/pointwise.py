r"""A 1×1 convolution as a product of matrices: $Y_n = W X_n + b$ for image $n$, with $X_n$ of shape (C, H·W).

An NPU's convolutions take NC1HWC0 tensors: input, output and both gradients are converted on the way, which moves three
times the bytes of the convolution itself. Its products take tensors as they are. With $G$ the gradient of $Y$,
$\partial X_n = W^\top G_n$, $\partial b = \sum_{n,p} G$ and $\partial W = \sum_n G_n X_n^\top$, where the sum over the
images is taken over a product for each, or by one product over tensors with the channels first, whichever moves less.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import device as devices

__all__ = ['pointwise_convolution']


def pointwise_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a 1×1 convolution by products of matrices.

    It can be differentiated once.

    Args:
        x: Input (N, C, H, W).
        weight: Weight (O, C, 1, 1), of the same dtype.
        bias: Bias (O,) of the same dtype, or None.

    Returns:
        Output (N, O, H, W) in the layout of ``x``.
    """
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return _Pointwise.apply(x, weight, bias)


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        columns = x.flatten(2)
        ctx.save_for_backward(columns, weight)
        out = torch.matmul(weight.flatten(1), columns)
        if bias is not None:
            out += bias.unsqueeze(1)
        return out.view(*out.shape[:2], *x.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        columns, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        height, width = grad.shape[2:]
        grad = grad.flatten(2)
        grad_x = grad_weight = grad_bias = None
        if wants_x:
            grad_x = torch.matmul(weight.flatten(1).t(), grad).unflatten(2, (height, width))
        if wants_weight:
            grad_weight = _weight_gradient(grad, columns, weight.flatten(1)).view_as(weight)
        if wants_bias:
            grad_bias = grad.sum((0, 2))
        return grad_x, grad_weight, grad_bias


def _weight_gradient(grad: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    """Return the sum over n of grad[n] (O, P) times the transpose of columns[n] (C, P), of the shape of ``weight``."""
    outputs, positions = grad.shape[1:]
    channels = columns.shape[1]
    if outputs * channels < positions * (outputs + channels):  # elements of a product for each image, and of the copies
        if devices.backend_of(grad).sums_products:
            return torch.addbmm(weight, grad, columns.transpose(1, 2), beta=0)  # with 0 the weight is not read
        return torch.matmul(grad, columns.transpose(1, 2)).sum(0)
    return torch.mm(grad.transpose(0, 1).flatten(1), columns.transpose(0, 1).flatten(1).t())

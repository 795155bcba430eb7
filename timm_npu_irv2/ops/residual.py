r"""The end of a residual block: $y = \max(0,\; x + s \cdot b)$.

Inception-ResNet scales the residual branch $b$ by a constant $s$ before it adds it to the block's input $x$
(Szegedy et al., 2016, https://arxiv.org/abs/1602.07261, section 3.3). Written out, that is a multiplication, an
addition and a ReLU: three passes over the largest tensors of the network. Here it is an addition with a factor and a
ReLU in place, or one Triton kernel.

With $g$ the gradient of $y$ and $m = g \cdot [y > 0]$ the gradients are $\partial x = m$ and $\partial b = s \cdot m$.
The mask is read off the output, so the backward needs no other tensor, and the next block keeps the output anyway: the
operator saves nothing of its own. With $s = 1$ both gradients are the same tensor.

It is an autograd function and not a registered operator, which takes twice the time on the host: only eager code calls
it (see ``shortcuts.py``), so no tracer needs a schema.
"""

from typing import Any

import torch
from torch import Tensor

from ._kernels import triton_kernels

__all__ = ['scaled_residual_relu', 'scaled_residual_relu_reference']


def scaled_residual_relu_reference(x: Tensor, branch: Tensor, scale: float) -> Tensor:
    """Compute relu(x + scale * branch) in plain tensor operations."""
    return torch.relu(torch.add(x, branch, alpha=scale))


def scaled_residual_relu(x: Tensor, branch: Tensor, scale: float) -> Tensor:
    """Compute relu(x + scale * branch).

    Args:
        x: Input of the block, of any shape.
        branch: Output of the residual branch, of the same shape.
        scale: Constant factor of the branch.

    Returns:
        A tensor of that shape, in the dtype that ``x`` and ``branch`` promote to.
    """
    kernels = triton_kernels()
    if kernels is None:
        # PyTorch's own gradient keeps no more than the operator does. ATen's _add_relu would be five kernels on an NPU,
        # since aclnnAddRelu computes in float32; on a CPU it turns NaN into 0, which would hide a diverged run.
        return torch.add(x, branch, alpha=scale).relu_()
    if torch.is_grad_enabled():
        return _ScaledResidualReLU.apply(x, branch, scale)
    return kernels.scaled_residual_relu(x, branch, scale)


class _ScaledResidualReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, branch: Tensor, scale: float) -> Tensor:
        kernels: Any = triton_kernels()
        output = kernels.scaled_residual_relu(x, branch, scale)
        ctx.scale, ctx.dtypes = scale, (x.dtype, branch.dtype)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (output,) = ctx.saved_tensors
        x_dtype, branch_dtype = ctx.dtypes
        if ctx.scale != 1:
            kernels: Any = triton_kernels()
            return *kernels.scaled_residual_relu_backward(grad, output, ctx.scale, x_dtype, branch_dtype), None
        masked = torch.ops.aten.threshold_backward.default(grad, output, 0)
        return masked.to(x_dtype), masked.to(branch_dtype), None

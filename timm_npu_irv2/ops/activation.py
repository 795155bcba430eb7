r"""A scaled ReLU, $y = s \cdot \max(0, x)$, in one pass forward and one backward.

ELU is $s\,x$ for $x > 0$ and $s\,\alpha(e^x - 1)$ elsewhere (Clevert et al., 2016, https://arxiv.org/abs/1511.07289;
$s$ came with SELU, Klambauer et al., 2017, https://arxiv.org/abs/1706.02515). With $\alpha = 0$ it is the scaled ReLU,
and every device has it as one kernel in either direction: aclnnElu and aclnnEluBackward on the NPU. A CPU, which
computes the exponential all the same, gains nothing by it; there it is written out.
"""

import torch
from torch import Tensor

from .. import device as devices

__all__ = ['scaled_relu', 'scaled_relu_backward', 'scaled_relu_reference']


def scaled_relu_reference(x: Tensor, scale: float) -> Tensor:
    """scale * relu(x), in plain tensor operations."""
    return torch.relu(x) * scale


def scaled_relu(x: Tensor, scale: float, inplace: bool = False) -> Tensor:
    """scale * relu(x).

    Args:
        x: Of any shape and floating dtype.
        scale: A positive constant.
        inplace: Overwrite ``x``.
    """
    if torch.jit.is_scripting() or torch.compiler.is_compiling():
        return torch.relu(x) * scale
    if scale == 1.0:
        return torch.relu_(x) if inplace else torch.relu(x)
    if not devices.backend_of(x).cheap_elu:
        return (torch.relu_(x) if inplace else torch.relu(x)) * scale
    # What F.elu calls; F.elu itself leaves the scale out.
    return torch._C._nn.elu_(x, 0.0, scale) if inplace else torch._C._nn.elu(x, 0.0, scale)


def scaled_relu_backward(grad: Tensor, output: Tensor, scale: float) -> Tensor:
    """The gradient of the input from that of the output, and the output."""
    if scale == 1.0:
        return torch.ops.aten.threshold_backward.default(grad, output, 0)
    return torch.ops.aten.elu_backward.default(grad, 0.0, scale, 1.0, True, output)

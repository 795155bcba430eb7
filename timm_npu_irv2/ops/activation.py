r"""A scaled ReLU, $y = s \cdot \max(0, x)$, in one pass forward and one backward.

ELU is $s\,x$ for $x > 0$ and $s\,\alpha(e^x - 1)$ elsewhere (Clevert et al., 2016, https://arxiv.org/abs/1511.07289;
$s$ came with SELU, Klambauer et al., 2017, https://arxiv.org/abs/1706.02515). With $\alpha = 0$ it is the scaled ReLU,
and every device has it as one kernel in either direction: aclnnElu and aclnnEluBackward on the NPU. A CPU computes the
exponential all the same and gains nothing, so there the formula is written out.
"""

import torch
from torch import Tensor

from .. import device as devices

__all__ = ['scaled_relu', 'scaled_relu_reference']


def scaled_relu_reference(x: Tensor, scale: float) -> Tensor:
    """Compute scale * relu(x) in plain tensor operations."""
    return torch.relu(x) * scale


def scaled_relu(x: Tensor, scale: float, inplace: bool = False) -> Tensor:
    """Compute scale * relu(x).

    Args:
        x: Tensor of any shape and floating dtype.
        scale: Positive constant.
        inplace: Overwrite ``x``.
    """
    if scale == 1.0:
        return torch.relu_(x) if inplace else torch.relu(x)
    if not devices.backend_of(x).cheap_elu:
        return (torch.relu_(x) if inplace else torch.relu(x)) * scale
    # F.elu calls these, but has no argument for the scale.
    return torch.ops.aten.elu_(x, 0.0, scale) if inplace else torch.ops.aten.elu(x, 0.0, scale)

r"""A convolution with what follows it in inference: $y = \mathrm{relu}(W * x + b + r)$, the last two optional.

On a CPU it is one operator of oneDNN, with the weights in the layout that oneDNN prefers, as ``torch.compile`` with
freezing does it. Bias, addition and ReLU are computed while the output is still in registers. It is a shortcut:
elsewhere, and where somebody looks (see ``shortcuts.py``) or wants a gradient, the formula is written out.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import device as devices
from ..shortcuts import is_eager

__all__ = ['FusedConvolution']

MAX_SHAPES = 16  # whose packed weights a layer remembers


class FusedConvolution(nn.Conv2d):
    """relu(conv(x) + bias + residual), for inference; ``relu`` and the residual are optional.

    The packed weights are copies, made by the first call with an input of a shape, and no part of the state dict.
    oneDNN prefers another layout of a few weights for a single image than for several.
    """

    def __init__(self, *args, relu: bool = True, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.relu = relu
        self._packed: dict[torch.Size, Tensor] = {}  # by the shape of the input
        self._packed_from: tuple[int, int] | None = None  # address and version of the weights

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        """Apply to ``x`` (N, in_channels, H, W); ``residual``, of the output's shape, may be overwritten."""
        if torch.jit.is_scripting():
            return self._written_out(x, residual)
        if self._is_fusible(x):
            return self._fused(x, residual)
        return self._written_out(x, residual)

    def _is_fusible(self, x: Tensor) -> bool:
        if not is_eager(x) or x.dtype not in devices.backend_of(x).fused_convolution_dtypes:
            return False
        if self.weight.is_inference():  # its changes are not counted
            return False
        return not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad))

    def _fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        packed = self._packed_weights(x.shape)
        geometry = self.bias, self.padding, self.stride, self.dilation, self.groups
        relu = 'relu' if self.relu else None
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(x, packed, *geometry, relu or 'none', [], '')
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, x, packed, *geometry, 'add', 1.0, relu, [], '')

    def _packed_weights(self, shape: torch.Size) -> Tensor:
        source = self.weight.data_ptr(), self.weight._version
        if source != self._packed_from or len(self._packed) >= MAX_SHAPES:
            self._packed = {}
            self._packed_from = source
        packed = self._packed.get(shape)
        if packed is None:
            packed = self._packed[shape] = self._pack(shape)
        return packed

    def _pack(self, shape: torch.Size) -> Tensor:
        """Return the weights in the layout for an input of ``shape``, from ``_packed`` if that layout is there."""
        reorder, layout = torch._C._nn.mkldnn_reorder_conv2d_weight, torch.ops.mkldnn._get_mkldnn_serialized_md
        geometry = self.padding, self.stride, self.dilation, self.groups
        packed = reorder(self.weight.detach().to_mkldnn(), *geometry, shape)  # type: ignore[call-arg, arg-type]  # stubs
        return next((known for known in list(self._packed.values()) if layout(known).equal(layout(packed))), packed)

    def _written_out(self, x: Tensor, residual: Optional[Tensor]) -> Tensor:
        out = self._conv_forward(x, self.weight, self.bias)
        if residual is not None:
            out = out + residual
        return F.relu(out) if self.relu else out

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_packed': {}, '_packed_from': None}  # copies and pickles pack their own weights

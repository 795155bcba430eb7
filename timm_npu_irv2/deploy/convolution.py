r"""A convolution with what follows it in inference: $y = \mathrm{relu}(W * x + b + r)$, the last two optional.

On a CPU it is one operator of oneDNN, with the weights in the layout that oneDNN wants: what ``torch.compile`` with
freezing uses too. Bias, addition and ReLU are done while the output is still in registers. Elsewhere, under a compiler
and where a gradient is wanted it is written out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import device as devices

__all__ = ['FusedConvolution']


class FusedConvolution(nn.Conv2d):
    """relu(conv(x) + bias + residual), for inference; ``relu`` and the residual are optional.

    The packed weights are copies, made by the first call with an input of a shape, and no part of the state dict.
    oneDNN wants a few layers otherwise for a single image than for several, and would pack them in each call.
    """

    def __init__(self, *args, relu: bool = True, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.relu = relu
        self._packed: dict[torch.Size, Tensor] = {}  # by the shape of the input

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply to ``x`` (N, in_channels, H, W); ``residual``, of the output's shape, may be overwritten."""
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return self._written_out(x, residual)
        if x.dtype not in devices.backend_of(x).fused_convolution_dtypes:
            return self._written_out(x, residual)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return self._written_out(x, residual)
        packed = self._packed.get(x.shape)
        if packed is None:
            packed = self._packed[x.shape] = self._pack(x.shape)
        geometry = self.bias, self.padding, self.stride, self.dilation, self.groups
        relu = 'relu' if self.relu else None
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(x, packed, *geometry, relu or 'none', [], '')
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, x, packed, *geometry, 'add', 1.0, relu, [], '')

    def _pack(self, shape: torch.Size) -> Tensor:
        """The weights in the layout for an input of ``shape``: one of those that there are already, if it has it."""
        packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
            self.weight.detach().to_mkldnn(), self.padding, self.stride, self.dilation, self.groups, shape)
        layout = torch.ops.mkldnn._get_mkldnn_serialized_md
        return next((known for known in list(self._packed.values()) if layout(known).equal(layout(packed))), packed)

    def _written_out(self, x: Tensor, residual: Tensor | None) -> Tensor:
        out = super().forward(x)
        if residual is not None:
            out = out + residual
        return F.relu(out) if self.relu else out

    def _apply(self, *args, **kwargs) -> 'FusedConvolution':
        self._packed = {}  # the weights are about to become others
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args) -> None:
        self._packed = {}
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_packed': {}}  # copies and pickles pack their own

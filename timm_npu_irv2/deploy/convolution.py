r"""A convolution with what follows it in inference: $y = \mathrm{relu}(W * x + b + r)$, the last two optional.

On a CPU it is one operator of oneDNN, with the weights in the layout that oneDNN prefers, as ``torch.compile`` with
freezing does it; on a GPU, in 16 bits, one of cuDNN. Bias, addition and ReLU are computed while the output is still in
registers. It is a shortcut: elsewhere, and where somebody looks (see ``shortcuts.py``) or wants a gradient, the formula
is written out. ``torch.compile`` fuses the formula on a CPU; on a GPU it cannot, and gets cuDNN's convolution as an
operator of this package, whose inputs it leaves in their layout (those of ATen's operator it would copy).
"""

from typing import Any, List, Optional

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
        if is_eager(x):
            if self._is_fusible(x):
                return self._fused(x, residual)
        elif torch.compiler.is_dynamo_compiling() and not _is_exporting() and self._is_fusible_by_compiler(x):
            return _convolution_relu(x, self.weight, self.bias, residual, *self._geometry)
        return self._written_out(x, residual)

    def _is_fusible(self, x: Tensor) -> bool:
        if x.dtype not in devices.backend_of(x).fused_convolution_dtypes:
            return False
        if self.weight.is_inference():  # its changes are not counted
            return False
        return not self._has_gradient(x)

    def _is_fusible_by_compiler(self, x: Tensor) -> bool:
        return self.relu and _has_cudnn(x.device.type, x.dtype) and not self._has_gradient(x)

    def _has_gradient(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)

    @property
    def _geometry(self) -> Any:
        return self.stride, self.padding, self.dilation, self.groups

    def _fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if devices.backend_of(x).fused_convolutions == 'onednn':
            return self._by_onednn(x, residual)
        if not self.relu:
            return self._written_out(x, residual)  # cuDNN's has a ReLU
        return _by_cudnn(x, self.weight, self.bias, residual, *self._geometry)

    def _by_onednn(self, x: Tensor, residual: Tensor | None) -> Tensor:
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


def _is_exporting() -> bool:
    # Before, Dynamo took it for is_compiling: there a strict export for a GPU contains an operator of this package.
    return _DYNAMO_KNOWS_EXPORTS and torch.compiler.is_exporting()


_DYNAMO_KNOWS_EXPORTS = torch.__version__ >= '2.13'


@torch.compiler.assume_constant_result
def _has_cudnn(device_type: str, dtype: torch.dtype) -> bool:
    """Return True if convolutions of ``dtype`` are fused by cuDNN."""
    backend = devices.backend(device_type)
    return backend.fused_convolutions == 'cudnn' and dtype in backend.fused_convolution_dtypes


def _by_cudnn(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *geometry: Any) -> Tensor:
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)


@torch.library.custom_op('timm_npu_irv2::convolution_relu', mutates_args=())
def _convolution_relu(
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        residual: Optional[Tensor],
        stride: List[int],
        padding: List[int],
        dilation: List[int],
        groups: int,
) -> Tensor:
    return _by_cudnn(x, weight, bias, residual, stride, padding, dilation, groups)


@_convolution_relu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, _residual: Tensor | None, *geometry: Any) -> Tensor:
    stride, padding, dilation, groups = geometry
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups).contiguous(memory_format=torch.channels_last)

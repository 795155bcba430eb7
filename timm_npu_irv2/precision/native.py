"""Precisions of torch itself: one dtype, autocast, and half-precision weights with float32 masters."""

import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from .. import device as devices
from ..errors import UserError
from ..optim import is_elementwise
from .base import Precision, dtype_name, parameters_of
from .loss_scale import FoldedScale, NoScale, StaticScale
from .masters import FlatMasters, MasterPrecision, Masters, float32_twin

__all__ = ['Autocast', 'FullPrecision', 'HalfWeights']

_logger = logging.getLogger(__name__)


class _Native(Precision):
    """The step of all precisions but apex's; those with master weights override the two empty methods."""

    def __init__(self, scaler: NoScale) -> None:
        self._scaler = scaler

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Refuse second-order optimizers where the loss is scaled."""
        if getattr(optimizer, 'is_second_order', False) and type(self._scaler) is not NoScale:
            raise UserError('second-order optimizers need unscaled derivatives: use float32 or --amp-dtype bfloat16.')
        return model, optimizer

    def step(self, loss, optimizer, *, parameters=None, clip_grad=None, clip_mode='norm', create_graph=False,
             need_update=True) -> None:
        """Run the backward pass of the scaled loss, and the step if one is due."""
        self._scaler.scale(loss).backward(create_graph=create_graph)
        if not need_update:
            return
        self._gather_gradients()
        self._scaler.unscale(optimizer)
        if clip_grad is not None:
            clipped = self._updated(optimizer, parameters, by_layer=clip_mode == 'agc')
            self._scaler.clip(optimizer, clipped, clip_grad, clip_mode)
        stepped = self._scaler.step(optimizer)
        if stepped:
            self._publish_weights()
        self.count_step(skipped=not stepped)

    def _gather_gradients(self) -> None:
        """Move the gradients of the backward pass to the parameters that the optimizer updates."""

    def _publish_weights(self) -> None:
        """Copy the updated parameters to those that the next forward uses."""

    def _updated(
            self,
            optimizer: Optimizer,
            parameters: Iterable[nn.Parameter] | None,
            by_layer: bool,
    ) -> list[nn.Parameter]:
        """Return the tensors that the optimizer updates in place of the model's ``parameters`` (all if None)."""
        return parameters_of(optimizer) if parameters is None else list(parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale's state."""
        return self._scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the loss scale's state."""
        self._scaler.load_state_dict(state_dict)


class FullPrecision(_Native):
    """O0: one dtype for weights, activations and gradients (timm's --model-dtype), and no loss scale."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__(NoScale())
        self.input_dtype = dtype or torch.float32
        self.description = dtype_name(self.input_dtype)

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Cast the model to the one dtype."""
        return super().prepare(model.to(dtype=self.input_dtype), optimizer)

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        """Cast a model that is not trained."""
        return model.to(dtype=self.input_dtype)


class Autocast(_Native):
    """O1: float32 weights; ``torch.autocast`` chooses the dtype of each operator."""

    def __init__(self, device: torch.device, dtype: torch.dtype, scaler: NoScale) -> None:
        super().__init__(scaler)
        self._device = device
        self._dtype = dtype
        self.description = f'O1, autocast {dtype_name(dtype)}{scaler.description}'

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return ``torch.autocast`` in the 16-bit type."""
        return devices.autocast(self._device, self._dtype)


class HalfWeights(MasterPrecision, _Native):
    """O2: weights in 16 bits, BatchNorm's parameters and statistics in float32, float32 masters in the optimizer.

    The masters take the places of the model's parameters in the optimizer's groups, so weight-decay exclusions, layer
    decay and the optimizer's state dict are what they would be in float32. The model takes images of any floating
    dtype and returns float32. Gradients of several backward passes are summed in the model, in 16 bits, where DDP
    finds them.
    """

    def __init__(self, dtype: torch.dtype, scaler: NoScale) -> None:
        super().__init__(scaler)
        self.input_dtype = dtype
        self.description = f'O2, {dtype_name(dtype)} weights with float32 masters{scaler.description}'

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Halve the model's weights and give the optimizer their float32 masters."""
        if getattr(optimizer, 'is_second_order', False):
            raise UserError('second-order optimizers cannot use the half weights of --opt-level O2: use O1 or O0.')
        _cast_at_the_ends(model)
        twin = float32_twin(model)
        pairs = zip(model.parameters(), twin.parameters(), strict=True)
        masters = {p: master for p, master in pairs if p is not master}
        _halve(model, self.input_dtype)
        if is_elementwise(optimizer) and any(p in masters and p.requires_grad for p in parameters_of(optimizer)):
            self.masters = self._flat_masters(twin, masters, optimizer)
        else:
            self.masters = Masters(twin, masters)
        self._trained = parameters_of(optimizer)
        self.masters.attach(optimizer)
        if hasattr(optimizer, 'sync_lookahead'):
            optimizer.sync_lookahead = self._published(optimizer.sync_lookahead)
        return model, optimizer

    def _flat_masters(
            self,
            twin: nn.Module,
            masters: dict[nn.Parameter, nn.Parameter],
            optimizer: Optimizer,
    ) -> FlatMasters:
        """Return the flat masters of an elementwise optimizer; for SGD with the scale folded in and fused kernels."""
        if not isinstance(optimizer, torch.optim.SGD):
            return FlatMasters(twin, masters)
        state_scale, options = {}, {}
        if type(self._scaler) is StaticScale:
            self._scaler = FoldedScale(self._scaler.value)
            state_scale['momentum_buffer'] = self._scaler.value
        if all(group['fused'] is None and group['foreach'] is None for group in optimizer.param_groups):
            least = min(group['momentum'] for group in optimizer.param_groups)
            lack = devices.lack_of_fused_sgd(parameters_of(optimizer)[0].device, least)
            options['fused'] = not lack
            if lack:
                _logger.info('SGD runs unfused on the flat buffers: %s.', lack)
        return FlatMasters(twin, masters, state_scale, options)

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        """Halve the weights of a model that is not trained."""
        _cast_at_the_ends(model)
        _halve(model, self.input_dtype)
        return model

    def _published(self, change: Callable[[], None]) -> Callable[[], None]:
        """Return a change of the optimizer's parameters outside ``step``, followed by that of the model's weights."""
        def change_and_publish() -> None:
            change()
            self._publish_weights()
        return change_and_publish

    def _gather_gradients(self) -> None:
        self.masters.gather_gradients()

    def _publish_weights(self) -> None:
        self.masters.publish()

    def _updated(
            self,
            optimizer: Optimizer,
            parameters: Iterable[nn.Parameter] | None,
            by_layer: bool,
    ) -> list[nn.Parameter]:
        return self.masters.clipped(self._trained if parameters is None else parameters, by_layer)


def _halve(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all floating-point parameters and buffers but BatchNorm's."""
    for module in model.modules():
        if not isinstance(module, _BatchNorm):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)


def _cast_at_the_ends(model: nn.Module) -> None:
    model.register_forward_pre_hook(_cast_inputs)
    model.register_forward_hook(_cast_outputs)


def _cast_inputs(module: nn.Module, inputs: tuple) -> tuple:
    """Cast images to the dtype of the first layer: half in the model, float32 in an EMA copy."""
    return _cast(inputs, next(module.parameters()).dtype)


def _cast_outputs(module: nn.Module, inputs: tuple, outputs: Any) -> Any:
    """Cast logits to float32, in which softmax and loss are computed."""
    return _cast(outputs, torch.float32)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(_cast(v, dtype) for v in value)
    return value

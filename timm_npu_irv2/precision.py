"""Mixed precision behind one small interface: none, native autocast or half weights, apex.

The training loop knows only :class:`Precision`. Two things vary behind it: which copy of the weights the forward runs
on (:class:`FullPrecision`, :class:`Autocast`, :class:`HalfWeights`, :class:`Apex`), and what multiplies the loss so
that float16 gradients do not underflow (nothing, a constant, or a scale that follows the overflows).

The levels are those of NVIDIA's apex (https://nvidia.github.io/apex/amp.html): O0 is float32, O1 casts operator by
operator, O2 keeps convolution and linear weights in 16 bits beside float32 master weights (P. Micikevicius et al.,
Mixed Precision Training, https://arxiv.org/abs/1710.03740).
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from timm.utils import dispatch_clip_grad, unwrap_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from . import device as device_seam
from .errors import UserError
from .masters import FlatMasters, Masters, float32_twin
from .optim import gradient_holders, is_elementwise

__all__ = ['Apex', 'Autocast', 'FullPrecision', 'HalfWeights', 'Precision', 'create_precision']

OPT_LEVELS = ('O0', 'O1', 'O2')
HALF_TYPES = (torch.float16, torch.bfloat16)


def create_precision(
        device: torch.device,
        *,
        amp: bool = False,
        amp_impl: str = 'native',
        amp_dtype: torch.dtype | None = None,
        opt_level: str | None = None,
        loss_scale: float | Literal['dynamic'] | None = None,
        model_dtype: torch.dtype | None = None,
) -> 'Precision':
    """The precision that a user's options ask for.

    Args:
        device: The device the model trains on.
        amp: Mixed precision. Without it the model trains in ``model_dtype`` (float32 if that is None).
        amp_impl: 'native' (torch's own, also for O2) or 'apex'.
        amp_dtype: The 16-bit type; None takes the device's.
        opt_level: 'O0' float32, 'O1' autocast (what None means), 'O2' half weights with float32 masters.
        loss_scale: A constant, which costs no overflow check and no synchronisation; 'dynamic'; or None: dynamic
            where the 16-bit type needs a scale, none elsewhere.
        model_dtype: The dtype of all weights without mixed precision.

    Raises:
        UserError: The options contradict one another, or apex is asked for and missing.
    """
    _check_choice('--amp-impl', amp_impl, ('native', 'apex'))
    _check_choice('--opt-level', opt_level or 'O1', OPT_LEVELS)
    _check_loss_scale(loss_scale)
    if not amp:
        _check_no_amp(amp_impl, opt_level, loss_scale)
        return FullPrecision(model_dtype)
    if opt_level == 'O0' and loss_scale is not None:
        raise UserError(f'--loss-scale {loss_scale} has no effect with --opt-level O0: leave one of them out.')
    if model_dtype not in (None, torch.float32):
        raise UserError(f'--model-dtype {_name(model_dtype)} and --amp exclude each other: use one of them.')
    dtype = amp_dtype or device_seam.half_dtype(device)
    if dtype not in HALF_TYPES:
        raise UserError(f'--amp-dtype {_name(dtype)} is not a 16-bit type: use float16 or bfloat16.')
    if amp_impl == 'apex':
        if amp_dtype == torch.bfloat16:
            raise UserError('--amp-impl apex knows float16 only: use --amp-impl native with bfloat16.')
        return Apex(opt_level or 'O1', loss_scale)
    if opt_level == 'O0':
        return FullPrecision()
    scaler = _create_scaler(device, dtype, loss_scale)
    return HalfWeights(dtype, scaler) if opt_level == 'O2' else Autocast(device, dtype, scaler)


def _check_choice(option: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise UserError(f"{option} {value}: use one of {', '.join(allowed)}.")


def _check_loss_scale(loss_scale: float | str | None) -> None:
    valid = loss_scale in (None, 'dynamic') or (
        isinstance(loss_scale, int | float) and math.isfinite(loss_scale) and loss_scale > 0)
    if not valid:
        raise UserError(f"--loss-scale {loss_scale}: use a positive number (128, say) or 'dynamic'.")


def _check_no_amp(amp_impl: str, opt_level: str | None, loss_scale: float | str | None) -> None:
    """Options that mean nothing without --amp are refused, so that nobody trains in float32 unawares."""
    for option, given in (
            ('--opt-level O2', opt_level == 'O2'),
            ('--amp-impl apex', amp_impl == 'apex'),
            (f'--loss-scale {loss_scale}', loss_scale is not None),
    ):
        if given:
            raise UserError(f'{option} has no effect without --amp: add --amp, or leave {option.split()[0]} out.')


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


class Precision:
    """What the training loop asks of a precision. The order: ``prepare``, DDP, then a ``step`` per batch.

    Attributes:
        description: For logs and reports.
        input_dtype: What images should be cast to before the forward.
        skipped_steps: Optimizer steps skipped for an overflow so far. Zero unless the loss scale is dynamic.
        skipped_in_a_row: How many of the latest steps were skipped one after another.
    """

    description: str
    input_dtype: torch.dtype = torch.float32
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Cast the model, set up master weights. Called once, before DDP wraps the model and before EMA copies it."""
        return model, optimizer

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        """Cast a model that only helps to train another (a teacher), so that it takes the same images."""
        return model

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of the forward and of the loss."""
        return contextlib.nullcontext()

    def step(
            self,
            loss: Tensor,
            optimizer: Optimizer,
            *,
            parameters: Iterable[nn.Parameter] | None = None,
            clip_grad: float | None = None,
            clip_mode: str = 'norm',
            create_graph: bool = False,
            need_update: bool = True,
    ) -> None:
        """The backward pass and, if ``need_update``, one optimizer step on clipped, unscaled gradients.

        ``optimizer.zero_grad()`` stays the caller's, before the first backward pass of a step.

        Args:
            loss: A scalar, computed under :meth:`autocast`.
            optimizer: The one that :meth:`prepare` returned.
            parameters: The model's parameters that are clipped; all that the optimizer has if None.
            clip_grad: The limit of the float32 gradients; None clips nothing.
            clip_mode: 'norm', 'value' or 'agc', as in ``timm.utils.dispatch_clip_grad``.
            create_graph: Keep the graph of the gradients, for second-order optimizers.
            need_update: False accumulates gradients for a later step.
        """
        raise NotImplementedError

    def model_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The model's state dict under its ordinary names, in float32 from the masters where there are any."""
        return unwrap_model(model).state_dict()

    def load_model_state_dict(self, model: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> Any:
        """Load what :meth:`model_state_dict` gave under whatever precision; returns ``load_state_dict``'s answer."""
        return unwrap_model(model).load_state_dict(state_dict, strict=strict)

    def float32_model(self, model: nn.Module) -> nn.Module:
        """The model with the weights that the optimizer updates: what an average of weights must copy and follow.

        ``ModelEmaV3(precision.float32_model(model))``, then ``ema.update(precision.float32_model(model))``. It shares
        its parameters and its BatchNorm modules with ``model``: read it, but train, evaluate and move ``model``.
        """
        return unwrap_model(model)

    def _count(self, skipped: bool) -> None:
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def state_dict(self) -> dict[str, Any]:
        """The loss scale's state, as torch's GradScaler writes it ({} if there is none)."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave. The state of another kind of loss scale is left alone."""


class _NoScale:
    """The gradients are what they are: for float32 and bfloat16."""

    description = ''

    def scale(self, loss: Tensor) -> Tensor:
        return loss

    def unscale(self, optimizer: Optimizer) -> None:
        pass

    def clip(self, optimizer: Optimizer, parameters: Iterable[Tensor], limit: float, mode: str) -> None:
        """Clip the unscaled gradients."""
        dispatch_clip_grad(parameters, limit, mode=mode)

    def step(self, optimizer: Optimizer) -> bool:
        """Step; whether it was taken."""
        optimizer.step()
        return True

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class _StaticScale(_NoScale):
    """A constant scale: no overflow check, so no host synchronisation, as apex does it."""

    def __init__(self, value: float) -> None:
        self.value = float(value)
        self.description = f', loss scale {self.value:g}'

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.value

    @torch.no_grad()
    def unscale(self, optimizer: Optimizer) -> None:
        gradients = [p.grad for p in gradient_holders(optimizer) if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, 1 / self.value)


class _FoldedScale(_StaticScale):
    """A constant scale for SGD, which is linear in its gradients: the scale goes into its constants, at no cost.

    With g' = S·g and the momentum buffer kept S times as great, weight decay S times and learning rate 1/S times what
    the user set give the same weights, bit for bit where S is a power of two.
    """

    def unscale(self, optimizer: Optimizer) -> None:
        pass

    def clip(self, optimizer: Optimizer, parameters: Iterable[Tensor], limit: float, mode: str) -> None:
        super().unscale(optimizer)
        super().clip(optimizer, parameters, limit, mode)
        torch._foreach_mul_([p.grad for p in gradient_holders(optimizer)], self.value)

    def step(self, optimizer: Optimizer) -> bool:
        constants = [(group['lr'], group['weight_decay']) for group in optimizer.param_groups]
        try:
            for group, (lr, weight_decay) in zip(optimizer.param_groups, constants, strict=True):
                group['lr'], group['weight_decay'] = lr / self.value, weight_decay * self.value
            optimizer.step()
        finally:
            for group, (lr, weight_decay) in zip(optimizer.param_groups, constants, strict=True):
                group['lr'], group['weight_decay'] = lr, weight_decay
        return True


class _DynamicScale(_NoScale):
    """torch's GradScaler: halve the scale and skip the step after an overflow, double it after 2000 good steps."""

    description = ', dynamic loss scale'

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self._watched: _Watched | None = None

    def scale(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        self.scaler.unscale_(self._watch(optimizer))

    def step(self, optimizer: Optimizer) -> bool:
        watched = self._watch(optimizer)
        watched.stepped = False
        self.scaler.step(watched)
        self.scaler.update()
        return watched.stepped

    def _watch(self, optimizer: Optimizer) -> '_Watched':
        if self._watched is None or self._watched.optimizer is not optimizer:
            self._watched = _Watched(optimizer)
        return self._watched

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if 'scale' in state_dict:
            self.scaler.load_state_dict({'dynamic': True, **state_dict})


class _Watched:
    """An optimizer as GradScaler sees it: it tells whether the step was taken.

    It also hides that a fused torch optimizer can be handed the overflow flag. GradScaler then calls ``step`` even
    after an overflow, and a fused SGD whose very first step is skipped that way goes on with momentum buffers that
    were never written (torch 2.14, ``torch.optim.sgd._fused_sgd``).
    """

    _step_supports_amp_scaling = False

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.stepped = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [{'params': gradient_holders(self.optimizer)}]

    def step(self) -> None:
        self.stepped = True
        self.optimizer.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def _create_scaler(device: torch.device, dtype: torch.dtype, loss_scale: float | str | None) -> _NoScale:
    if loss_scale is None:
        loss_scale = 'dynamic' if dtype == torch.float16 else 1.0  # bfloat16 has float32's range
    if loss_scale == 'dynamic':
        return _DynamicScale(device_seam.grad_scaler(device))
    return _NoScale() if loss_scale == 1 else _StaticScale(loss_scale)


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group['params']]


class _Native(Precision):
    """The step that all precisions but apex's share; master weights come in through the two empty methods."""

    def __init__(self, scaler: _NoScale) -> None:
        self._scaler = scaler

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        if getattr(optimizer, 'is_second_order', False) and type(self._scaler) is not _NoScale:
            raise UserError('second-order optimizers need unscaled derivatives: use float32 or --amp-dtype bfloat16.')
        return model, optimizer

    def step(self, loss, optimizer, *, parameters=None, clip_grad=None, clip_mode='norm', create_graph=False,
             need_update=True) -> None:
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
        self._count(skipped=not stepped)

    def _gather_gradients(self) -> None:
        """Bring the gradients of the backward pass to the parameters that the optimizer updates."""

    def _publish_weights(self) -> None:
        """Bring the updated parameters to those that the next forward uses."""

    def _updated(
            self,
            optimizer: Optimizer,
            parameters: Iterable[nn.Parameter] | None,
            by_layer: bool,
    ) -> list[nn.Parameter]:
        """The tensors that the optimizer updates in place of the model's ``parameters`` (all if None)."""
        return _parameters(optimizer) if parameters is None else list(parameters)

    def state_dict(self) -> dict[str, Any]:
        return self._scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scaler.load_state_dict(state_dict)


class FullPrecision(_Native):
    """O0: one dtype for weights, activations and gradients (timm's --model-dtype), and no loss scale."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__(_NoScale())
        self.input_dtype = dtype or torch.float32
        self.description = _name(self.input_dtype)

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        return super().prepare(model.to(dtype=self.input_dtype), optimizer)

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        return model.to(dtype=self.input_dtype)


class Autocast(_Native):
    """O1: float32 weights; ``torch.autocast`` chooses the dtype of each operator."""

    def __init__(self, device: torch.device, dtype: torch.dtype, scaler: _NoScale) -> None:
        super().__init__(scaler)
        self._device = device
        self._dtype = dtype
        self.description = f'O1, autocast {_name(dtype)}{scaler.description}'

    def autocast(self) -> contextlib.AbstractContextManager:
        return device_seam.autocast(self._device, self._dtype)


class _WithMasters(Precision):
    """Weights are read from, loaded into and averaged over the float32 masters, wherever they come from."""

    _masters: Masters

    def model_state_dict(self, model: nn.Module) -> dict[str, Any]:
        return self._masters.state_dict(unwrap_model(model))

    def load_model_state_dict(self, model: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> Any:
        return self._masters.load_state_dict(unwrap_model(model), state_dict, strict)

    def float32_model(self, model: nn.Module) -> nn.Module:
        return self._masters.float32_model


class HalfWeights(_WithMasters, _Native):
    """O2: weights in 16 bits, BatchNorm's parameters and statistics in float32, float32 masters in the optimizer.

    The masters take the places of the model's parameters in the optimizer's groups, so weight-decay exclusions, layer
    decay and the optimizer's state dict are what they would be in float32. The model takes images of any floating
    dtype and returns float32. Gradients of several backward passes are summed in the model, in 16 bits, where DDP
    finds them.
    """

    def __init__(self, dtype: torch.dtype, scaler: _NoScale) -> None:
        super().__init__(scaler)
        self.input_dtype = dtype
        self.description = f'O2, {_name(dtype)} weights with float32 masters{scaler.description}'
        self._masters = Masters()

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        if getattr(optimizer, 'is_second_order', False):
            raise UserError('second-order optimizers cannot use the half weights of --opt-level O2: use O1 or O0.')
        _cast_at_the_ends(model)
        twin = float32_twin(model)
        pairs = zip(model.parameters(), twin.parameters(), strict=True)
        masters = {p: master for p, master in pairs if p is not master}
        _halve(model, self.input_dtype)
        if is_elementwise(optimizer) and any(p in masters and p.requires_grad for p in _parameters(optimizer)):
            self._masters = self._flat_masters(twin, masters, optimizer)
        else:
            self._masters = Masters(twin, masters)
        self._trained = _parameters(optimizer)
        self._masters.enter(optimizer)
        if hasattr(optimizer, 'sync_lookahead'):
            optimizer.sync_lookahead = self._published(optimizer.sync_lookahead)
        return model, optimizer

    def _flat_masters(self, twin: nn.Module, masters: dict[Tensor, Tensor], optimizer: Optimizer) -> FlatMasters:
        if not isinstance(optimizer, torch.optim.SGD):
            return FlatMasters(twin, masters)
        state_scale, options = {}, {}
        if type(self._scaler) is _StaticScale:
            self._scaler = _FoldedScale(self._scaler.value)
            state_scale['momentum_buffer'] = self._scaler.value
        groups = optimizer.param_groups
        if all(g['fused'] is None and g['foreach'] is None and g['momentum'] > 0 for g in groups):
            options['fused'] = device_seam.has_fused_sgd(_parameters(optimizer)[0].device)
        return FlatMasters(twin, masters, state_scale, options)

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        _cast_at_the_ends(model)
        _halve(model, self.input_dtype)
        return model

    def _published(self, change: Callable[[], None]) -> Callable[[], None]:
        """A change that an optimizer makes to its parameters outside ``step``, followed by the model's."""
        def change_and_publish() -> None:
            change()
            self._publish_weights()
        return change_and_publish

    def _gather_gradients(self) -> None:
        self._masters.gather_gradients()

    def _publish_weights(self) -> None:
        self._masters.publish()

    def _updated(
            self,
            optimizer: Optimizer,
            parameters: Iterable[nn.Parameter] | None,
            by_layer: bool,
    ) -> list[nn.Parameter]:
        return self._masters.clipped(self._trained if parameters is None else parameters, by_layer)


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
    """Images reach the first layer in the dtype of its weights: half in the model, float32 in an EMA copy."""
    return _cast(inputs, next(module.parameters()).dtype)


def _cast_outputs(module: nn.Module, inputs: tuple, outputs: Any) -> Any:
    """Logits leave in float32, in which softmax and loss are computed."""
    return _cast(outputs, torch.float32)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(_cast(v, dtype) for v in value)
    return value


class Apex(_WithMasters):
    """apex's own amp, for those who have it: ``amp.initialize``, ``amp.scale_loss``, ``amp.state_dict``."""

    def __init__(self, opt_level: str, loss_scale: float | Literal['dynamic'] | None) -> None:
        self._amp = device_seam.apex_amp()
        self._arguments: dict[str, Any] = {'opt_level': opt_level}
        if opt_level != 'O0':
            self._arguments['loss_scale'] = 'dynamic' if loss_scale is None else loss_scale
            if 'combine_grad' in inspect.signature(self._amp.initialize).parameters:  # Ascend's
                self._arguments['combine_grad'] = True
        self.description = 'apex ' + ', '.join(f'{name} {value}' for name, value in self._arguments.items())
        self._masters = Masters()

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        twin = float32_twin(model)  # before apex replaces the model's forward
        parameters = _parameters(optimizer)
        try:
            model, optimizer = self._amp.initialize(model, optimizer, **self._arguments)
        except RuntimeError as error:
            raise UserError(f'--amp-impl apex: {error}'.partition('\n')[0]) from error
        optimizer.zero_grad()  # apex makes its masters in the first call
        pairs = zip(parameters, _parameters(optimizer), strict=True)
        self._masters = Masters(twin, {p: master for p, master in pairs if p is not master})
        self._share_parameters(model, twin)
        return model, optimizer

    @torch.no_grad()
    def _share_parameters(self, model: nn.Module, twin: nn.Module) -> None:
        """Give the twin apex's masters, or the model's own parameters where they are float32.

        apex makes its masters of the half weights; they get the bits back that were lost on the way.
        """
        for module, copied in zip(model.modules(), twin.modules(), strict=True):
            for name, parameter in module.named_parameters(recurse=False):
                shared = self._masters.of(parameter)
                if shared.dtype == torch.float32:
                    shared.copy_(copied._parameters[name])
                    copied._parameters[name] = shared

    def step(self, loss, optimizer, *, parameters=None, clip_grad=None, clip_mode='norm', create_graph=False,
             need_update=True) -> None:
        before = self._loss_scale()
        # Until the last backward pass of a step the gradients stay scaled in the model, where DDP sums them.
        with self._amp.scale_loss(loss, optimizer, delay_unscale=not need_update) as scaled:
            scaled.backward(create_graph=create_graph)
        if not need_update:
            return
        if clip_grad is not None:
            every = self._amp.master_params(optimizer)
            clipped = every if parameters is None else [self._masters.of(p) for p in parameters]
            dispatch_clip_grad(clipped, clip_grad, mode=clip_mode)
        optimizer.step()
        self._count(skipped=self._loss_scale() < before)

    def _loss_scale(self) -> float:
        """apex lowers it, on the host, when it has found an overflow."""
        return self._amp.state_dict()['loss_scaler0']['loss_scale']

    def state_dict(self) -> dict[str, Any]:
        return dict(self._amp.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if 'loss_scaler0' in state_dict:
            self._amp.load_state_dict(state_dict)

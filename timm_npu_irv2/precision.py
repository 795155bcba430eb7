"""Mixed precision behind one small interface: none, native autocast or half weights, apex.

The training loop knows only :class:`Precision`. Two things vary behind it: which copy of the weights the forward runs
on (:class:`FullPrecision`, :class:`Autocast`, :class:`HalfWeights`, :class:`Apex`), and what multiplies the loss so
that float16 gradients do not underflow (nothing, a constant, or a scale that follows the overflows).

The levels are those of NVIDIA's apex (https://nvidia.github.io/apex/amp.html): O0 is float32, O1 casts operator by
operator, O2 keeps convolution and linear weights in 16 bits beside float32 master weights (P. Micikevicius et al.,
Mixed Precision Training, https://arxiv.org/abs/1710.03740).
"""

import contextlib
import copy
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from timm.utils import dispatch_clip_grad, unwrap_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from . import device as device_seam
from .errors import UserError
from .optim import gradient_holders

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
        its tensors with ``model``: read it, but train, evaluate and move ``model``.
        """
        return unwrap_model(model)

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
        loss_scale = 'dynamic' if device_seam.needs_loss_scaling(device, dtype) else 1.0
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
            clipped = _parameters(optimizer) if parameters is None else self._updated(parameters)
            dispatch_clip_grad(clipped, clip_grad, mode=clip_mode)
        if self._scaler.step(optimizer):
            self._publish_weights()
            self.skipped_in_a_row = 0
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1

    def _gather_gradients(self) -> None:
        """Bring the gradients of the backward pass to the parameters that the optimizer updates."""

    def _publish_weights(self) -> None:
        """Bring the updated parameters to those that the next forward uses."""

    def _updated(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters that the optimizer updates in place of the model's."""
        return list(parameters)

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


class Autocast(_Native):
    """O1: float32 weights; ``torch.autocast`` chooses the dtype of each operator."""

    def __init__(self, device: torch.device, dtype: torch.dtype, scaler: _NoScale) -> None:
        super().__init__(scaler)
        self._device = device
        self._dtype = dtype
        self.description = f'O1, autocast {_name(dtype)}{scaler.description}'

    def autocast(self) -> contextlib.AbstractContextManager:
        return device_seam.autocast(self._device, self._dtype)


class HalfWeights(_Native):
    """O2: weights in 16 bits, BatchNorm's parameters and statistics in float32, float32 masters in the optimizer.

    The masters take the places of the model's parameters in the optimizer's groups, so weight-decay exclusions, layer
    decay and the optimizer's state dict are what they would be in float32. The model takes images of any floating
    dtype and returns float32.
    """

    def __init__(self, dtype: torch.dtype, scaler: _NoScale) -> None:
        super().__init__(scaler)
        self.input_dtype = dtype
        self.description = f'O2, {_name(dtype)} weights with float32 masters{scaler.description}'
        self._masters: _MasterWeights | None = None

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        if getattr(optimizer, 'is_second_order', False):
            raise UserError('second-order optimizers cannot use the half weights of --opt-level O2: use O1 or O0.')
        self._masters = _MasterWeights(model, optimizer, self.input_dtype)
        return model, optimizer

    def _gather_gradients(self) -> None:
        self._masters.gather_gradients()

    def _publish_weights(self) -> None:
        self._masters.publish()

    def _updated(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        return [self._masters.of(p) for p in parameters]

    def model_state_dict(self, model: nn.Module) -> dict[str, Any]:
        return self._masters.state_dict(unwrap_model(model))

    def load_model_state_dict(self, model: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> Any:
        answer = unwrap_model(model).load_state_dict(state_dict, strict=strict)
        self._masters.float32_model.load_state_dict(state_dict, strict=strict)
        self._masters.publish()
        return answer

    def float32_model(self, model: nn.Module) -> nn.Module:
        return self._masters.float32_model


class _MasterWeights:
    """The float32 masters of a model whose weights become half, and the traffic between the two.

    The seam for other layouts of the masters (flat buffers, say): the optimizer's groups, ``gather_gradients`` and
    ``publish`` are all that a step touches.

    Attributes:
        float32_model: The model's twin: its parameters are the masters, its BatchNorm modules the model's own.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, dtype: torch.dtype) -> None:
        model.register_forward_pre_hook(_cast_inputs)
        model.register_forward_hook(_cast_outputs)
        half = _half_parameters(model)
        self._masters = {p: nn.Parameter(p.detach().float().clone(), p.requires_grad) for p in half}
        self.float32_model = _twin(model, self._masters)
        for parameter in half:
            parameter.data = parameter.data.to(dtype)
        _cast_buffers(model, dtype)
        self._enter(optimizer)
        self._trained = [(p, master) for p, master in self._masters.items() if p.requires_grad]
        self._gradients: list[Tensor | None] = [None] * len(self._trained)

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """The parameter that the optimizer updates in ``parameter``'s place: its master, or itself."""
        return self._masters.get(parameter, parameter)

    def _enter(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group['params'] = [self.of(p) for p in group['params']]
        for parameter in [p for p in optimizer.state if p in self._masters]:
            optimizer.state[self._masters[parameter]] = optimizer.state.pop(parameter)

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Copy the model's gradients to the masters in float32, and drop them.

        The masters' gradients live in the same tensors from step to step, as optimizers that combine them expect.
        """
        halves, floats = [], []
        for i, (parameter, master) in enumerate(self._trained):
            if parameter.grad is None:
                master.grad = None
                continue
            if self._gradients[i] is None:
                self._gradients[i] = torch.empty_like(master)
            master.grad = self._gradients[i]
            halves.append(parameter.grad)
            floats.append(master.grad)
            parameter.grad = None
        if floats:
            torch._foreach_copy_(floats, halves)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters to the model's weights."""
        torch._foreach_copy_(list(self._masters), list(self._masters.values()))

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        state = model.state_dict()
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dtype in HALF_TYPES:
                state[name] = value.float()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            state[name] = self.of(parameter).detach()
        return state


def _half_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All floating-point parameters outside BatchNorm, each once."""
    kept = {p for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
    return [p for p in model.parameters() if p.is_floating_point() and p not in kept]


def _cast_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        for buffer in module.buffers(recurse=False) if not isinstance(module, _BatchNorm) else ():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(dtype)


def _twin(model: nn.Module, masters: dict[nn.Parameter, nn.Parameter]) -> nn.Module:
    """A copy of ``model`` with the masters as its parameters and with the very same BatchNorm modules."""
    shared = {id(m): m for m in model.modules() if isinstance(m, _BatchNorm)}
    return copy.deepcopy(model, memo={**shared, **{id(p): master for p, master in masters.items()}})


def _cast_inputs(module: nn.Module, inputs: tuple) -> tuple:
    """Images reach the first layer in the dtype of its weights: half in the model, float32 in an EMA copy."""
    dtype = next(module.parameters()).dtype
    return _cast_floating(inputs, dtype)


def _cast_outputs(module: nn.Module, inputs: tuple, outputs: Any) -> Any:
    """Logits leave in float32, in which softmax and loss are computed."""
    return _cast_floating(outputs, torch.float32)


def _cast_floating(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(_cast_floating(v, dtype) for v in value)
    return value


class Apex(Precision):
    """apex's own amp, for those who have it: ``amp.initialize``, ``amp.scale_loss``, ``amp.state_dict``."""

    def __init__(self, opt_level: str, loss_scale: float | Literal['dynamic'] | None) -> None:
        self._amp = device_seam.apex_amp()
        self._opt_level = opt_level
        self._loss_scale = 'dynamic' if loss_scale is None else loss_scale
        self.description = f'apex {opt_level}, loss scale {self._loss_scale}'

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        return self._amp.initialize(model, optimizer, opt_level=self._opt_level, loss_scale=self._loss_scale)

    def step(self, loss, optimizer, *, parameters=None, clip_grad=None, clip_mode='norm', create_graph=False,
             need_update=True) -> None:
        # Until the last backward pass of a step the gradients stay scaled in the model, where DDP sums them.
        with self._amp.scale_loss(loss, optimizer, delay_unscale=not need_update) as scaled:
            scaled.backward(create_graph=create_graph)
        if need_update:
            if clip_grad is not None:
                dispatch_clip_grad(self._amp.master_params(optimizer), clip_grad, mode=clip_mode)
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return self._amp.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if 'loss_scaler0' in state_dict:
            self._amp.load_state_dict(state_dict)

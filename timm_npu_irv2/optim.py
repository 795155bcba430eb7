"""The NPU's fused optimizers in timm's registry: ``create_optimizer_v2(model, 'npufusedsgd')``, ``--opt npufusedsgd``.

A name means one algorithm, with the vendor's defaults, on every device. On an NPU it is torch_npu's class (apex's with
apex), which combines parameters, gradients and states into one tensor each and updates them with a few kernels.
Elsewhere, and over the flat master weights of --opt-level O2 (``precision/masters.py``), which are combined already, it
is the optimizer of torch or timm that computes the same, fused or foreach where there is such an implementation.
"""

import difflib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import timm.optim
import torch
from timm.optim import OptimInfo
from torch import Tensor, nn
from torch.optim import Optimizer

from . import device as devices
from .errors import UserError, first_line

__all__ = ['combines_gradients', 'create_optimizer', 'gradient_holders', 'is_elementwise', 'register_optimizers']

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Fused:
    """A vendor's optimizer and its equivalent for other devices.

    Attributes:
        vendor_name: The name of the vendor's class.
        equivalent: The class of torch or timm that computes the same.
        same_with: Arguments with which it does so.
        has_eps, has_momentum, has_betas: Arguments that timm's factory passes on.
    """

    vendor_name: str
    equivalent: type[Optimizer]
    same_with: dict[str, Any] = field(default_factory=dict)
    has_eps: bool = True
    has_momentum: bool = False
    has_betas: bool = False

    @property
    def name(self) -> str:
        """The name in timm's registry."""
        return self.vendor_name.lower()


_OPTIMIZERS = (
    _Fused('NpuFusedSGD', torch.optim.SGD, {'fused': True}, has_eps=False, has_momentum=True),
    _Fused('NpuFusedAdam', torch.optim.Adam, {'fused': True}, has_betas=True),
    _Fused('NpuFusedAdamW', torch.optim.AdamW, {'fused': True}, has_betas=True),
    _Fused('NpuFusedAdadelta', torch.optim.Adadelta),
    # The vendor's LAMB is that of the paper's first version: no bias correction, no clipping by the global norm, every
    # layer adapted. It also limits the norm of a weight to 10, which timm's does not.
    _Fused('NpuFusedLamb', timm.optim.Lamb, {'bias_correction': False, 'max_grad_norm': None, 'always_adapt': True},
           has_betas=True),
    _Fused('NpuFusedRMSprop', torch.optim.RMSprop, has_momentum=True),
    _Fused('NpuFusedRMSpropTF', timm.optim.RMSpropTF, has_momentum=True),
    _Fused('NpuFusedAdamP', timm.optim.AdamP, has_betas=True),
)


def register_optimizers() -> None:
    """Add the optimizers to timm's registry. A second call changes nothing."""
    try:
        from timm.optim._optim_factory import default_registry  # noqa: PLC0415 - private, so it may go
    except ImportError as error:
        warnings.warn(f'timm has no optimizer registry to add the fused optimizers to ({error}).', stacklevel=2)
        return
    known = set(default_registry.list_optimizers())
    for fused in _OPTIMIZERS:
        if fused.name not in known:
            default_registry.register(_info(fused))


def _info(fused: _Fused) -> OptimInfo:
    description = f'{fused.vendor_name} on Ascend NPUs, {_full_name(fused.equivalent)} elsewhere'
    return OptimInfo(
        name=fused.name,
        opt_class=_optimizer_class(fused, description),
        description=description,
        has_eps=fused.has_eps,
        has_momentum=fused.has_momentum,
        has_betas=fused.has_betas,
    )


def _optimizer_class(fused: _Fused, description: str) -> type[Optimizer]:
    """Return a class for timm's registry, whose constructor returns an instance of the class that fits the device."""
    def new(cls: type, params: Iterable[Any], **kwargs: Any) -> Optimizer:
        return _create(fused, params, **kwargs)
    # Python calls no __init__ here, since no instance of this class is made: its signature tells the arguments.
    namespace = {'__new__': new, '__init__': fused.equivalent.__init__, '__doc__': f'{description}.',
                 '__module__': __name__}
    return type(fused.vendor_name, (Optimizer,), namespace)


def create_optimizer(model: nn.Module, options: Any, **kwargs: Any) -> Optimizer:
    """Create an optimizer by timm's ``create_optimizer_v2`` from the options of train.py.

    Args:
        model: The model, from which timm makes the parameter groups (weight-decay exclusions, layer decay).
        options: The parsed options; ``amp_impl='apex'`` selects the fused optimizers of apex.
        **kwargs: Further arguments of ``create_optimizer_v2``.

    Raises:
        UserError: There is no optimizer of that name, or it does not accept these arguments.
    """
    arguments = {**timm.optim.optimizer_kwargs(options), **kwargs}
    name = arguments['opt'].lower().split('_')[-1]  # timm's 'lookahead_NAME'
    if name not in timm.optim.list_optimizers():
        close = difflib.get_close_matches(name, timm.optim.list_optimizers(), n=2)
        hint = f'Did you mean {" or ".join(close)}?' if close else '`timm.optim.list_optimizers()` lists them.'
        raise UserError(f"--opt {arguments['opt']}: no such optimizer. {hint}")
    fused = next((fused for fused in _OPTIMIZERS if fused.name == name), None)
    if fused is not None:
        apex = getattr(options, 'amp_impl', None) == 'apex'
        o2 = getattr(options, 'amp', False) and getattr(options, 'opt_level', None) == 'O2'
        arguments['use_apex'] = apex
        plain = arguments['opt'].lower() == name  # and not wrapped in Lookahead
        arguments['combined'] = o2 and not apex and plain and fused.equivalent in _ELEMENTWISE
    try:
        return timm.optim.create_optimizer_v2(model, **arguments)
    except (TypeError, ValueError) as error:  # of the optimizer's constructor
        raise UserError(f"--opt {arguments['opt']}: {first_line(error)}") from error


def _create(
        fused: _Fused,
        params: Iterable[Any],
        use_apex: bool = False,
        combined: bool = False,
        **kwargs: Any,
) -> Optimizer:
    groups = list(params)
    first = _first_parameter(groups)
    device = 'cpu' if first is None else first.device
    vendor_class = devices.fused_optimizer_class(fused.vendor_name, device, use_apex)
    if vendor_class is None or combined:
        return _create_equivalent(fused, groups, kwargs)
    _check_dtypes(fused, groups)
    for name in ('foreach', 'fused'):  # the vendor's classes combine tensors instead
        kwargs.pop(name, None)
    optimizer = _construct(fused, vendor_class, groups, kwargs)
    optimizer.register_load_state_dict_post_hook(_combine_again)
    if not use_apex:  # amp replaces the parameters of apex's later
        optimizer.register_load_state_dict_post_hook(_combine_at_once)
    _logger.info('%s: %s', fused.name, _full_name(vendor_class))
    return optimizer


def _create_equivalent(fused: _Fused, groups: list[Any], kwargs: dict[str, Any]) -> Optimizer:
    same_with = dict(fused.same_with)
    parameters = _flat(groups)
    if kwargs.get('foreach') is not None or not all(map(_is_dense, parameters)) or (
            fused.equivalent is torch.optim.SGD and parameters
            and devices.lack_of_fused_sgd(parameters[0].device, kwargs.get('momentum', 0.0))):
        same_with.pop('fused', None)
    optimizer = _construct(fused, fused.equivalent, groups, {**same_with, **kwargs})
    # Tells GradScaler not to call `step` after an overflow. A fused SGD whose first step it skips by a flag keeps
    # momentum buffers that were never written (torch 2.14).
    cast(Any, optimizer)._step_supports_amp_scaling = False
    arguments = ', '.join(f'{name}={value}' for name, value in same_with.items())
    _logger.info('%s: using %s(%s) on this device.', fused.name, _full_name(fused.equivalent), arguments)
    return optimizer


def _construct(fused: _Fused, factory: Callable[..., Optimizer], groups: list, kwargs: dict[str, Any]) -> Optimizer:
    unknown = kwargs.keys() - inspect.signature(factory).parameters.keys()
    if unknown:
        raise UserError(f"--opt {fused.name} ({_full_name(factory)}) has no argument {', '.join(sorted(unknown))}.")
    try:
        return factory(groups, **kwargs)
    except ValueError as error:
        raise UserError(f'--opt {fused.name}: {first_line(error)}') from error


def _first_parameter(groups: list[Any]) -> Tensor | None:
    return next(iter(_flat(groups)), None)


def _flat(groups: list[Any]) -> list[Tensor]:
    """Return the tensors of parameter groups, of (name, parameter) pairs or of plain parameters."""
    parameters: list[Any] = []
    for group in groups:
        own = group['params'] if isinstance(group, dict) else group
        parameters += [own] if isinstance(own, Tensor | tuple) else own
    return [p[1] if isinstance(p, tuple) else p for p in parameters]


def _is_dense(parameter: Tensor) -> bool:
    """Return True for a tensor without gaps; torch's fused kernels for the CPU write past the elements of others."""
    sizes = sorted(zip(parameter.stride(), parameter.shape, strict=True))
    expected = 1
    for stride, size in sizes:
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _check_dtypes(fused: _Fused, groups: list[Any]) -> None:
    refused = {p.dtype for p in _flat(groups)} - {torch.float32, torch.float16}
    if refused:
        names = ', '.join(str(dtype).removeprefix('torch.') for dtype in refused)
        raise UserError(f'--opt {fused.name} updates float32 and float16 weights, not {names}: use --amp, '
                        'or another --opt.')


def _full_name(factory: Callable[..., Optimizer]) -> str:
    package = factory.__module__.split('.')[0]
    return f'{package}.{"optimizers" if package == "apex" else "optim"}.{factory.__name__}'


def _combine_again(optimizer: Any) -> None:
    """Discard the vendor's combined states, which a load makes stale, and make the counters of steps integers.

    torch counts in tensors, which the vendor's classes would advance twice a step; timm's LAMB counts elsewhere.
    """
    optimizer.is_states_combined = False
    for state in optimizer.state.values():
        if state.keys() - {'momentum_buffer'}:  # SGD counts nothing
            state['step'] = int(state.get('step', 0))


def _combine_at_once(optimizer: Any) -> None:
    """Combine weights and gradients after a load, as they were when the states were saved.

    The vendor's classes combine them in their first step. Until then every weight has a storage of its own, and since
    kernels may round by a tensor's address, a resumed run would lose the bits of the interrupted one.
    """
    if not optimizer.is_params_grads_combined:
        for parameter in optimizer.state:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.zero_grad()


# Optimizers that update each element on its own, whichever tensor holds it.
_ELEMENTWISE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adadelta,
                timm.optim.RMSpropTF)


def is_elementwise(optimizer: Optimizer) -> bool:
    """Return True if ``optimizer`` does the same to one long tensor as to its pieces."""
    cautious = any(group.get('caution') for group in optimizer.param_groups)  # timm's: looks at a tensor's mean
    return type(optimizer) in _ELEMENTWISE and not cautious


def combines_gradients(optimizer: Optimizer) -> bool:
    """Return True if ``optimizer`` moves gradients into tensors of its own, as the vendor's classes do.

    They move whole storages: a gradient that is a view of DDP's bucket would move the whole bucket, once for each.
    """
    return hasattr(optimizer, 'is_params_grads_combined')


def gradient_holders(optimizer: Optimizer) -> list[Tensor]:
    """Return tensors whose ``.grad`` together hold every gradient of the optimizer, as few as it keeps them in.

    They are the parameters, or the combined tensors of an optimizer that combines its parameters.
    """
    if not getattr(optimizer, 'is_params_grads_combined', False):
        return [p for group in optimizer.param_groups for p in group['params']]
    combined = cast(Any, optimizer)
    holders = [p for p in combined.get_combined_params() if p is not None]
    gradients = [g for g in combined.get_combined_grads() if g is not None]
    for holder, gradient in zip(holders, gradients, strict=True):
        holder.grad = gradient
    return holders


register_optimizers()

"""Float32 master weights of a half-precision model, each by itself or all in one flat buffer.

The optimizer updates masters; the model runs on their 16-bit copies. Every step moves gradients to the masters and
rounded weights back. An optimizer that treats every element alike (SGD, Adam and most others) need not know where one
weight ends and the next begins: :class:`FlatMasters` gives it two or three long tensors, so that unscaling, overflow
check, update and copy back are a dozen operators in all instead of hundreds.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ..errors import UserError
from .base import Precision

__all__ = ['FlatMasters', 'MasterPrecision', 'Masters', 'float32_twin']

HALF_TYPES = (torch.float16, torch.bfloat16)
ALIGNMENT = 8  # elements; kernels of GPUs load 16 bytes at a time, and fail on a half weight that starts elsewhere


class Masters:
    """The float32 masters of a model's half weights, a tensor each, for optimizers that look at whole layers (LAMB).

    Args:
        float32_model: The model's twin, whose parameters are the masters.
        masters: {half parameter of the model: its master}.
    """

    def __init__(self, float32_model: nn.Module, masters: dict[nn.Parameter, nn.Parameter]) -> None:
        self.float32_model = float32_model
        self._masters = masters
        self._gradients: dict[nn.Parameter, Tensor] = {}

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the float32 tensor that ``parameter`` is a rounded copy of: its master, or itself."""
        return self._masters.get(parameter, parameter)

    def clipped(self, parameters: Iterable[nn.Parameter], by_layer: bool = True) -> list[nn.Parameter]:
        """Return the tensors whose gradients are those of ``parameters`` after :meth:`gather_gradients`.

        Without ``by_layer`` they may be fewer and longer.
        """
        return [self.of(p) for p in parameters]

    def attach(self, optimizer: Optimizer) -> None:
        """Put the masters in the places of the model's parameters in the optimizer's groups and states."""
        for group in optimizer.param_groups:
            group['params'] = [self.of(p) for p in group['params']]
        for parameter, master in self._masters.items():
            if parameter in optimizer.state:
                optimizer.state[master] = optimizer.state.pop(parameter)

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Copy the model's gradients to the masters in float32, and drop them.

        A master's gradient lives in the same tensor from step to step: optimizers that combine gradients rely on it.
        """
        halves, floats = [], []
        for parameter, master in self._masters.items():
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                master.grad = None
                continue
            if master not in self._gradients:
                self._gradients[master] = torch.empty_like(master) if master.grad is None else master.grad
            master.grad = self._gradients[master]
            halves.append(gradient)
            floats.append(master.grad)
        if floats:
            torch._foreach_copy_(floats, halves)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters to the model's weights."""
        torch._foreach_copy_(list(self._masters), list(self._masters.values()))

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Return the model's state dict with the masters in place of their weights, and no half tensor in it."""
        state = model.state_dict()
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dtype in HALF_TYPES:
                state[name] = value.float()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter in self._masters:
                state[name] = self.of(parameter).detach()
        return state

    @torch.no_grad()
    def load_state_dict(self, model: nn.Module, state_dict: dict[str, Any]) -> Any:
        """Load the model, then the masters in full precision; return ``load_state_dict``'s answer."""
        answer = model.load_state_dict(state_dict)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter in self._masters and name in state_dict:
                self.of(parameter).copy_(state_dict[name])
        return answer


class FlatMasters(Masters):
    """Masters, float32 parameters and their gradients as consecutive parts of one buffer each.

    The layout of a buffer, where H are the masters of half weights and F the parameters that are float32 in the model
    (BatchNorm's): ``[H of group 0, H of group 1, …, F of group 0, F of group 1, …]``. So all half gradients arrive by
    one concatenation and all half weights leave by one copy, and a group of the optimizer is at most two tensors.

    Each tensor starts at a multiple of ``ALIGNMENT``; the elements of the gaps are and remain zero. Parameters that are
    frozen when the buffers are laid out stay out of them, and out of every step.

    Args:
        float32_model: The model's twin, whose parameters are the masters.
        masters: {half parameter of the model: its master}; the masters become views of the buffer.
        state_scale: {name of an optimizer's state: factor by which the buffers hold it}, see :class:`FoldedScale`.
        options: Options that the optimizer's groups get in place of None, because the tensors are long.
    """

    def __init__(
            self,
            float32_model: nn.Module,
            masters: dict[nn.Parameter, nn.Parameter],
            state_scale: dict[str, float] | None = None,
            options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(float32_model, masters)
        self._options = options or {}
        self._state_scale = state_scale or {}
        self._aliases: dict[nn.Parameter, nn.Parameter] = {}

    def attach(self, optimizer: Optimizer) -> None:
        """Lay out the buffers by the optimizer's groups and put their parts into the groups."""
        ordinary = optimizer.state_dict()
        groups = [list(group['params']) for group in optimizer.param_groups]
        self._sizes = [len(group) for group in groups]
        trained = [p for group in groups for p in group if p.requires_grad]
        self._halves = list(dict.fromkeys(p for p in trained if p in self._masters))
        self._floats = list(dict.fromkeys(p for p in trained if p not in self._masters))
        weights = [self.of(p) for p in (*self._halves, *self._floats)]
        self._weights = _flatten(weights)
        self._gradient_buffer = torch.zeros_like(self._weights)
        self._published = self._weights[:_count(self._halves)].to(self._halves[0].dtype)
        self._zeros = {buffer.dtype: buffer.new_zeros(ALIGNMENT) for buffer in (self._weights, self._published)}
        _become_views(weights, self._weights)
        _become_views(self._halves, self._published)
        self._make_aliases()
        kinds = (set(self._halves), set(self._floats))
        self._parts = [
            [self._part(group, own) for kind in kinds if (own := [p for p in group if p in kind])] for group in groups
        ]
        optimizer.state.clear()
        for group, parts in zip(optimizer.param_groups, self._parts, strict=True):
            group['params'] = [part.tensor for part in parts]
            group.update(self._options)
        optimizer.register_state_dict_post_hook(self._ordinary_state)
        optimizer.register_load_state_dict_pre_hook(self._flat_state)
        if ordinary['state']:
            optimizer.load_state_dict(ordinary)

    def _make_aliases(self) -> None:
        """Make views of each parameter's piece of the buffers, for clipping by the norm of each layer."""
        for parameter in (*self._halves, *self._floats):
            alias = nn.Parameter(self.of(parameter).detach())
            start = alias.storage_offset()
            alias.grad = _view_like(self._gradient_buffer[start:start + alias.numel()], alias)
            self._aliases[parameter] = alias

    def _part(self, group: Sequence[nn.Parameter], own: Sequence[nn.Parameter]) -> '_Part':
        """Return the part of the buffers that holds the parameters ``own`` of ``group``."""
        start = self.of(own[0]).storage_offset()
        places = {parameter: index for index, parameter in enumerate(group)}
        tensor = nn.Parameter(self._weights[start:start + _count(own)])
        return _Part(tensor, [self.of(p) for p in own], [places[p] for p in own])

    def clipped(self, parameters: Iterable[nn.Parameter], by_layer: bool = True) -> list[nn.Parameter]:
        """Return views of the buffers; the optimizer's own long tensors for all parameters without ``by_layer``."""
        parameters = [p for p in parameters if p in self._aliases]
        if not by_layer and len(parameters) == len(self._aliases):
            return [part.tensor for parts in self._parts for part in parts]
        return [self._aliases[p] for p in parameters]

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Move the model's gradients to the buffer, in float32."""
        split = self._published.numel()
        buffer = self._gradient_buffer
        for parameters, out in (self._halves, buffer[:split]), (self._floats, buffer[split:]):
            if parameters:
                torch.cat(_with_gaps(self._take_gradients(parameters), self._zeros[parameters[0].dtype]), out=out)
        for part in (part for parts in self._parts for part in parts):
            start = part.tensor.storage_offset()
            part.tensor.grad = buffer[start:start + part.tensor.numel()]

    def _take_gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """Return the gradients as vectors, in the order of the weights' memory, and remove them from the parameters."""
        gradients = []
        for parameter in parameters:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                raise UserError(f'parameter {self._name(parameter)} got no gradient; '
                                'freeze it or use --opt-level O1.')
            gradients.append(gradient if gradient.ndim == 1 else _in_memory_order(gradient, parameter))
        return gradients

    def _name(self, parameter: nn.Parameter) -> str:
        return next(name for name, p in self.float32_model.named_parameters() if p is self.of(parameter))

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters to the model's weights, by one operator."""
        self._published.copy_(self._weights[:self._published.numel()])

    def _ordinary_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the optimizer's state dict as it would be with a tensor for each parameter."""
        state: dict[int, dict[str, Any]] = {}
        groups = []
        first, flat = 0, 0
        defaults = dict.fromkeys(self._options)
        for group, parts, size in zip(state_dict['param_groups'], self._parts, self._sizes, strict=True):
            groups.append({**group, **defaults, 'params': list(range(first, first + size))})
            for part in parts:
                for name, value in state_dict['state'].get(flat, {}).items():
                    for index, piece in zip(part.places, self._split_state(name, value, part), strict=True):
                        state.setdefault(first + index, {})[name] = piece
                flat += 1
            first += size
        return {**state_dict, 'state': dict(sorted(state.items())), 'param_groups': groups}

    def _split_state(self, name: str, value: Any, part: '_Part') -> list[Any]:
        if not isinstance(value, Tensor):
            return [value] * len(part.members)
        if value.numel() != part.tensor.numel():
            return [value.clone() for _ in part.members]
        value = value / self._state_scale[name] if name in self._state_scale else value.clone()
        return _views_like(value, part.members)

    def _flat_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the optimizer's state dict for the long tensors, the inverse of :meth:`_ordinary_state`."""
        state: dict[int, dict[str, Any]] = {}
        groups = []
        flat = 0
        if [len(group['params']) for group in state_dict['param_groups']] != self._sizes:
            raise UserError("the optimizer's state belongs to other parameter groups: resume with the options of the "
                            'interrupted run, or use --no-resume-opt.')
        for group, parts in zip(state_dict['param_groups'], self._parts, strict=True):
            groups.append({**group, **self._options, 'params': list(range(flat, flat + len(parts)))})
            for part in parts:
                own = [state_dict['state'].get(group['params'][index], {}) for index in part.places]
                if own[0]:
                    values = {name: [each[name] for each in own] for name in own[0]}
                    state[flat] = {name: self._join_state(name, each, part) for name, each in values.items()}
                flat += 1
        return {**state_dict, 'state': state, 'param_groups': groups}

    def _join_state(self, name: str, values: list[Any], part: '_Part') -> Any:
        fits = [isinstance(v, Tensor) and v.shape == m.shape for v, m in zip(values, part.members, strict=True)]
        if not any(fits):
            return values[0]
        if not all(fits):
            raise UserError(f"the optimizer's state {name} fits some of its parameters only: resume from an earlier "
                            'checkpoint, or use --no-resume-opt.')
        pieces = [_in_memory_order(v.to(m), m) for v, m in zip(values, part.members, strict=True)]
        return torch.cat(_with_gaps(pieces)) * self._state_scale.get(name, 1.0)


class MasterPrecision(Precision):
    """A precision whose weights are read from, loaded into and averaged over float32 masters.

    Attributes:
        masters: Set by :meth:`prepare`.
    """

    masters: Masters

    def model_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Return the model's state dict with the masters as its weights."""
        return self.masters.state_dict(unwrap_model(model))

    def load_model_state_dict(self, model: nn.Module, state_dict: dict[str, Any]) -> Any:
        """Load a state dict into the masters and, rounded, into the model."""
        return self.masters.load_state_dict(unwrap_model(model), state_dict)

    def float32_model(self, model: nn.Module) -> nn.Module:
        """Return the model's float32 twin."""
        return self.masters.float32_model


@dataclass(frozen=True)
class _Part:
    """A long tensor of a group of the optimizer.

    Attributes:
        tensor: A consecutive part of the buffer, with its gradient.
        members: The float32 tensors that lie in it, in order.
        places: Indices of the members in the group as the optimizer was created with it.
    """

    tensor: nn.Parameter
    members: list[Tensor]
    places: list[int]


def float32_twin(model: nn.Module) -> nn.Module:
    """Copy ``model``, but share its BatchNorm modules."""
    return copy.deepcopy(model, memo={id(m): m for m in model.modules() if isinstance(m, _BatchNorm)})


def _room(tensor: Tensor) -> int:
    """Return the number of elements from the start of ``tensor`` in a buffer to that of the next one."""
    return -(-tensor.numel() // ALIGNMENT) * ALIGNMENT


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(_room(t) for t in tensors)


def _with_gaps(vectors: Iterable[Tensor], zeros: Tensor | None = None) -> list[Tensor]:
    """Return the vectors with zeros between them (parts of ``zeros``), as they follow one another in a buffer."""
    pieces = []
    for vector in vectors:
        pieces.append(vector)
        if gap := _room(vector) - vector.numel():
            pieces.append(vector.new_zeros(gap) if zeros is None else zeros[:gap])
    return pieces


def _in_memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the elements of ``tensor`` as a vector, in the order in which those of ``like`` lie in memory."""
    if like.is_contiguous():
        return tensor.reshape(-1)
    strides = like.stride()
    return tensor.permute(sorted(range(like.ndim), key=lambda d: (-strides[d], d))).reshape(-1)


def _view_like(vector: Tensor, like: Tensor) -> Tensor:
    """Return a vector of :func:`_in_memory_order` in the shape and layout of ``like``."""
    return vector.as_strided(like.shape, like.stride())


def _views_like(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of a buffer that hold ``tensors``, in their shapes and layouts."""
    rooms = vector.split([_room(t) for t in tensors])
    return [_view_like(room[:t.numel()], t) for room, t in zip(rooms, tensors, strict=True)]


@torch.no_grad()
def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(_with_gaps(_in_memory_order(t.detach().float(), t) for t in tensors))


@torch.no_grad()
def _become_views(tensors: Sequence[Tensor], vector: Tensor) -> None:
    """Make ``tensors`` views of ``vector``, one after the other."""
    for tensor, view in zip(tensors, _views_like(vector, tensors), strict=True):
        tensor.data = view

"""State of a training's objects outside their state dicts.

timm's and torch's schedulers, optimizers, averages and losses keep some of their state in plain attributes: random
generators of their own, the learning rate before noise was added, counters. It is found by comparison: the attributes
now against those when the objects were built. So a new class needs no entry in a list, and attributes that are
configuration stay as the options of the resumed run say.
"""

import copy
import random
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import rules
from ..optim import combines_gradients

__all__ = ['HiddenState']

_State = dict[str, dict[str, Any]]


class HiddenState:
    """The attributes of a training's objects that change while it runs.

    Modules with parameters inside the objects are left out, since checkpoints hold their state in any case.

    Args:
        objects: Objects by name, as they were built. None stands for an object that a run does not have.
        device: Device of the tensors.
    """

    def __init__(self, objects: Mapping[str, Any], device: torch.device) -> None:
        self._objects, self._device = objects, device
        self._built = self._read()

    def state_dict(self) -> _State:
        """Return {object: {attribute: value}} of the attributes that have changed since the objects were built."""
        changed = {
            path: {name: value for name, value in attributes.items()
                   if name not in self._built.get(path, {}) or not _equal(value, self._built[path][name])}
            for path, attributes in self._read().items()}
        return {path: attributes for path, attributes in changed.items() if attributes}

    def load_state_dict(self, state: _State, where: str = 'hidden') -> None:
        """Set the attributes that :meth:`state_dict` returned, in the objects that are there.

        Args:
            state: Plain values and tensors.
            where: Place of ``state`` in its file, for messages.

        Raises:
            Mismatch: An attribute is of another type than before, or takes the place of a method.
        """
        owners = {path: (owner, vars(owner)) for path, owner in self._owners()}
        for path, attributes in state.items():
            for name, value in attributes.items() if path in owners else ():
                owner, own = owners[path]
                _check(value, owner, name, f'{where}[{path}].{name}')
                own[name] = _decode(value, own.get(name), self._device)

    def _read(self) -> _State:
        return {path: {name: _encode(value) for name, value in vars(owner).items()
                       if _is_state(value) and name != 'defaults'}  # torch adds to an optimizer's when it loads
                for path, owner in self._owners()}

    def _owners(self) -> Iterator[tuple[str, Any]]:
        """Yield (path, object) of every object with attributes."""
        seen: set[int] = set()
        for name, value in self._objects.items():
            if value is not None:
                yield from _walk(value, name, seen)


def _walk(owner: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(owner) in seen:
        return
    seen.add(id(owner))
    if isinstance(owner, Optimizer):
        yield from _walk_optimizer(owner, path, seen)
        return
    yield path, owner
    children = dict(owner.named_children()) if isinstance(owner, nn.Module) else vars(owner)
    for name, child in list(children.items()):
        if _is_object(child):
            yield from _walk(child, f'{path}.{name}', seen)


def _walk_optimizer(optimizer: Optimizer, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield an optimizer, one inside it, and its parameters (AdaHessian's traces are attributes of them)."""
    if combines_gradients(optimizer):
        return  # its attributes are where its combined tensors lie, which it works out again
    yield path, optimizer
    for name, value in vars(optimizer).items():
        if isinstance(value, Optimizer):
            yield from _walk(value, f'{path}.{name}', seen)
    parameters = (parameter for group in optimizer.param_groups for parameter in group['params'])
    for index, parameter in enumerate(parameters):
        yield f'{path}.{index}', parameter


_NOT_STATE = (Tensor, torch.Generator, random.Random, type, types.FunctionType, types.MethodType, types.ModuleType)


def _is_object(value: Any) -> bool:
    """Return True for an object that may have state in its attributes."""
    if isinstance(value, nn.Module):
        return next(value.parameters(), None) is None
    return hasattr(value, '__dict__') and not isinstance(value, _NOT_STATE)


def _is_state(value: Any) -> bool:
    return isinstance(value, torch.Generator | random.Random) or _is_plain(value)


def _is_plain(value: Any) -> bool:
    """Return True for a value that a checkpoint can hold."""
    if type(value) is dict:
        return all(isinstance(key, str | int) for key in value) and all(map(_is_plain, value.values()))
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str, Tensor)


def _check(value: Any, owner: Any, name: str, where: str) -> None:
    """Raise Mismatch unless a value from a file can be that of an attribute."""
    current = vars(owner).get(name)
    if name not in vars(owner):
        rules.expect(not hasattr(owner, name), value, where, 'no attribute that is not state')
    elif isinstance(current, torch.Generator | random.Random):
        rules.check_like(value, _encode(current), where)
    elif type(current) in (bool, int, float, str) and not isinstance(value, Tensor):
        rules.check_like(value, current, where)
    else:
        rules.expect(_is_state(current), value, where, 'no attribute that is not state')


def _encode(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return {'device': str(value.device), 'state': value.get_state()}
    if isinstance(value, random.Random):
        return value.getstate()
    return copy.deepcopy(value)


def _decode(value: Any, current: Any, device: torch.device) -> Any:
    """Return the value of an attribute that is ``current`` now."""
    if isinstance(current, torch.Generator):
        generator = torch.Generator(value['device'])
        generator.set_state(value['state'])
        return generator
    if isinstance(current, random.Random):
        version, numbers, gauss_next = value
        current.setstate((version, tuple(numbers), gauss_next))
        return current
    return _to_device(copy.deepcopy(value), device)


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_device(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)

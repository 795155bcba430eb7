"""Rules for values from a file: functions of a value and its place that raise :class:`Mismatch` or return nothing."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

__all__ = ['Mismatch', 'Rule', 'absent', 'check_like', 'check_size', 'either', 'expect', 'known_entries', 'many',
           'mapping', 'naming', 'number', 'one_of', 'optional', 'place', 'plain', 'record', 'show', 'tensor', 'text']

Rule = Callable[[Any, str], None]

MOST = 2**53  # the largest range in which float64 counts exactly
LONGEST_TEXT = 10_000
MOST_ENTRIES, DEEPEST = 2 * 10**6, 40  # nested containers can be small and yet unfold to any size


class Mismatch(ValueError):
    """A value that is not as a file may have it."""


@contextlib.contextmanager
def naming(path: Any) -> Iterator[None]:
    """Turn a :class:`Mismatch` into a UserError that names the file."""
    try:
        yield
    except Mismatch as error:
        raise UserError(f'{path} is refused: {error}.') from error


def expect(condition: bool, value: Any, where: str, expected: str) -> None:
    """Raise :class:`Mismatch`, with the value in words, unless the condition holds."""
    if not condition:
        raise Mismatch(f'{where} is {show(value)}, expected {expected}')


def show(value: Any) -> str:
    """Return a short description of a value; a long number or a container is not written out."""
    if isinstance(value, bool | float) or (isinstance(value, int) and value.bit_length() < 80) or value is None:
        return repr(value)
    if isinstance(value, str):
        return repr(value[:40]) + ('…' if len(value) > 40 else '')
    if isinstance(value, Tensor):
        return f'a tensor of {value.dtype} with shape {tuple(value.shape)}'
    if isinstance(value, int):
        return f'a number of {value.bit_length()} bits'
    return f'of type {type(value).__name__}' + (f' with {len(value)} entries' if hasattr(value, '__len__') else '')


def number(low: float = -MOST, high: float = MOST, integer: bool = False, finite: bool = True) -> Rule:
    """Return the rule for a number from ``low`` to ``high``."""
    kind = 'an integer' if integer else 'a number'

    def rule(value: Any, where: str) -> None:
        known = isinstance(value, int if integer else int | float) and not isinstance(value, bool)
        fits = known and (low <= value <= high or (not finite and isinstance(value, float)))
        expect(fits, value, where, f'{kind} from {low:.16g} to {high:.16g}')

    return rule


def text(longest: int = LONGEST_TEXT, pattern: str = '') -> Rule:
    """Return the rule for a string, which may have to match ``pattern`` as a whole."""
    expected = f'a text of the form {pattern}' if pattern else f'a text of at most {longest} characters'
    pattern = pattern or r'(?s:.*)'

    def rule(value: Any, where: str) -> None:
        fits = isinstance(value, str) and len(value) <= longest and re.fullmatch(pattern, value) is not None
        expect(fits, value, where, expected)

    return rule


def one_of(*choices: Any) -> Rule:
    """Return the rule for one of a few values."""
    return lambda value, where: expect(
        any(type(value) is type(choice) and value == choice for choice in choices), value, where,
        f'one of {", ".join(map(repr, choices))}')


def optional(rule: Rule) -> Rule:
    """Return the rule for a value that may be None."""
    return lambda value, where: None if value is None else rule(value, where)


def either(*rules: Rule) -> Rule:
    """Return the rule for a value that one of ``rules`` accepts; the last one makes the message."""

    def rule(value: Any, where: str) -> None:
        for each in rules[:-1]:
            with contextlib.suppress(Mismatch):
                return each(value, where)
        return rules[-1](value, where)

    return rule


def many(each: Rule, least: int = 0, most: int = 10**6) -> Rule:
    """Return the rule for a list or tuple of ``least`` to ``most`` values."""

    def rule(value: Any, where: str) -> None:
        count = f'{least} values' if least == most else f'{least} to {most} values'
        expect(isinstance(value, list | tuple) and least <= len(value) <= most, value, where, f'a list of {count}')
        for index, item in enumerate(value):
            each(item, f'{where}[{index}]')

    return rule


def mapping(each: Rule, key: Rule | None = None, most: int = 10**6) -> Rule:
    """Return the rule for a dict of values of one kind, with texts for keys if nothing else is said."""
    key = key or text(1000)

    def rule(value: Any, where: str) -> None:
        expect(isinstance(value, dict) and len(value) <= most, value, where, f'a dict of at most {most} entries')
        for name, item in value.items():
            key(name, f'a name in {where}')
            each(item, f'{where}[{show(name)}]')

    return rule


def record(required: Mapping[str, Rule], others: Mapping[str, Rule] | None = None) -> Rule:
    """Return the rule for a dict with ``required`` entries and perhaps ``others``; further entries are ignored."""

    def rule(value: Any, where: str) -> None:
        expect(isinstance(value, dict), value, where or 'the file', 'a dict')
        for name in required:
            if name not in value:
                raise Mismatch(f'{place(where, name)} is missing')
        for name, each in {**required, **(others or {})}.items():
            if name in value:
                each(value[name], place(where, name))

    return rule


def place(where: str, name: str) -> str:
    """Return the place of an entry in what is at ``where``."""
    return f'{where}.{name}' if where else name


def tensor(dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None) -> Rule:
    """Return the rule for a tensor."""
    expected = f'a tensor of {dtype or "any type"}' + (f' with shape {shape}' if shape is not None else '')
    return lambda value, where: expect(
        isinstance(value, Tensor) and dtype in (None, value.dtype) and shape in (None, tuple(value.shape)),
        value, where, expected)


def plain(value: Any, where: str) -> None:
    """Accept None, numbers, texts, and lists and dicts of them."""
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            plain(item, f'{where}[{index}]')
    elif isinstance(value, dict):
        for name, item in value.items():
            expect(isinstance(name, str | int), name, f'a name in {where}', 'a text or an integer')
            plain(item, f'{where}[{show(name)}]')
    else:
        fits = value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63)
        expect(fits or (isinstance(value, str) and len(value) <= LONGEST_TEXT), value, where, 'a plain value')


def absent(reason: str) -> Rule:
    """Return the rule for an entry that must be empty."""

    def rule(value: Any, where: str) -> None:
        if value:
            raise Mismatch(f'{where} is {show(value)}, but {reason}')

    return rule


def check_size(content: Any, most_bytes: int) -> None:
    """Raise :class:`Mismatch` if what was read from a file unfolds to more than a file of its size can hold.

    Args:
        content: Containers, plain values and tensors.
        most_bytes: The most that all tensors together may have.
    """
    waiting, entries, unfolded, stored, storages = [(content, 0)], 0, 0, 0, set()
    while waiting:
        value, depth = waiting.pop()
        entries += 1
        if entries > MOST_ENTRIES or depth > DEEPEST:
            raise Mismatch(f'it nests more than {DEEPEST} deep, or has more than {MOST_ENTRIES} entries')
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.device.type != 'cpu' or value.is_quantized:
                raise Mismatch(f'it holds a tensor that is not an ordinary one ({value.layout}, {value.device})')
            storage = value.untyped_storage()
            stored += 0 if storage.data_ptr() in storages else storage.nbytes()
            storages.add(storage.data_ptr())
            unfolded += value.numel() * value.element_size()
            if max(stored, unfolded) > most_bytes:
                raise Mismatch(f'its tensors unfold to more than {most_bytes} bytes')
        else:
            waiting += ((item, depth + 1) for item in _items(value))


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    return value if isinstance(value, list | tuple | set | frozenset) else ()


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def check_like(value: Any, reference: Any, where: str) -> None:
    """Raise :class:`Mismatch` unless ``value`` has the structure of ``reference``: names, types, and shapes of tensors.

    Numbers may differ in kind, and where the reference is None anything plain will do.
    """
    if isinstance(reference, dict):
        expect(isinstance(value, dict) and value.keys() == reference.keys(), value, where,
                f'a dict with {_listed(list(map(str, reference))) or "no entries"}')
        for name, item in reference.items():
            check_like(value[name], item, place(where, str(name)))
    elif isinstance(reference, list | tuple):
        many(lambda *_: None, len(reference), len(reference))(value, where)
        for index, item in enumerate(reference):
            check_like(value[index], item, f'{where}[{index}]')
    elif isinstance(reference, Tensor):
        tensor(reference.dtype, tuple(reference.shape))(value, where)
    elif reference is None or value is None:
        plain(value, where)
    elif isinstance(reference, int | float) and not isinstance(reference, bool):
        number(finite=False)(value, where)
    else:
        expect(type(value) is type(reference), value, where, f'a {type(reference).__name__}')


def known_entries(value: Any, reference: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the entries of ``value`` that ``reference`` has too. Raise :class:`Mismatch` unless they are alike."""
    expect(isinstance(value, dict), value, where, 'a dict')
    found = {name: value[name] for name in reference if name in value}
    check_like(found, {name: reference[name] for name in found}, where)
    return found

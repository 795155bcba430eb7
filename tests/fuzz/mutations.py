"""Changes to what a file holds, for Hypothesis to choose, and the number of tries of a short and of a long run."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

NUMBERS = [-1, 0, 1, 2, 3, 10**6, 10**19, -10**19, 10**400, 2**31, 2**63, 0.5, -0.5, 1e300, float('nan'),
           float('inf')]
TEXTS = ['', 'x', '../x', '/etc/passwd', 'http://127.0.0.1:1/x', '\x1b[2J\n', '`<b>', 'nan', 'avg', '0' * 5000,
         '\ud800']
TENSORS = [
    lambda: torch.zeros(()), lambda: torch.zeros(0), lambda: torch.full((3,), float('nan')),
    lambda: torch.ones(2, 3, 4),
    lambda: torch.zeros(4, dtype=torch.int64), lambda: torch.zeros(7, dtype=torch.uint8),
    lambda: torch.zeros(1).expand(10**12), lambda: torch.eye(3).to_sparse(), lambda: torch.ones(5, dtype=torch.bool),
    lambda: torch.zeros(3, dtype=torch.complex64),
]


def fuzz(short: int, long: int) -> Callable[[Callable], tuple[Callable, Callable]]:
    """Return a decorator of a function of Hypothesis' data that makes two tests of it: a short and a long one."""

    def decorate(check: Callable) -> tuple[Callable, Callable]:
        usual = dict(deadline=None, suppress_health_check=list(HealthCheck), database=None,
                     phases=(Phase.explicit, Phase.generate, Phase.shrink), print_blob=True)
        quick = settings(max_examples=short, derandomize=True, **usual)(given(data=st.data())(check))
        thorough = settings(max_examples=long, **usual)(given(data=st.data())(check))
        return quick, pytest.mark.timeout(0)(pytest.mark.long(thorough))

    return decorate


def mutated(content: Any, data: st.DataObject, tensors: bool = True, most: int = 2) -> Any:
    """Return a copy of ``content`` with one to ``most`` changes anywhere in it."""
    content = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, most))):
        _change(content, data, tensors)
    return content


def _change(content: Any, data: st.DataObject, tensors: bool) -> None:
    container = content
    while True:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        value = container[key]
        if isinstance(value, tuple):
            value = container[key] = list(value)
        if not isinstance(value, dict | list) or data.draw(st.integers(0, 4)) == 0:
            break
        container = value
    if isinstance(container, dict):
        kind = data.draw(st.sampled_from(['value', 'value', 'value', 'removed', 'added', 'renamed']))
    else:
        kind = data.draw(st.sampled_from(['value', 'value', 'removed', 'added']))
    if kind == 'value':
        container[key] = _another(value, data, tensors)
    elif kind == 'removed':
        del container[key]
    elif isinstance(container, list):
        container.append(_another(value, data, tensors))
    elif kind == 'added':
        container[data.draw(st.sampled_from(['step', 'x', '', 'url', 'optimizer', 7]))] = _another(value, data, tensors)
    else:
        container[data.draw(st.sampled_from(['x', '\x1b', str(key) * 2]))] = container.pop(key)


def _another(value: Any, data: st.DataObject, tensors: bool) -> Any:
    if isinstance(value, torch.Tensor) and data.draw(st.booleans()):
        return data.draw(st.sampled_from([
            lambda: value[:-1] if value.ndim else value[None], lambda: value[None], value.flatten,
            lambda: value.to(torch.float64), lambda: value.to(torch.int32), lambda: value.to(torch.bfloat16),
            lambda: value[0] if value.ndim else value, lambda: torch.full_like(value, 7),
        ]))()
    plain = [*NUMBERS, *TEXTS, None, True, False, [], {}, [1], {'a': 1}, [[]] * 3, [None] * 625]
    choices = [lambda each=each: copy.deepcopy(each) for each in plain]
    return data.draw(st.sampled_from([*choices, *(TENSORS if tensors else ())]))()

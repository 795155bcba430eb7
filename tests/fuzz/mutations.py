"""Changes to what a file holds, for Hypothesis to choose, and the short and the long form of a fuzz test."""

import contextlib
import copy
import inspect
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

# Of the long forms together, by default an hour. FUZZ_SEED is another number for other tries.
SECONDS, SEED = float(os.environ.get('FUZZ_SECONDS', '3600')), int(os.environ.get('FUZZ_SEED', '0'))
LIMIT = 120  # seconds of one try

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


class TimedOut(BaseException):
    """The end of a try that takes too long; no handler of Exception takes it for an error of a file."""


def fuzz(short: int, share: float) -> Callable[[Callable], tuple[Callable, Callable]]:
    """Return a decorator of a function of Hypothesis' data that makes two tests of it.

    Args:
        short: Tries of the first test, always the same ones, which ends with a failure.
        share: Part of the time of all long tests that the second one takes. It collects failures and goes on.
    """

    def decorate(check: Callable) -> tuple[Callable, Callable]:
        quick = settings(
            max_examples=short, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None,
            phases=(Phase.explicit, Phase.generate, Phase.shrink), print_blob=True)(given(data=st.data())(check))

        def thorough(**fixtures: Any) -> None:
            collect_failures(check.__name__, lambda data: check(data=data, **fixtures), share * SECONDS)

        signature = inspect.signature(check)
        thorough.__signature__ = signature.replace(
            parameters=[each for name, each in signature.parameters.items() if name != 'data'])
        return quick, pytest.mark.timeout(0)(pytest.mark.long(thorough))

    return decorate


def collect_failures(name: str, check: Callable[[st.DataObject], None], seconds: float) -> None:
    """Try for some time. Fail at the end, with every failure, if there was one; FUZZ_LOG names a file for them too."""
    end, tries, failures, timeouts = time.monotonic() + seconds, 0, [], 0

    def attempt(data: st.DataObject) -> None:
        nonlocal tries, timeouts
        tries += 1
        try:
            with time_limit(LIMIT):
                check(data)
        except HypothesisException:
            raise
        except TimedOut:
            timeouts += 1
            failures.append(traceback.format_exc()[-3000:])
        except (Exception, SystemExit):
            failures.append(traceback.format_exc()[-3000:])

    batches = 0
    while time.monotonic() < end:
        batches += 1
        hypothesis.seed(SEED * 10**6 + batches)(settings(
            max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None,
            phases=(Phase.generate,))(given(st.data())(attempt)))()
    line = f'{name} (seed {SEED}): {tries} tries, {len(failures)} failures, {timeouts} of them time-outs'
    print(line)
    if os.environ.get('FUZZ_LOG'):
        with Path(os.environ['FUZZ_LOG']).open('a') as log:
            log.write('\n'.join([line, *failures, '']))
    assert not failures, '\n\n'.join([line, *failures])


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TimedOut

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


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
    if isinstance(value, torch.Tensor) and value.numel() < 10**6 and data.draw(st.booleans()):  # else one of TENSORS
        return data.draw(st.sampled_from([
            lambda: value[:-1] if value.ndim else value[None], lambda: value[None], value.flatten,
            lambda: value.to(torch.float64), lambda: value.to(torch.int32), lambda: value.to(torch.bfloat16),
            lambda: value[0] if value.ndim else value, lambda: torch.full_like(value, 7),
        ]))()
    plain = [*NUMBERS, *TEXTS, None, True, False, [], {}, [1], {'a': 1}, [[]] * 3, [None] * 625]
    choices = [lambda each=each: copy.deepcopy(each) for each in plain]
    return data.draw(st.sampled_from([*choices, *(TENSORS if tensors else ())]))()

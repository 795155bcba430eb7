"""Times of candidates that take turns in one process, so that whatever slows the machine slows all of them."""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .. import device as devices

__all__ = ['Ratio', 'in_turn', 'ratio', 'times_in_turn']

Work = Callable[[], Any]

PAUSE = 0.05  # seconds; the threads of whatever ran before wait for more work in a busy loop, and slow the next one


def in_turn(works: Mapping[str, Work], device: torch.device, rounds: int, warmup: int) -> Iterator[dict[str, float]]:
    """Yield {name: seconds} of each round, in an order drawn anew for each.

    Args:
        works: {name: function to time}.
        device: Device whose queue is emptied before and after each call.
        rounds: Number of rounds.
        warmup: Calls of each function before the first round.
    """
    for work in works.values():
        for _ in range(warmup):
            work()
    order = random.Random(0)
    for _ in range(rounds):
        seconds = {name: _seconds(works[name], device) for name in order.sample(list(works), len(works))}
        yield {name: seconds[name] for name in works}


def times_in_turn(works: Mapping[str, Work], device: torch.device, rounds: int, warmup: int) -> dict[str, list[float]]:
    """Return {name: seconds of each round}; the arguments are those of :func:`in_turn`."""
    found = list(in_turn(works, device, rounds, warmup))
    return {name: [each[name] for each in found] for name in works}


def _seconds(work: Work, device: torch.device) -> float:
    devices.synchronize(device)
    time.sleep(PAUSE)
    start = time.perf_counter()
    work()
    devices.synchronize(device)
    return time.perf_counter() - start


class Ratio(NamedTuple):
    """The median of the rounds' ratios, the figure to quote, and their spread."""

    median: float
    least: float
    greatest: float


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return the ratio of ours to theirs, round by round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))

"""What the stand-in wrote down: its operator log and its trace.

In a process whose environment switches them on:

    with standin_journal.recording() as step:
        train_step()
    print(len(step.operators), step.bytes, step.synchronizations, step.copies('D2H'))
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import chip_costs


class Operator(NamedTuple):
    """One operator that ran, with the bytes of its tensors: each input read once, each output written once.

    ``tensors`` describes them: role, dtype, sizes and strides of each, as ``chip_costs.py`` reads them.
    """

    name: str
    bytes_read: int
    bytes_written: int
    tensors: str


class Event(NamedTuple):
    """One synchronisation, wait, copy or collective.

    ('synchronize', 'stream' | 'device' | 'event', 0): the host waits for the device.
    ('wait', 'stream', 0): a stream waits for an event; the host does not.
    ('copy' | 'copy_async', 'H2D' | 'D2H' | 'D2D' | 'H2H', bytes).
    ('collective', e.g. 'AllReduce', bytes of this process).
    """

    kind: str
    detail: str
    bytes: int


@dataclass
class Recording:
    """What ran between two moments, in the order it ran."""

    operators: list[Operator] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes read and written by all operators."""
        return sum(each.bytes_read + each.bytes_written for each in self.operators)

    @property
    def synchronizations(self) -> int:
        """How often the host waited for the device."""
        return sum(event.kind == 'synchronize' for event in self.events)

    def kernels(self, chip: str, lazy_fusion: bool = False) -> list[chip_costs.Kernel]:
        """The kernels that the operators become on a chip: '910a', '910b' or '950'."""
        calls = [(each.name, each.tensors) for each in self.operators]
        return chip_costs.kernels_of_calls(calls, chip, lazy_fusion)

    def calls(self) -> Counter[str]:
        """{operator: how often it ran}."""
        return Counter(each.name for each in self.operators)

    def copies(self, direction: str) -> list[Event]:
        """The copies in one direction: 'H2D', 'D2H' or 'D2D'."""
        return [event for event in self.events if event.kind.startswith('copy') and event.detail == direction]


def read_operators(path: Path | str, start: int = 0) -> list[Operator]:
    """The operators in a log, from byte ``start`` on."""
    lines = _lines(Path(path), start)
    return [Operator(name, int(read), int(written), tensors) for name, read, written, tensors in lines]


def read_events(path: Path | str, start: int = 0) -> list[Event]:
    """The events in a trace, from byte ``start`` on."""
    return [Event(kind, detail, int(size)) for kind, detail, size in _lines(Path(path), start)]


@contextmanager
def recording() -> Iterator[Recording]:
    """Record this process's own operators and events; the synchronisation that ends the record is left out.

    Raises:
        RuntimeError: Operator log or trace is switched off, so that an empty record would mean nothing.
    """
    import torch  # noqa: PLC0415 - only this function needs it; the readers above work anywhere

    torch.npu.synchronize()
    log, trace = _path('OPLOG'), _path('TRACE')
    log_start, trace_start = _size(log), _size(trace)
    result = Recording()
    yield result
    torch.npu.synchronize()
    if log.exists():  # it does not before the first operator
        result.operators += read_operators(log, log_start)
    events = read_events(trace, trace_start)
    last = max(index for index, event in enumerate(events) if event[:2] == ('synchronize', 'device'))
    result.events += events[:last]


def _lines(path: Path, start: int) -> list[list[str]]:
    with path.open('rb') as file:
        file.seek(start)
        return [line.split('\t') for line in file.read().decode().splitlines()]


def _path(switch: str) -> Path:
    name = os.environ.get(f'ASCEND_STANDIN_{switch}')
    if not name:
        raise RuntimeError(f'ASCEND_STANDIN_{switch} names no file: nothing is recorded.')
    return Path(name.replace('%r', os.environ.get('RANK', '0')))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

"""Counting the operators of a step and the bytes they touch.

On the stand-in for CANN (``tests/ascend``) the operators are those that torch_npu hands to the device, from the
stand-in's log. Elsewhere they are ATen's, seen by a dispatch mode: what the device would be asked for, before a
backend splits or joins it.
"""

import importlib
import importlib.util
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ['Cost', 'cost_of', 'counts_kernels']

# They make or describe tensors and touch no element.
_FREE = frozenset({
    'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', 'view', '_unsafe_view', 'as_strided',
    'detach', 'alias', 'lift_fresh', 'is_pinned', 'record_stream',
})


@dataclass
class Cost:
    """What a piece of work asked of the device.

    Attributes:
        calls: {operator: how often}.
        bytes: Read and written by all operators: each input once, each output once.
        synchronizations: How often the host waited; None where nobody counts that.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    synchronizations: int | None = None


def counts_kernels() -> bool:
    """Whether this process runs on the stand-in with its operator log on."""
    return bool(os.environ.get('ASCEND_STANDIN_OPLOG')) and importlib.util.find_spec('standin_journal') is not None


def cost_of(work: Callable[[], Any]) -> Cost:
    """Do ``work`` once and count."""
    if counts_kernels():
        return _from_journal(work)
    with _OperatorCounter() as counter:
        work()
    return counter.cost


def _from_journal(work: Callable[[], Any]) -> Cost:
    journal = importlib.import_module('standin_journal')
    with journal.recording() as record:
        work()
    traced = bool(os.environ.get('ASCEND_STANDIN_TRACE'))
    return Cost(record.calls(), record.bytes, record.synchronizations if traced else None)


class _OperatorCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if name not in _FREE and not operator.is_view:
            self.cost.calls[name] += 1
            self.cost.bytes += _bytes((args, kwargs)) + _bytes(result)
        return result


def _bytes(values: Any) -> int:
    return sum(_touched(leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _touched(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; those that are repeated by a stride of 0 count once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride != 0 else min(size, 1)
    return count * tensor.element_size()

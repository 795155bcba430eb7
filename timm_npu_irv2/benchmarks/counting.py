"""Counting the operators of a step and the bytes they touch.

With a journal, such as that of the stand-in for CANN, the operators are those that torch_npu hands to the device.
Without one they are ATen's, recorded by a dispatch mode, before a backend splits or joins them.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ['Cost', 'Journal', 'Record', 'cost_of']

# Operators that create or describe tensors and touch no element.
_FREE = frozenset({
    'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', 'view', '_unsafe_view', 'as_strided',
    'detach', 'alias', 'lift_fresh', 'is_pinned', 'record_stream',
})


@dataclass
class Cost:
    """Operators, bytes and synchronizations of a piece of work.

    Attributes:
        calls: {operator: number of calls}.
        bytes: Bytes read and written by all operators: each input once, each output once.
        synchronizations: Number of times that the host waited; None where that is not counted.
        chip_kernels: {kernel: number of launches on the chip}; None without a journal.
        chip_bytes: Bytes read and written by these kernels.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    synchronizations: int | None = None
    chip_kernels: Counter[str] | None = None
    chip_bytes: int = 0


class Record(Protocol):
    """The operators of a piece of work, as a journal recorded them.

    Attributes:
        bytes: Bytes read and written by all operators.
        synchronizations: Number of times that the host waited; None where that is not recorded.
    """

    bytes: int
    synchronizations: int | None

    def calls(self) -> Counter[str]:
        """Return {operator: number of calls}."""
        ...

    def kernels(self, chip: str, lazy_fusion: bool) -> Sequence[tuple[str, int, int]]:
        """Return (name, bytes read, bytes written) of each kernel that the operators become on a chip."""
        ...


Journal = Callable[[], AbstractContextManager[Record]]


def cost_of(
        work: Callable[[], Any],
        journal: Journal | None = None,
        chip: str = '910b',
        lazy_fusion: bool = False,
) -> Cost:
    """Run ``work`` once and count.

    Args:
        work: The work to count.
        journal: Function that returns a context whose value is the record of the work inside it.
        chip: Family of chips whose kernels are counted with a journal: '910a', '910b' or '950'.
        lazy_fusion: Count the kernels as with TORCH_NPU_LAZY_FUSION.
    """
    if journal is not None:
        with journal() as record:
            work()
        kernels = record.kernels(chip, lazy_fusion)
        return Cost(record.calls(), record.bytes, record.synchronizations, Counter(name for name, _, _ in kernels),
                    sum(read + written for _, read, written in kernels))
    with _OperatorCounter() as counter:
        work()
    return counter.cost


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
    """Return the bytes of a tensor's elements; those repeated by a stride of 0 count once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride != 0 else min(size, 1)
    return count * tensor.element_size()

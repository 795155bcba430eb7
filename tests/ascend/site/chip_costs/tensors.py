"""Tensors of the operator log, kernels, and what chips do differently."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

SIZES = {'Half': 2, 'BFloat16': 2, 'Float': 4, 'Double': 8, 'Byte': 1, 'Char': 1, 'Bool': 1, 'Short': 2, 'Int': 4,
         'Long': 8}
FLOATS = ('Half', 'BFloat16', 'Float', 'Double')


class Kernel(NamedTuple):
    """A kernel on the chip."""

    name: str
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class Tensor:
    """A tensor of a call: role 'r', 'w' or 'b' (both), dtype as ATen spells it, sizes and strides in elements."""

    role: str
    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.sizes) * SIZES.get(self.dtype, 4)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the elements in memory: those repeated by a stride of 0 count once."""
        sizes = (size for size, stride in zip(self.sizes, self.strides, strict=True) if stride != 0)
        return math.prod(sizes) * SIZES.get(self.dtype, 4)

    @property
    def is_contiguous(self) -> bool:
        """True for a dense tensor in the order of its dimensions."""
        expected = 1
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def is_transposed(self) -> bool:
        """True for a dense tensor whose last two dimensions are swapped in memory."""
        sizes, strides = list(self.sizes), list(self.strides)
        sizes[-2:], strides[-2:] = sizes[:-3:-1], strides[:-3:-1]
        return len(sizes) > 1 and Tensor('r', self.dtype, tuple(sizes), tuple(strides)).is_contiguous

    @property
    def as_nc1hwc0(self) -> int:
        """Bytes of an activation (N, C, H, W) in blocks of channels of 32 bytes, as TransData writes it."""
        n, c, *rest = self.sizes
        return n * _round_up(c, 32 // SIZES[self.dtype]) * math.prod(rest) * SIZES[self.dtype]

    @property
    def as_fractal_z(self) -> int:
        """Bytes of a convolution's weight (O, I, H, W) as FRACTAL_Z."""
        o, i, *rest = self.sizes
        return _round_up(o, 16) * _round_up(i, 32 // SIZES[self.dtype]) * math.prod(rest) * SIZES[self.dtype]


Argument: TypeAlias = 'Tensor | list[Tensor] | None'


@dataclass(frozen=True)
class Chip:
    """The differences between chips that change the kernels of a call.

    Attributes:
        convolves_nchw: Convolutions take NCHW tensors as they are.
        keeps_private: Convolutions leave their output in NC1HWC0, and later ones take it so (internal format).
        batch_norm_from: Fewest channels from which BatchNorm is one kernel; None for no number.
        batch_norm_backward: BatchNorm's backward is one kernel.
        adds_strided: Additions, products of elements and Cat read strided inputs; other operators never do.
        pools_with_indices: Max pooling takes NCHW and keeps an int32 index for each output instead of a bit mask.
        pools_by_convolution: Average pooling converts layouts: it is a convolution, and in the backward it has the
            channels last.
        most_concatenated: Largest number of tensors that one kernel of Cat takes; more are concatenated in stages.
        most_aligned: The same in the first dimension, if the last one is a multiple of 32 bytes in all tensors.
        fuses_lazily: torch_npu's lazy fusion has kernels for the chip.
    """

    convolves_nchw: bool = False
    keeps_private: bool = False
    batch_norm_from: int | None = None
    batch_norm_backward: bool = False
    adds_strided: bool = False
    pools_with_indices: bool = True
    pools_by_convolution: bool = False
    most_concatenated: int = 32
    most_aligned: int = 32
    fuses_lazily: bool = False


def parse(text: str) -> list[Argument]:
    """Return the arguments of a line of the operator log: tensors, lists of them, and None for absent ones."""
    arguments: list[Argument] = []
    inside: list[Tensor] | None = None
    for word in text.split():
        if word == '[':
            inside = []
        elif word == ']':
            arguments.append(inside)
            inside = None
        elif inside is not None:
            inside += [] if word == '-' else [_tensor(word)]
        else:
            arguments.append(None if word == '-' else _tensor(word))
    return arguments


def _tensor(word: str) -> Tensor:
    role, dtype, sizes, strides = word.split(':')
    return Tensor(role, dtype, *(tuple(map(int, filter(None, each.split(',')))) for each in (sizes, strides)))


def _round_up(number: int, to: int) -> int:
    return -(-number // to) * to


def flat(arguments: Iterable[Argument]) -> list[Tensor]:
    """Return all tensors among arguments."""
    every: list[Tensor] = []
    for each in arguments:
        every += each if isinstance(each, list) else [each] if each is not None else []
    return every

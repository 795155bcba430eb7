"""Forms of an operation that compute the same; which of them is fastest depends on the device.

``TIMM_NPU_IRV2_VARIANTS='pointwise=product,siblings=separate'`` chooses for a process, as :func:`set_variants` does;
:func:`use_variants` chooses inside a context.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from torch import Tensor

from .. import device as devices
from ..errors import UserError

__all__ = ['CHOICES', 'Variants', 'is_in_environment', 'pointwise_form', 'set_variants', 'use_variants', 'variants']

_VARIABLE, _KERNELS = 'TIMM_NPU_IRV2_VARIANTS', 'TIMM_NPU_IRV2_KERNELS'
CHOICES = {
    'pointwise': ('convolution', 'large', 'product'),
    'siblings': ('merged', 'separate'),
    'residual': ('folded', 'addition'),
    'kernels': ('aten', 'triton'),
}


@dataclass(frozen=True)
class Variants:
    """The chosen forms.

    Attributes:
        pointwise: Form of 1×1 convolutions: 'convolution', 'product' (of matrices), or 'large': products outside the
            blocks where there are many positions; None for the choice of the device (:func:`.device.pointwise_form`).
        siblings: 1×1 convolutions that share their input: one ('merged'), or each of its own ('separate').
        residual: Place of the scale of a residual in training: 'folded' into the branch's last activation and bias, or
            in the 'addition'.
        kernels: Kernels of the operators: 'aten' or 'triton'.
    """

    pointwise: str | None = None
    siblings: str = 'merged'
    residual: str = 'folded'
    kernels: str = 'aten'


_current: Variants | None = None


def variants() -> Variants:
    """Return the chosen forms; the environment is read once.

    Raises:
        UserError: A variable of the environment has an unknown value.
    """
    global _current  # noqa: PLW0603 - one choice for a process
    if _current is None:
        _current = _parse(os.environ.get(_VARIABLE, ''))
    return _current


def is_in_environment(name: str) -> bool:
    """Return True if the user has chosen the form of an operation by a variable of the environment."""
    words = (part.partition('=')[0].strip() for part in os.environ.get(_VARIABLE, '').split(','))
    return name in words or (name == 'kernels' and os.environ.get(_KERNELS, 'auto') != 'auto')


def set_variants(**chosen: str) -> None:
    """Choose forms for the rest of the process.

    Raises:
        UserError: There is no such operation or no such form of it.
    """
    global _current  # noqa: PLW0603 - as above
    _check(chosen)
    _current = replace(variants(), **chosen)


@contextlib.contextmanager
def use_variants(**chosen: str) -> Iterator[Variants]:
    """Choose forms inside a context.

    Raises:
        UserError: There is no such operation or no such form of it.
    """
    global _current  # noqa: PLW0603 - as above
    before = variants()
    set_variants(**chosen)
    try:
        yield variants()
    finally:
        _current = before


def pointwise_form(x: Tensor) -> str:
    """Return the form of 1×1 convolutions of ``x``: the chosen one, or the choice of its device."""
    return variants().pointwise or devices.pointwise_form(x.device.type)


def _parse(text: str) -> Variants:
    pairs = [part.partition('=') for part in text.split(',') if part.strip()]
    chosen = {name.strip(): value.strip() for name, _, value in pairs}
    _check(chosen)
    kernels = os.environ.get(_KERNELS, 'auto')
    if kernels not in ('auto', *CHOICES['kernels']):
        raise UserError(f'{_KERNELS}={kernels}: use auto, aten or triton.')
    # 'auto' means ATen's on every device until `benchmark.py tune` has measured Triton's to be faster there.
    return Variants(**{'kernels': 'aten' if kernels == 'auto' else kernels, **chosen})


def _check(chosen: dict[str, str]) -> None:
    for name, value in chosen.items():
        if name not in {field.name for field in fields(Variants)} or value not in CHOICES[name]:
            known = ', '.join(f'{each}={"|".join(values)}' for each, values in CHOICES.items())
            raise UserError(f'{_VARIABLE}: no variant {name}={value}; there are {known}.')

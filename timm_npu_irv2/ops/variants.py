"""Forms of an operation that compute the same; which of them is fastest depends on the device.

``TIMM_NPU_IRV2_VARIANTS='pointwise=product'`` chooses for a process; :func:`use_variants` chooses inside a context.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from ..errors import UserError

__all__ = ['CHOICES', 'Variants', 'use_variants', 'variants']

_VARIABLE = 'TIMM_NPU_IRV2_VARIANTS'
CHOICES = {'pointwise': ('convolution', 'product')}


@dataclass(frozen=True)
class Variants:
    """The chosen forms.

    Attributes:
        pointwise: Form of 1×1 convolutions: 'convolution' or 'product' (of matrices).
    """

    pointwise: str = 'convolution'


_current: Variants | None = None


def variants() -> Variants:
    """Return the chosen forms; the environment is read once."""
    global _current  # noqa: PLW0603 - one choice for a process
    if _current is None:
        _current = _parse(os.environ.get(_VARIABLE, ''))
    return _current


@contextlib.contextmanager
def use_variants(**chosen: str) -> Iterator[Variants]:
    """Choose forms inside a context.

    Raises:
        UserError: There is no such operation or no such form of it.
    """
    global _current  # noqa: PLW0603 - as above
    before = variants()
    _check(chosen)
    _current = replace(before, **chosen)
    try:
        yield _current
    finally:
        _current = before


def _parse(text: str) -> Variants:
    pairs = [part.partition('=') for part in text.split(',') if part.strip()]
    chosen = {name.strip(): value.strip() for name, _, value in pairs}
    _check(chosen)
    return Variants(**chosen)


def _check(chosen: dict[str, str]) -> None:
    for name, value in chosen.items():
        if name not in {field.name for field in fields(Variants)} or value not in CHOICES[name]:
            known = ', '.join(f'{each}={"|".join(values)}' for each, values in CHOICES.items())
            raise UserError(f'{_VARIABLE}: no variant {name}={value}; there are {known}.')

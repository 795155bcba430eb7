"""The choice of a precision from the options."""

import math
from collections.abc import Iterable
from typing import Literal

import torch

from .. import device as devices
from ..errors import UserError
from .apex import Apex
from .base import Precision, dtype_name
from .loss_scale import create_scaler
from .native import Autocast, FullPrecision, HalfWeights

__all__ = ['create_precision']

OPT_LEVELS = ('O0', 'O1', 'O2')
HALF_TYPES = (torch.float16, torch.bfloat16)


def create_precision(
        device: torch.device,
        *,
        amp: bool = False,
        amp_impl: str = 'native',
        amp_dtype: torch.dtype | None = None,
        opt_level: str | None = None,
        loss_scale: float | Literal['dynamic'] | None = None,
        model_dtype: torch.dtype | None = None,
) -> 'Precision':
    """The precision that a user's options ask for.

    Args:
        device: The device the model trains on.
        amp: Mixed precision. Without it the model trains in ``model_dtype`` (float32 if that is None).
        amp_impl: 'native' (torch's own, also for O2) or 'apex'.
        amp_dtype: The 16-bit type; None takes the device's.
        opt_level: 'O0' float32, 'O1' autocast (what None means), 'O2' half weights with float32 masters.
        loss_scale: A constant, which costs no overflow check and no synchronisation; 'dynamic'; or None: dynamic
            where the 16-bit type needs a scale, none elsewhere.
        model_dtype: The dtype of all weights without mixed precision.

    Raises:
        UserError: The options contradict one another, or apex is asked for and missing.
    """
    _check_choice('--amp-impl', amp_impl, ('native', 'apex'))
    _check_choice('--opt-level', opt_level or 'O1', OPT_LEVELS)
    _check_loss_scale(loss_scale)
    if not amp:
        _check_no_amp(amp_impl, opt_level, loss_scale)
        return FullPrecision(model_dtype)
    if opt_level == 'O0' and loss_scale is not None:
        raise UserError(f'--loss-scale {loss_scale} has no effect with --opt-level O0: leave one of them out.')
    if model_dtype not in (None, torch.float32):
        raise UserError(f'--model-dtype {dtype_name(model_dtype)} and --amp exclude each other: use one of them.')
    dtype = amp_dtype or devices.half_dtype(device)
    if dtype not in HALF_TYPES:
        raise UserError(f'--amp-dtype {dtype_name(dtype)} is not a 16-bit type: use float16 or bfloat16.')
    if amp_impl == 'apex':
        if amp_dtype == torch.bfloat16:
            raise UserError('--amp-impl apex knows float16 only: use --amp-impl native with bfloat16.')
        return Apex(opt_level or 'O1', loss_scale)
    if opt_level == 'O0':
        return FullPrecision()
    scaler = create_scaler(device, dtype, loss_scale)
    return HalfWeights(dtype, scaler) if opt_level == 'O2' else Autocast(device, dtype, scaler)


def _check_choice(option: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise UserError(f"{option} {value}: use one of {', '.join(allowed)}.")


def _check_loss_scale(loss_scale: float | str | None) -> None:
    valid = loss_scale in (None, 'dynamic') or (
        isinstance(loss_scale, int | float) and math.isfinite(loss_scale) and loss_scale > 0)
    if not valid:
        raise UserError(f"--loss-scale {loss_scale}: use a positive number (128, say) or 'dynamic'.")


def _check_no_amp(amp_impl: str, opt_level: str | None, loss_scale: float | str | None) -> None:
    """Options that mean nothing without --amp are refused, so that nobody trains in float32 unawares."""
    for option, given in (
            ('--opt-level O2', opt_level == 'O2'),
            ('--amp-impl apex', amp_impl == 'apex'),
            (f'--loss-scale {loss_scale}', loss_scale is not None),
    ):
        if given:
            raise UserError(f'{option} has no effect without --amp: add --amp, or leave {option.split()[0]} out.')

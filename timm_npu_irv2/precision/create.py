"""From options to a precision."""

import math
from typing import Literal

import torch

from .. import device as devices
from ..errors import UserError
from .apex import Apex
from .base import Precision, dtype_name
from .loss_scale import create_scaler
from .native import Autocast, FullPrecision, HalfWeights

__all__ = ['check_options', 'create_precision']

LossScale = float | Literal['dynamic'] | None


def create_precision(
        device: torch.device,
        *,
        amp: bool = False,
        amp_impl: str = 'native',
        amp_dtype: torch.dtype | None = None,
        opt_level: str | None = None,
        loss_scale: LossScale = None,
        model_dtype: torch.dtype | None = None,
) -> Precision:
    """Create the precision that a user's options ask for.

    Args:
        device: The device that the model trains on.
        amp: Mixed precision. Without it the model trains in ``model_dtype`` (float32 if that is None).
        amp_impl: 'native' (torch's own, also for O2) or 'apex'.
        amp_dtype: The 16-bit type; the device's if None.
        opt_level: 'O0' float32, 'O1' autocast (the default), 'O2' half weights with float32 masters.
        loss_scale: A constant, which costs no overflow check and no synchronisation; 'dynamic'; or None: dynamic
            where the 16-bit type needs a scale, none elsewhere.
        model_dtype: The dtype of all weights without mixed precision.

    Raises:
        UserError: The options contradict one another, or apex is asked for and missing.
    """
    check_options(amp=amp, amp_impl=amp_impl, amp_dtype=amp_dtype, opt_level=opt_level, loss_scale=loss_scale,
                  model_dtype=model_dtype)
    if not amp:
        return FullPrecision(model_dtype)
    if amp_impl == 'apex':
        return Apex(opt_level or 'O1', loss_scale)
    if opt_level == 'O0':
        return FullPrecision()
    dtype = amp_dtype or devices.half_dtype(device)
    scaler = create_scaler(device, dtype, loss_scale)
    return HalfWeights(dtype, scaler) if opt_level == 'O2' else Autocast(device, dtype, scaler)


def check_options(
        *,
        amp: bool,
        amp_impl: str,
        amp_dtype: torch.dtype | None,
        opt_level: str | None,
        loss_scale: float | str | None,
        model_dtype: torch.dtype | None,
) -> None:
    """Check the options of :func:`create_precision` against one another, before any device is touched.

    Options that have no effect without --amp are refused, so that nobody trains in float32 by mistake.

    Raises:
        UserError: One of them is out of range, or two contradict each other.
    """
    mixed = amp and opt_level != 'O0'
    positive = isinstance(loss_scale, int | float) and math.isfinite(loss_scale) and loss_scale > 0
    for wrong, message in (
            (amp_impl not in ('native', 'apex'), f'--amp-impl {amp_impl}: use native or apex.'),
            (opt_level not in (None, 'O0', 'O1', 'O2'), f'--opt-level {opt_level}: use O0, O1 or O2.'),
            (loss_scale not in (None, 'dynamic') and not positive,
             f"--loss-scale {loss_scale}: use a positive number (128, say) or 'dynamic'."),
            (opt_level == 'O2' and not amp, '--opt-level O2 needs --amp.'),
            (amp_impl == 'apex' and not amp, '--amp-impl apex needs --amp or --opt-level O1 or O2.'),
            (loss_scale is not None and not mixed, f'--loss-scale {loss_scale} needs --amp or --opt-level O1 or O2.'),
            (amp and model_dtype not in (None, torch.float32),
             f'--model-dtype {dtype_name(model_dtype or torch.float32)} is for training without --amp: leave one out.'),
            (amp and amp_dtype not in (None, torch.float16, torch.bfloat16),
             f'--amp-dtype {dtype_name(amp_dtype or torch.float32)} is not a 16-bit type: use float16 or bfloat16.'),
            (amp_impl == 'apex' and amp_dtype == torch.bfloat16,
             '--amp-impl apex supports float16 only: use --amp-impl native with bfloat16.'),
    ):
        if wrong:
            raise UserError(message)

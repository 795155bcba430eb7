"""The choice of the operators' kernels: ATen's or Triton's."""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

from ..errors import UserError

_VARIABLE = 'TIMM_NPU_IRV2_KERNELS'


@functools.cache
def triton_kernels() -> ModuleType | None:
    """Return the Triton kernels if TIMM_NPU_IRV2_KERNELS=triton asks for them, else None for ATen's.

    ``auto``, the default, means ``aten`` on every device until somebody has measured Triton's to be faster there, with
    ``train_scripts/benchmark.py ops``. The variable is read once.

    Raises:
        UserError: The variable has another value, or Triton is not installed.
    """
    choice = os.environ.get(_VARIABLE, 'auto')
    if choice not in ('auto', 'aten', 'triton'):
        raise UserError(f'{_VARIABLE}={choice}: use auto, aten or triton.')
    if choice != 'triton':
        return None
    if importlib.util.find_spec('triton') is None:
        raise UserError(f'{_VARIABLE}=triton needs Triton: pip install triton, or triton-ascend on an NPU.')
    return importlib.import_module('._triton', __package__)

"""The operators' torch.library namespace, ``torch.ops.timm_npu_irv2``, and the choice of their kernels."""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

from ..errors import UserError

# Kept for the life of the process: an operator's registrations go when their Library object does.
LIBRARY = torch.library.Library('timm_npu_irv2', 'DEF')

_VARIABLE = 'TIMM_NPU_IRV2_KERNELS'


@functools.cache
def triton_kernels() -> ModuleType | None:
    """The Triton kernels if TIMM_NPU_IRV2_KERNELS=triton asks for them, else None: ATen's.

    ``auto``, the default, means ``aten`` on every device until somebody has measured the others to be faster there:
    ``train_scripts/benchmark.py ops`` does. The variable is read once.

    Raises:
        UserError: The variable has no such value, or there is no Triton.
    """
    choice = os.environ.get(_VARIABLE, 'auto')
    if choice not in ('auto', 'aten', 'triton'):
        raise UserError(f'{_VARIABLE}={choice}: use auto, aten or triton.')
    if choice != 'triton':
        return None
    if importlib.util.find_spec('triton') is None:
        raise UserError(f'{_VARIABLE}=triton needs Triton: pip install triton, or triton-ascend on an NPU.')
    return importlib.import_module('._triton', __package__)

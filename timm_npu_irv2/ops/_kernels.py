"""The choice of the operators' kernels: ATen's or Triton's."""

import functools
import importlib
import importlib.util
from types import ModuleType

from ..errors import UserError
from .variants import variants


def triton_kernels() -> ModuleType | None:
    """Return the Triton kernels if they are chosen (see :mod:`.variants`), else None for ATen's.

    Raises:
        UserError: Triton is not installed.
    """
    return _load_triton() if variants().kernels == 'triton' else None


@functools.cache
def _load_triton() -> ModuleType:
    if importlib.util.find_spec('triton') is None:
        raise UserError('TIMM_NPU_IRV2_KERNELS=triton needs Triton: pip install triton, or triton-ascend on an NPU.')
    return importlib.import_module('._triton', __package__)

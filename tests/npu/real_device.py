"""The NPU of this machine, for tests of a real one: `python -m tests.npu.real_device` names it, or tells in one line,
with exit code 2, why there is none. With REAL_NPU=cpu the tests run on the CPU instead."""

import os
import sys

import torch

from timm_npu_irv2 import UserError
from timm_npu_irv2 import device as devices

from ..ascend.environment import running_on

CHOSEN = os.environ.get('REAL_NPU', 'npu')


def find() -> torch.device:
    """The device.

    Raises:
        UserError: There is no real NPU.
    """
    if CHOSEN == 'npu' and running_on() is not None:
        raise UserError('this process runs on the stand-in for CANN.')
    return devices.resolve_device(CHOSEN)


def describe() -> str:
    """The device and the versions of its software."""
    versions = ', '.join(f'{name} {version}' for name, version in devices.versions().items())
    return f'{devices.describe(find())["name"]}; {versions}'


if __name__ == '__main__':
    try:
        print(describe())
    except UserError as error:
        print(error)
        sys.exit(2)

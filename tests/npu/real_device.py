"""The NPU of this machine, for tests of a real one: `python -m tests.npu.real_device` names it, or tells in one line,
with exit code 2, why there is none."""

import sys

from timm_npu_irv2 import UserError
from timm_npu_irv2 import device as devices

from ..ascend.environment import running_on


def describe() -> str:
    """The device and the versions of its software.

    Raises:
        UserError: There is no real NPU.
    """
    if running_on() is not None:
        raise UserError('this process runs on the stand-in for CANN.')
    device = devices.resolve_device('npu')
    versions = ', '.join(f'{name} {version}' for name, version in devices.versions().items())
    return f'{devices.describe(device)["name"]}; {versions}'


if __name__ == '__main__':
    try:
        print(describe())
    except UserError as error:
        print(error)
        sys.exit(2)

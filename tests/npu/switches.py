"""Switches as torch_npu, CANN and HCCL have them: `python -m tests.npu.switches [options of train.py]` prints those
before and after train.py's own calls, and after a block in which `tune` has set others, as JSON."""

import ctypes
import json
import sys

import torch
import torch_npu

from timm_npu_irv2 import device as devices
from timm_npu_irv2.cli.flags import device_switches
from timm_npu_irv2.training.options import parse_args
from timm_npu_irv2.tuning import apply_settings, preserve_settings


def state() -> dict:
    """What each of the three libraries has been told."""
    (torch.ones(2, device='npu') + 1).cpu()  # torch_npu tells CANN when it launches an operator
    level, config = ctypes.c_int64(), ctypes.c_int32()
    ctypes.CDLL('libascendcl.so').aclrtGetSysParamOpt(0, ctypes.byref(level))  # ACL_OPT_DETERMINISTIC
    ctypes.CDLL('libhccl.so').HcclGetConfig(0, ctypes.byref(config))  # HCCL_DETERMINISTIC
    return {'convolutions': torch.npu.conv.allow_hf32, 'products': torch.npu.matmul.allow_hf32,
            'jit_compile': not torch.npu.is_jit_compile_false(),
            'internal_format': torch_npu._C._npu_getOption('ALLOW_INTERNAL_FORMAT').decode(),
            'deterministic': level.value, 'hccl': config.value}


def main() -> None:
    args = parse_args(['--data-dir', '.', *sys.argv[1:]])
    device = devices.resolve_device('npu')
    states = [state()]
    devices.configure(device, **device_switches(args))
    states.append(state())
    with preserve_settings(device):
        apply_settings({'allow_hf32': not states[1]['products'], 'allow_internal_format': True}, device)
        inside = {'products': torch.npu.matmul.allow_hf32,
                  'internal_format': torch_npu._C._npu_getOption('ALLOW_INTERNAL_FORMAT').decode()}
    print(json.dumps([*states, state(), inside]))


if __name__ == '__main__':
    main()

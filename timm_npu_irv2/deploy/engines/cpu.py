"""Facts about this machine's CPU that engines depend on."""

import platform
from pathlib import Path

import torch

__all__ = ['cpu_name', 'saturates_int8']


def cpu_name() -> str:
    """Return the name of the CPU as Linux shows it, and its vector instructions as torch uses them."""
    name = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.exists():
        lines = info.read_text(encoding='utf-8', errors='replace').splitlines()
        name = next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), name)
    return f'{name}, {torch.backends.cpu.get_cpu_capability()}'


def saturates_int8() -> bool:
    """Return True if sums of two int8 products overflow 16 bits here: on x86 without VNNI.

    There, weights need to be of 7 bits.
    """
    # A private name, but the only one from torch 2.5 on.
    return platform.machine().lower() in ('x86_64', 'amd64') and not torch.cpu._is_vnni_supported()

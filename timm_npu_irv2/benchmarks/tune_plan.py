"""The settings that ``benchmark.py tune`` tries on a device, in groups, and what each of them changes."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import device as devices
from ..ops.variants import CHOICES

__all__ = ['Alternative', 'plan']

@dataclass(frozen=True)
class Alternative:
    """A value of a setting that is tried against the fastest settings so far.

    Attributes:
        group: Name of the group.
        settings: Settings that the alternative changes.
    """

    group: str
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name in tables, such as 'pointwise=product'."""
        return ', '.join(f'{name}={_word(value)}' for name, value in self.settings.items())


def _word(value: Any) -> str:
    return {True: 'on', False: 'off'}.get(value, str(value)) if isinstance(value, bool) else str(value)


def plan(task: str, device: torch.device, precision: str) -> list[Alternative]:
    """Return the alternatives that exist on a device, in the order in which they are tried.

    Args:
        task: 'train' or 'eval'.
        device: Device to tune for.
        precision: Precision in words.
    """
    found = [
        *([Alternative('kernels', {'kernels': 'triton'})] if _has_triton(device) else []),
        *_values('pointwise', devices.pointwise_form(device.type), CHOICES['pointwise']),
        *_values('siblings', 'merged', CHOICES['siblings']),
        *(each for name in devices.backend(device).tunable for each in _values(name, *_tunable(name, device))),
    ]
    if task == 'train':
        return [
            *found,
            *_values('residual', 'folded', CHOICES['residual']),
            # Over the flat buffers of O2 SGD is fused where it can be.
            Alternative('fused_optimizer', {'fused_optimizer': not precision.startswith('O2')}),
            Alternative('torchcompile', {'torchcompile': 'inductor'}),
            Alternative('recompute', {'recompute': 'cheap'}),
        ]
    engines = [Alternative('engine', {'engine': name}) for name in ('torch', 'openvino', 'onnxruntime', 'om')
               if _has_engine(name, device)]
    return [*engines, *found, Alternative('torchcompile', {'torchcompile': 'inductor'})]


def _tunable(name: str, device: torch.device) -> tuple[Any, tuple[Any, ...]]:
    """Return the default of a setting, and all its values. None: the default is the vendor's choice for the chip."""
    return {
        'memory_format': (_layout_name(device), ('contiguous', 'channels_last')),
        'lazy_fusion': (os.environ.get('TORCH_NPU_LAZY_FUSION') == 'True', (True, False)),
        'task_queue': (os.environ.get('TASK_QUEUE_ENABLE', '1'), (1, 2)),
        'cudnn_benchmark': (True, (True, False)),
        'allow_tf32': (True, (True, False)),
    }.get(name, (None, (True, False)))


def _values(name: str, default: Any, values: tuple[Any, ...]) -> list[Alternative]:
    return [Alternative(name, {name: value}) for value in values if str(value) != str(default)]


def _layout_name(device: torch.device) -> str:
    return 'channels_last' if devices.memory_format(device) == torch.channels_last else 'contiguous'


def _has_triton(device: torch.device) -> bool:
    return device.type != 'cpu' and importlib.util.find_spec('triton') is not None


def _has_engine(name: str, device: torch.device) -> bool:
    if name == 'torch':
        return True
    if name == 'om':
        return device.type == 'npu'
    return device.type == 'cpu' and importlib.util.find_spec(name) is not None

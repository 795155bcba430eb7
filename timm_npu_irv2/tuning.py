"""Results of ``benchmark.py tune``: the fastest settings that were measured for a workload on a device.

A result is a JSON file in the user's cache folder, and is valid for exactly the workload, the device and the versions
that it names. :func:`find_tuned` looks for one.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import device as devices
from . import rules, schema
from .errors import UserError, one_line
from .ops import set_variants
from .ops.variants import CHOICES
from .serialization import atomic_write, cache_folder, make_folder

__all__ = ['Tuned', 'Workload', 'apply_settings', 'environment_of', 'find_tuned', 'load_tuned', 'resolve_tuned',
           'save_tuned']

# Settings that torch_npu reads from the environment when it is loaded: {setting: (variable, {value: text})}.
_ENVIRONMENT: dict[str, tuple[str, dict[Any, str]]] = {
    'lazy_fusion': ('TORCH_NPU_LAZY_FUSION', {True: 'True', False: 'False'}),
    'task_queue': ('TASK_QUEUE_ENABLE', {0: '0', 1: '1', 2: '2'}),
}
_LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
_SWITCHES = ('allow_internal_format', 'jit_compile', 'allow_hf32', 'allow_tf32', 'cudnn_benchmark')


@dataclass(frozen=True)
class Workload:
    """A workload on a device, for which a result is valid.

    Attributes:
        task: 'train' (forward, backward, step) or 'eval'.
        device: Type of the device.
        name: Name of the device.
        threads: Threads of a CPU; 0 elsewhere.
        batch_size: Images in a batch.
        img_size: Height and width of an image in pixels.
        precision: Precision in words, such as 'float32' or 'O2 float16'.
        versions: {package: version}.
    """

    task: str
    device: str
    name: str
    threads: int
    batch_size: int
    img_size: int
    precision: str
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def on(cls, device: torch.device, *, task: str, batch_size: int, img_size: int, precision: str) -> 'Workload':
        """Return the workload on ``device`` with the versions of this process."""
        threads = torch.get_num_threads() if device.type == 'cpu' else 0
        about = devices.describe(device)
        return cls(task, device.type, about['name'], threads, batch_size, img_size, precision, devices.versions())

    @property
    def path(self) -> Path:
        """File of a result in the package's cache folder."""
        words = f'{self.task}-{self.name}-{self.precision}-b{self.batch_size}-{self.img_size}px'
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return cache_folder() / 'tuned' / f'{re.sub(r"[^A-Za-z0-9.]+", "-", words)}-{digest[:10]}.json'


@dataclass(frozen=True)
class Tuned:
    """A result.

    Attributes:
        workload: The workload that was measured.
        chosen: {setting: value} of all settings that are not the default.
        path: The file.
        report: Everything in the file.
    """

    workload: Workload
    chosen: Mapping[str, Any]
    path: Path
    report: Mapping[str, Any]


def find_tuned(
        device: torch.device,
        *,
        task: str,
        batch_size: int,
        img_size: int,
        precision: str,
) -> Tuned | None:
    """Return the result that fits a workload exactly, or None.

    Args:
        device: Device of the workload.
        task: 'train' or 'eval'.
        batch_size: Images in a batch.
        img_size: Height and width of an image in pixels.
        precision: Precision in words: the dtype's name for 'eval'.

    Raises:
        UserError: There is a file, but it is damaged.
    """
    workload = Workload.on(device, task=task, batch_size=batch_size, img_size=img_size, precision=precision)
    path = workload.path
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file may raise PermissionError
        return None
    tuned = load_tuned(path)
    return tuned if tuned.workload == workload else None


def load_tuned(path: str | Path) -> Tuned:
    """Return the result in a file.

    Raises:
        UserError: The file cannot be read, or is not as :mod:`.schema` describes.
    """
    path = Path(path)
    try:
        report = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'cannot read {path}: {one_line(error)}. Run `benchmark.py tune` again.') from error
    with rules.naming(path):
        schema.check_tuned(report)
    return Tuned(Workload(**report['workload']), report['chosen'], path, report)


def resolve_tuned(choice: str, device: torch.device, **workload: Any) -> Tuned | None:
    """Return the result that --tuned names, or None.

    Args:
        choice: 'auto' for the one that fits exactly, 'off' for none, or a file.
        device: Device of the workload.
        **workload: Arguments of :func:`find_tuned`.

    Raises:
        UserError: The file is not a result, or is one for another kind of device or task.
    """
    if choice in ('auto', 'off'):
        return find_tuned(device, **workload) if choice == 'auto' else None
    tuned = load_tuned(choice)
    measured = tuned.workload
    if (measured.device, measured.task) != (device.type, workload['task']):
        raise UserError(f'--tuned {choice}: it is for {measured.task} on {measured.device}, not for '
                        f'{workload["task"]} on {device.type}.')
    return tuned


def save_tuned(workload: Workload, report: Mapping[str, Any], output: Path | None = None) -> Path:
    """Write a result and return its path.

    Args:
        workload: The workload that was measured.
        report: Entries of the file besides the workload; 'chosen' is one.
        output: File to write instead of that in the cache folder.

    Raises:
        CannotWrite: The disk is full, or the folder refuses the file.
    """
    path = output or workload.path
    make_folder(path.parent)
    atomic_write(path, json.dumps({'format': 1, 'workload': asdict(workload), **report}, indent=2) + '\n')
    return path


def environment_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables that the environment of a process with these settings must have when it starts."""
    return {variable: texts[settings[name]] for name, (variable, texts) in _ENVIRONMENT.items() if name in settings}


def apply_settings(settings: Mapping[str, Any], device: torch.device) -> None:
    """Make the settings that hold for a whole process: forms of operations, layout, switches of the backend."""
    set_variants(**{name: settings[name] for name in CHOICES if name in settings})
    if 'memory_format' in settings:
        devices.use_memory_format(device, _LAYOUTS[settings['memory_format']])
    if switches := {name: settings[name] for name in _SWITCHES if name in settings}:
        devices.configure(device, **switches)

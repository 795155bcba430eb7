"""Results of ``benchmark.py tune``: the fastest settings that were measured for a workload on a device.

A result is a JSON file in the user's cache folder, and is valid for exactly the workload, the device and the versions
that it names. :func:`find_tuned` looks for one.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import device as devices
from . import rules, schema
from .chips import cpu_name
from .errors import UserError
from .ops import set_variants, use_variants
from .ops.variants import CHOICES, is_in_environment
from .serialization import atomic_write, cache_folder, make_folder, read_json

__all__ = ['Tuned', 'Workload', 'apply_settings', 'describe_missing', 'describe_outdated', 'environment_of',
           'find_tuned', 'is_complete', 'load_tuned', 'preserve_settings', 'resolve_tuned', 'save_tuned']

# Settings that torch_npu reads from the environment when it is loaded: {setting: (variable, {value: text})}.
_ENVIRONMENT: dict[str, tuple[str, dict[Any, str]]] = {
    'lazy_fusion': ('TORCH_NPU_LAZY_FUSION', {True: 'True', False: 'False'}),
    'task_queue': ('TASK_QUEUE_ENABLE', {0: '0', 1: '1', 2: '2'}),
}
_LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
_ENGINES = ('onnxruntime', 'openvino')  # packages that decide which engine is the fastest
_SWITCHES = ('allow_internal_format', 'jit_compile', 'allow_hf32', 'allow_tf32', 'cudnn_benchmark')


_LABELS = {'task': 'task', 'device': 'device', 'name': 'device', 'threads': 'threads', 'batch_size': 'batch',
           'img_size': 'image size', 'precision': 'precision'}


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
        name, threads, versions = devices.describe(device)['name'], 0, devices.versions()
        if device.type == 'cpu':
            name, threads = f'{cpu_name()}, {name}', torch.get_num_threads()
        for package in _ENGINES if task == 'eval' else ():
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        return cls(task, device.type, name, threads, batch_size, img_size, precision, versions)

    @property
    def path(self) -> Path:
        """File of a result in the package's cache folder."""
        words = f'{self.task}-{self.name}-{self.precision}-b{self.batch_size}-{self.img_size}px'
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return cache_folder() / 'tuned' / f'{re.sub(r"[^A-Za-z0-9.]+", "-", words)[:150]}-{digest[:10]}.json'

    def differences(self, other: 'Workload') -> str:
        """Return what another workload has else, as in 'batch 8, not 4; torch 2.13.0, not 2.14.1'; '' for nothing."""
        pairs = [(f'{label} ', getattr(self, name), getattr(other, name)) for name, label in _LABELS.items()]
        pairs += [(f'{name} ', self.versions.get(name, 'missing'), other.versions.get(name, 'missing'))
                  for name in {**self.versions, **other.versions}]
        return '; '.join(f'{label}{theirs}, not {own}' for label, own, theirs in pairs if own != theirs)


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

    def describe(self, settings: Mapping[str, Any]) -> str:
        """Return the line of a script that uses some of the result's settings."""
        words = ', '.join(f'{name}={value}' for name, value in settings.items()) or 'the default ones'
        return f'Tuned settings: {words} (from {self.path}; --tuned off ignores it).{describe_missing(settings)}'


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


def describe_outdated(device: torch.device, **workload: Any) -> str:
    """Return the line about a result for the same batches on another device or with other versions; '' for none.

    Args:
        device: Device of the workload.
        **workload: Arguments of :func:`find_tuned`.
    """
    here = Workload.on(device, **workload)
    for path in sorted(here.path.parent.glob(f'{here.task}-*.json')):
        with contextlib.suppress(UserError):
            other = load_tuned(path).workload
            if replace(other, name=here.name, threads=here.threads, versions=here.versions) == here:
                return (f'Tuned settings: {path} is not used, since it was measured on {here.differences(other)}. '
                        'Run `benchmark.py tune` again.')
    return ''


def load_tuned(path: str | Path) -> Tuned:
    """Return the result in a file.

    Raises:
        UserError: The file cannot be read, or is not as :mod:`.schema` describes.
    """
    path = Path(path)
    try:
        report = read_json(path)
    except UserError as error:
        raise UserError(f'{str(error).rstrip(".")}. Run `benchmark.py tune` again.') from error
    with rules.naming(path):
        schema.check_tuned(report)
    return Tuned(Workload(**report['workload']), report['chosen'], path, report)


def is_complete(path: Path) -> bool:
    """Return True if a file has the result of a search that nobody interrupted."""
    with contextlib.suppress(UserError):
        return not load_tuned(path).report.get('interrupted')
    return False


def resolve_tuned(choice: str, device: torch.device, **workload: Any) -> Tuned | None:
    """Return the result that --tuned names, or None.

    Args:
        choice: 'auto' for the one that fits exactly, 'off' for none, or a file.
        device: Device of the workload.
        **workload: Arguments of :func:`find_tuned`.

    Raises:
        UserError: The file is not a result, or is one for another device, other versions or another task.
    """
    if choice in ('auto', 'off'):
        return find_tuned(device, **workload) if choice == 'auto' else None
    tuned, here = load_tuned(choice), Workload.on(device, **workload)
    measured = tuned.workload
    if (measured.device, measured.task) != (device.type, here.task):
        raise UserError(f'--tuned {choice}: it is for {measured.task} on {measured.device}, not for '
                        f'{here.task} on {device.type}.')
    # Other batches may well run best with the same settings.
    same_batches = replace(measured, threads=here.threads, batch_size=here.batch_size, img_size=here.img_size,
                           precision=here.precision)
    if different := here.differences(same_batches):
        raise UserError(f'--tuned {choice}: it was measured on {different}. Run `benchmark.py tune` again.')
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


def describe_missing(settings: Mapping[str, Any]) -> str:
    """Return the sentence that tells how to start a process with all of these settings; '' if it has them."""
    missing = {name: value for name, value in environment_of(settings).items() if os.environ.get(name) != value}
    words = ' '.join(f'{name}={value}' for name, value in missing.items())
    return f' Start with {words} for all of them: torch_npu reads that when it is loaded.' if missing else ''


def environment_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables that the environment of a process with these settings must have when it starts."""
    return {variable: texts[settings[name]] for name, (variable, texts) in _ENVIRONMENT.items() if name in settings}


@contextlib.contextmanager
def preserve_settings(device: torch.device) -> Iterator[None]:
    """Restore at the end of the block what :func:`apply_settings` has made in it."""
    with use_variants(), devices.preserve_switches(device):
        yield


def apply_settings(settings: Mapping[str, Any], device: torch.device) -> None:
    """Make the settings that hold for a whole process: forms of operations, layout, switches of the backend.

    Forms that a variable of the environment names stay as they are.
    """
    set_variants(**{name: settings[name] for name in CHOICES if name in settings and not is_in_environment(name)})
    if 'memory_format' in settings:
        devices.use_memory_format(device, _LAYOUTS[settings['memory_format']])
    if switches := {name: settings[name] for name in _SWITCHES if name in settings}:
        devices.configure(device, **switches)

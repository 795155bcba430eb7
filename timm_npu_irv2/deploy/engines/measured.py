"""Speeds of the engines as they were measured on this machine, which ``engine='auto'`` chooses by.

``benchmark.py infer`` records them: one file in the user's cache folder for each dtype, number of threads, CPU and set
of versions. A record is valid for exactly these.
"""

import hashlib
import importlib.metadata
import json
import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError, first_line
from ...serialization import atomic_write, cache_folder, make_folder
from .cpu import cpu_name

__all__ = ['fastest_engine', 'record_engines', 'record_path']

_PACKAGES = ('timm-npu-irv2', 'torch', 'onnxruntime', 'openvino')


def fastest_engine(dtype: str) -> str | None:
    """Return the engine with the best record for a dtype on this machine's CPU; None without a record.

    Best is the geometric mean of the rate of batches and that of single images.

    Raises:
        UserError: The record is damaged.
    """
    path = record_path(dtype)
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file may raise PermissionError
        return None
    try:
        speeds = json.loads(path.read_text(encoding='utf-8'))['engines']
        return max(speeds, key=lambda name: speeds[name]['images_per_second'] / speeds[name]['latency_ms'])
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise UserError(f'{path} is damaged ({first_line(error)}): run `benchmark.py infer` again.') from error


def record_engines(dtype: str, speeds: Mapping[str, Mapping[str, float]]) -> Path:
    """Write the speeds of engines for a dtype and return the file.

    Args:
        dtype: Name of the dtype.
        speeds: {engine: {'images_per_second': rate of batches, 'latency_ms': time of a single image}}.

    Raises:
        CannotWrite: The cache folder cannot be written to.
    """
    path = record_path(dtype)
    make_folder(path.parent)
    atomic_write(path, json.dumps({**_machine(dtype), 'engines': speeds}, indent=2) + '\n')
    return path


def record_path(dtype: str) -> Path:
    """Return the file of a dtype, in the package's cache folder."""
    digest = hashlib.sha256(json.dumps(_machine(dtype), sort_keys=True).encode()).hexdigest()
    return cache_folder() / 'engines' / f'{dtype}-{digest[:12]}.json'


def _machine(dtype: str) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {'dtype': dtype, 'cpu': cpu_name(), 'threads': torch.get_num_threads(), 'versions': versions}

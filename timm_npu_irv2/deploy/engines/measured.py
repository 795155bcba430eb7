"""The engine that ``engine='auto'`` stands for on this machine's CPU.

``benchmark.py tune --task eval`` and ``benchmark.py infer`` record the fastest one that they measured: a file in the
user's cache folder for each dtype, number of threads, CPU and set of versions, for which alone it is valid. A later
measurement takes the place of an earlier one.
"""

import hashlib
import importlib.metadata
import json
import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ... import rules, schema
from ...chips import cpu_name
from ...errors import UserError
from ...serialization import atomic_write, cache_folder, make_folder, read_json

__all__ = ['fastest_engine', 'record_engine', 'record_path']

_PACKAGES = ('timm-npu-irv2', 'torch', 'onnxruntime', 'openvino')


def fastest_engine(dtype: str) -> str | None:
    """Return the engine that was measured to be the fastest for a dtype on this machine's CPU; None without a record.

    Raises:
        UserError: The record is damaged.
    """
    path = record_path(dtype)
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file may raise PermissionError
        return None
    try:
        record = read_json(path)
        with rules.naming(path):
            rules.record({'engine': rules.one_of(*schema.ENGINES)})(record, '')
    except UserError as error:
        raise UserError(f'{error} Run `benchmark.py infer` again, or remove it.') from error
    return record['engine']


def record_engine(dtype: str, engine: str, figures: Mapping[str, Any]) -> Path:
    """Write the name of the fastest engine for a dtype and return the file.

    Args:
        dtype: Name of the dtype.
        engine: Name of the engine.
        figures: What was measured, for people.

    Raises:
        CannotWrite: The cache folder cannot be written to.
    """
    path = record_path(dtype)
    make_folder(path.parent)
    atomic_write(path, json.dumps({**_machine(dtype), 'engine': engine, 'figures': figures}, indent=2) + '\n')
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
    cpu = f'{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}'
    return {'dtype': dtype, 'cpu': cpu, 'threads': torch.get_num_threads(), 'versions': versions}

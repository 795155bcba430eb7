"""The shards of a split: their places, and how many samples each has.

``_info.json`` beside the shards tells it, as timm reads it and ``timm-npu-irv2 shards`` writes it. Otherwise the shards
are named, and their samples are counted.
"""

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import rules, schema
from ..errors import UserError, one_line
from ..serialization import open_regular
from .fetch import Missing, fetch, is_remote, local_path, shorten
from .shard_files import ShardFiles

__all__ = ['INFO', 'ShardList', 'find_shards']

INFO = '_info.json', 'info.json'


@dataclass(frozen=True)
class ShardList:
    """The shards of a split.

    Attributes:
        urls: Files, URLs or pipes.
        lengths: Number of samples in each.
        hashes: SHA-256 of each; empty where they are not known.
        label: Field of the .json files that holds the class; '' for the .cls files.
        class_to_idx: Numbers of the classes by name; empty where they are not known.
        total: Number of samples that the split is said to have; None where nobody says.
        damaged: Reasons by the names of the shards whose end cannot be read.
    """

    urls: tuple[str, ...]
    lengths: tuple[int, ...] = ()
    hashes: tuple[str, ...] = ()
    label: str = ''
    class_to_idx: dict[str, int] = field(default_factory=dict)
    total: int | None = None
    damaged: dict[str, str] = field(default_factory=dict)


def find_shards(root: str, split: str, on_bad_image: str = 'stop') -> ShardList:
    """Return the shards of a split, with their numbers of samples.

    Args:
        root: Folder or URL of the shards.
        split: Name of a split in ``_info.json``, or names of shards such as ``train-{0000..0003}.tar``; a number of
            samples may follow after ``|``.
        on_bad_image: 'stop' or 'skip' at a shard that cannot be read to its end.

    Raises:
        UserError: No such folder, split or shard, or a damaged shard.
    """
    if root and not is_remote(root) and not local_path(root).is_dir():
        raise UserError(f"data folder '{root}' does not exist: check --data-dir.")
    info = _read_info(root)
    splits = info.get('splits', {})
    if 'tar' not in split and '..' not in split:
        if split not in splits:
            raise UserError(f"there is no split '{split}' in '{shorten(root)}': " + (
                f'use {", ".join(splits)}, or name the shards, such as' if splits else
                'without _info.json name the shards, such as') + " 'train-{0000..0003}.tar'.")
        return _from_info(root, splits[split], info)
    names, _, total = split.rpartition('|') if re.search(r'\|\d+$', split) else (split, '', '')
    found = _named(root, _expand(names), splits, info)
    return replace(found if found.lengths else _count(found, on_bad_image), total=int(total) if total else None)


def _read_info(root: str) -> dict[str, Any]:
    """Return the content of ``_info.json``; nothing if there is none."""
    for name in INFO:
        url = _join(root, name)
        try:
            content = _read(url)
        except Missing:
            continue
        try:
            info = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f'{shorten(url)} cannot be read as JSON: {one_line(error)}.') from error
        with rules.naming(shorten(url)):
            schema.check_shards(info)
        return info
    return {}


def _read(url: str) -> bytes:
    if url.startswith('pipe:'):
        raise Missing('a pipe has no folder')
    with tempfile.TemporaryDirectory(prefix='timm_npu_irv2-') as folder:
        path = local_path(url)
        if is_remote(url):
            path = Path(folder) / 'info'
            fetch(url, path)
        try:
            with open_regular(path) as file:
                return file.read()
        except FileNotFoundError as error:
            raise Missing(f'{path} does not exist.') from error
        except OSError as error:
            raise UserError(f'{path} cannot be read: {error.strerror}.') from error


def _from_info(root: str, split: dict[str, Any], info: dict[str, Any]) -> ShardList:
    return ShardList(
        tuple(_join(root, name) for name in split['filenames']), tuple(split['shard_lengths']),
        tuple(split.get('sha256') or ()), split.get('alt_label') or '', info.get('class_to_idx', {}))


def _named(root: str, names: Sequence[str], splits: dict[str, Any], info: dict[str, Any]) -> ShardList:
    """Return shards by their names, with what ``_info.json`` tells if it knows them all."""
    urls = tuple(_join(root, name) for name in names)
    for split in splits.values():
        places = {name: place for place, name in enumerate(split['filenames'])}
        if all(name in places for name in names):
            chosen = [places[name] for name in names]
            whole = _from_info(root, split, info)
            return replace(whole, urls=urls, lengths=tuple(whole.lengths[place] for place in chosen),
                           hashes=tuple(whole.hashes[place] for place in chosen) if whole.hashes else ())
    return ShardList(urls)


def _expand(names: str) -> list[str]:
    try:
        from webdataset.shardlists import expand_urls  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise UserError('the names of shards need WebDataset: pip install webdataset.') from error
    return expand_urls(names)


def _join(root: str, name: str) -> str:
    if not root or is_remote(name) or name.startswith(('/', 'file:')):
        return name
    return f'{root.rstrip("/")}/{name}'


def _count(shards: ShardList, on_bad_image: str) -> ShardList:
    """Count the samples of shards, each of which is read once for it."""
    files, lengths, damaged = ShardFiles(shards.urls), [], {}
    for number, url in enumerate(shards.urls):
        length, error = files.count(number)
        if error and on_bad_image == 'stop':
            raise UserError(f'shard {shorten(url)} cannot be read: {error}')
        if error:
            damaged[shorten(url)] = error
        lengths.append(length)
    return replace(shards, lengths=tuple(lengths), damaged=damaged)

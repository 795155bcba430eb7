"""Splits of a data set in a folder: subfolders or tar files named train, val, test and so on."""

import os
from collections.abc import Collection
from pathlib import Path

from ..errors import UserError

__all__ = ['check_split_name', 'find_split']

_SYNONYMS = (  # those of timm, and test
    ('train', 'training'),
    ('validation', 'val', 'valid', 'eval', 'evaluation'),
    ('test', 'testing'),
)
_KNOWN = {name for names in _SYNONYMS for name in names}


def find_split(root: str | os.PathLike, split: str) -> Path:
    """Return the folder or tar file of a split.

    It is looked for in ``root`` and in ``root``/data, by its name and then by the usual other names for it. A tar file,
    and a folder that has no splits but class folders, are taken for the split that was meant.

    Args:
        root: Folder or tar file.
        split: Name of the split; train, validation and test have several names.

    Raises:
        UserError: No such folder, or no such split in it; the message names the splits that are there.
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"data folder '{root}' does not exist: check --data-dir.")
    if root.is_file():
        return root
    wanted = (split.lower(), *_synonyms(split))
    for folder in (root, root / 'data'):
        splits = _splits_in(folder, _KNOWN.union(wanted))
        for name in wanted:
            if name in splits:
                return splits[name]
        named = folder / split
        # It holds no class folders, nor is it a class itself.
        if named.is_dir() and (_splits_in(folder) or not any(named.iterdir())):
            return named
        if _KNOWN.intersection(splits):
            there = ', '.join(sorted(path.name for path in _splits_in(folder).values()))
            raise UserError(f"there is no split '{split}' in '{folder}', only {there}: name another split, or make the "
                            f'folder {split}/.')
    if set(wanted) <= _KNOWN - set(_SYNONYMS[2]) or root.resolve().name.lower() in wanted:
        return root
    raise UserError(f"there is no split '{split}' in '{root}', which has no folders train/, val/ or test/.")


def check_split_name(split: str) -> None:
    """Raise UserError unless ``split`` is one of the usual names of train, validation and test."""
    if split.lower() not in _KNOWN:
        raise UserError(f"there is no split '{split}': use train, validation or test.")


def _synonyms(split: str) -> tuple[str, ...]:
    return next((names for names in _SYNONYMS if split.lower() in names), ())


def _splits_in(folder: Path, names: Collection[str] | None = None) -> dict[str, Path]:
    """Return the tar files and the folders of folders by their lower-case names; a class folder holds images alone.

    Args:
        folder: Folder, which may be missing.
        names: Names to look at; None for all, which takes long where class folders hold millions of images.
    """
    if not folder.is_dir():
        return {}
    tars = {path.stem.lower(): path for path in folder.glob('*.tar')}
    folders = {path.name.lower(): path for path in folder.iterdir()
               if (names is None or path.name.lower() in names)
               and path.is_dir() and not path.name.startswith('.') and _holds_folders(path)}
    return tars | folders


def _holds_folders(path: Path) -> bool:
    with os.scandir(path) as entries:
        return any(entry.is_dir() for entry in entries)

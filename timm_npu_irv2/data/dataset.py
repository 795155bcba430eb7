"""Data sets of timm, their classes, and one line for whatever is wrong with them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from torch.utils.data import Dataset

from ..errors import UserError, first_line
from .splits import check_split_name, find_split

__all__ = ['check_num_classes', 'check_same_classes', 'class_to_idx', 'find_root', 'open_dataset']

# Data sets of torchvision with two splits: timm takes the second one for any name but train.
TRAIN_OR_TEST = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist')


def class_to_idx(dataset: Any) -> dict[str, int] | None:
    """Return the class indices by name, where the data set knows them (folders, most data sets of torchvision)."""
    return getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)


def open_dataset(name: str, root: str | None, split: str, *, class_map: str = '', **options: Any) -> Dataset:
    """Return a data set of ``timm.data.create_dataset``.

    Args:
        name: '<type>/<name>' as timm takes it; empty for a folder or a tar file.
        root: Folder or tar file.
        split: Name of the split.
        class_map: File that maps class names to indices.
        options: Further arguments of ``create_dataset``.

    Raises:
        UserError: No such folder or split, no image in it or in one of its class folders, or no such data set.
    """
    if (path := find_root(name, root, split)) is not None:
        root, options['search_split'] = str(path), False
    options['class_map'] = class_map
    try:
        dataset = create_dataset(name, root=root, split=split, **options)
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"data set '{name or root}', split '{split}': {first_line(error)}") from error
    folder = getattr(getattr(dataset, 'reader', None), 'root', None)
    if folder is not None and not class_map and Path(folder).is_dir():
        _check_no_class_is_empty(Path(folder), dataset.filenames())
    return dataset


def find_root(name: str, root: str | None, split: str) -> Path | None:
    """Return the folder or tar file of a split; None for data sets that are not a folder of images.

    Args:
        name: '<type>/<name>' as timm takes it; empty for a folder or a tar file.
        root: Folder or tar file.
        split: Name of the split.

    Raises:
        UserError: No such folder or split.
    """
    kind, _, rest = name.lower().partition('/')
    if not rest or rest in ('folder', 'image_folder'):
        if not root:
            raise UserError('no data: name the folder that holds train/ and val/ with --data-dir.')
        return find_split(root, split)
    if kind == 'torch' and rest in TRAIN_OR_TEST:
        check_split_name(split)
    return None


def _check_no_class_is_empty(root: Path, names: Sequence[str]) -> None:
    """Raise UserError for an empty class folder: timm numbers those with images, so it would shift the others."""
    filled = {name.split(os.sep, 1)[0] for name in names}
    empty = sorted(path.name for path in root.iterdir()
                   if path.is_dir() and not path.name.startswith('.') and path.name not in filled)
    if empty:
        others = f' (nor do {len(empty) - 1} more)' if len(empty) > 1 else ''
        raise UserError(f"class folder '{root / empty[0]}' holds no image{others}: fill it, or remove it, "
                        "in all splits alike.")


def check_num_classes(dataset: Any, num_classes: int | None) -> None:
    """Raise UserError if the data set has more classes than the network."""
    classes = class_to_idx(dataset)
    count = max(classes.values()) + 1 if classes else 0
    if num_classes and count > num_classes:
        raise UserError(f'the data has {count} classes and the model {num_classes}: set --num-classes {count}, or '
                        'name the right folder with --data-dir.')


def check_same_classes(train: Any, val: Any) -> None:
    """Raise UserError if two splits number their classes differently, or share images."""
    if hasattr(train, 'reader') and hasattr(val, 'reader'):
        _check_apart(*(Path(dataset.reader.root).resolve() for dataset in (train, val)))
    expected, found = class_to_idx(train), class_to_idx(val)
    if expected is None or found is None or expected == found:
        return
    examples = sorted(set(expected) ^ set(found), key=str)[:3]
    raise UserError(
        f'the classes of the validation set ({len(found)}) are not those of the training set ({len(expected)}); '
        f"they differ in {', '.join(map(str, examples)) or 'their numbers'}: correct the folders, or use --class-map."
    )


def _check_apart(train: Path, val: Path) -> None:
    # timm takes the root itself where it finds no folder for a split, and would train on what it evaluates.
    if train == val or train in val.parents or val in train.parents:
        raise UserError(
            f"the training images ('{train}') and the validation images ('{val}') are not apart: make folders train/ "
            "and val/, or train without validation (--val-split '')."
        )

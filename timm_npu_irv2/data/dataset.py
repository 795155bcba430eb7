"""Which images there are: timm's data sets, their classes, and one line for whatever is wrong with them."""

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from torch.utils.data import Dataset

from ..errors import UserError, first_line

__all__ = ['channels_of', 'check_num_classes', 'check_same_classes', 'class_to_idx', 'image_mode', 'open_dataset']


def channels_of(args: Namespace, data_config: dict[str, Any]) -> int:
    """The channels of the images."""
    return args.in_chans or data_config['input_size'][0]


def image_mode(args: Namespace, data_config: dict[str, Any]) -> str:
    """The PIL mode of the images: --input-img-mode, else by the number of channels."""
    return args.input_img_mode or ('L' if channels_of(args, data_config) == 1 else 'RGB')


def class_to_idx(samples: Any) -> dict[str, int] | None:
    """Class name to index, where the data set knows it (folders, tar files, most of torchvision's)."""
    return getattr(getattr(samples, 'reader', samples), 'class_to_idx', None)


def open_dataset(args: Namespace, split: str, data_config: dict[str, Any], training: bool) -> Dataset:
    """timm's ``create_dataset`` with its failures in one line each.

    Raises:
        UserError: There is no such folder, no image in it or in one of its class folders, or no such data set.
    """
    samples = _create(args, split, data_config, training)
    root = getattr(getattr(samples, 'reader', None), 'root', None)
    if root is not None and not args.class_map and Path(root).is_dir():
        _check_no_class_is_empty(Path(root), samples.filenames())
    return samples


def _create(args: Namespace, split: str, data_config: dict[str, Any], training: bool) -> Dataset:
    folder = not args.dataset or '/' not in args.dataset
    if folder and not args.data_dir:
        raise UserError('no data: name the folder that holds train/ and val/ with --data-dir.')
    if folder and not Path(args.data_dir).exists():
        raise UserError(f"data folder '{args.data_dir}' does not exist: check --data-dir.")
    num_samples = args.train_num_samples if training else args.val_num_samples
    try:
        return create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            is_training=training,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            seed=args.seed,
            repeats=args.epoch_repeats if training else 0,
            input_img_mode=image_mode(args, data_config),
            input_key=args.input_key,
            target_key=args.target_key,
            num_samples=num_samples,
            trust_remote_code=args.dataset_trust_remote_code,
        )
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"data set '{args.dataset or args.data_dir}', split '{split}': {first_line(error)}") from error


def _check_no_class_is_empty(root: Path, names: Sequence[str]) -> None:
    """timm numbers the folders that hold images: an empty one would move all the classes behind it."""
    filled = {name.split(os.sep, 1)[0] for name in names}
    empty = sorted(path.name for path in root.iterdir()
                   if path.is_dir() and not path.name.startswith('.') and path.name not in filled)
    if empty:
        raise UserError(f"class folder '{root / empty[0]}' holds no image{_and_others(empty)}: fill it, or remove it, "
                        "in all splits alike.")


def _and_others(names: Sequence[str]) -> str:
    return f' (nor do {len(names) - 1} more)' if len(names) > 1 else ''


def check_num_classes(samples: Any, args: Namespace) -> None:
    """Raise UserError if the data has more classes than the model."""
    classes = class_to_idx(samples)
    count = max(classes.values()) + 1 if classes else 0
    if args.num_classes and count > args.num_classes and not getattr(args, 'valid_labels', None):
        raise UserError(
            f'the data has {count} classes and the model {args.num_classes}: set --num-classes {count}, or name the '
            'right folder with --data-dir.'
        )


def check_same_classes(train: Any, val: Any) -> None:
    """Raise UserError if two splits number their classes differently, or share images."""
    if hasattr(train, 'reader') and hasattr(val, 'reader'):
        _check_apart(*(Path(samples.reader.root).resolve() for samples in (train, val)))
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

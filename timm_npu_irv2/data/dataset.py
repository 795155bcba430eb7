"""Data sets: folders and tar files through this package's reader, others through timm's."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset

from ..distributed import World
from ..errors import UserError, first_line
from . import wds
from .cifar import CifarReader, find_cifar
from .classes import map_classes, read_class_map
from .decode import read_image, to_pil_mode
from .fast import read_array
from .folder import FolderReader
from .splits import check_split_name, find_split

__all__ = ['ImageDataset', 'RenumberedDataset', 'check_apart', 'check_num_classes', 'class_to_idx', 'find_root',
           'open_dataset']

# Data sets of torchvision with two splits: timm takes the second one for any name but train.
TRAIN_OR_TEST = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist')


class ImageDataset(Dataset):
    """A data set of (PIL image, class index) that raises for an image that cannot be read.

    timm's data set of the same name puts other images in the places of those.

    Args:
        reader: Reader of timm's, which yields (file, class index).
        image_mode: PIL mode that every image is converted to.
        fast: Return arrays (H, W, 3) of the input backend 'fast' instead of PIL images; only for mode 'RGB'.
    """

    def __init__(self, reader: Any, image_mode: str = 'RGB', fast: bool = False):
        self.reader, self.image_mode, self.fast = reader, image_mode, fast

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image | np.ndarray, Any]:
        file, target, *_ = self.reader[index]
        target = -1 if target is None else target
        if isinstance(file, Image.Image):
            return to_pil_mode(file, self.image_mode), target
        with file:
            return read_array(file) if self.fast else read_image(file, self.image_mode), target

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Return the file name of an image."""
        return self.reader.filename(index, basename, absolute)

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        """Return the file names of all images."""
        return self.reader.filenames(basename, absolute)


class RenumberedDataset(Dataset):
    """A data set whose classes get the numbers of the network.

    Args:
        dataset: Data set of (image, class index).
        numbers: Number of the network by the number in the data set.
        class_to_idx: Class indices of the network by name.
    """

    def __init__(self, dataset: Any, numbers: Mapping[int, int], class_to_idx: Mapping[str, int]):
        self.dataset, self.numbers, self.class_to_idx = dataset, numbers, dict(class_to_idx)
        for name in 'filename', 'filenames':
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, target = self.dataset[index]
        return image, self.numbers[int(target)]


def class_to_idx(dataset: Any) -> dict[str, int] | None:
    """Return the class indices by name, where the data set knows them (folders, tar files, most of torchvision's)."""
    return getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)


def open_dataset(
        name: str,
        root: str | None,
        split: str,
        *,
        class_to_idx: Mapping[str, int] | None = None,
        class_map: str = '',
        input_img_mode: str = 'RGB',
        input_key: str | None = None,
        num_classes: int | None = None,
        on_bad_image: str = 'stop',
        world: World | None = None,
        **options: Any,
) -> Dataset:
    """Return a data set by the names of ``timm.data.create_dataset``.

    Args:
        name: '<type>/<name>' as timm takes it; empty for a folder or a tar file.
        root: Folder or tar file.
        split: Name of the split.
        class_to_idx: Class indices of the network by name, which number the classes of the data; None to number the
            classes in their order.
        class_map: File of class indices by name, which takes the place of ``class_to_idx``.
        input_img_mode: PIL mode of the images.
        input_key: Key of the images in records; file name endings of images in folders, with ';' between them.
        num_classes: Number of classes of the network, which labels in WebDataset shards must be below.
        on_bad_image: 'stop' or 'skip' at a WebDataset shard that cannot be read to its end; of images the loader
            decides.
        world: This process among all, if all open the data set together, so that rank 0 alone searches a folder, or
            counts the samples in shards.
        options: Further arguments of ``create_dataset``.

    Raises:
        UserError: No such folder or split, no image in it or in one of its class folders, a class that the network
            does not know, or no such data set.
    """
    folder = find_root(name, root, split)
    if not name and (cifar := find_cifar(root or '')):
        numbers = read_class_map(class_map, cifar) if class_map else class_to_idx
        return ImageDataset(CifarReader(cifar, split, numbers), input_img_mode)
    if folder is None or '/' in name:
        if folder is not None:
            root, options['search_split'] = str(folder), False
        if name.lower().startswith('wds/'):
            table = read_class_map(class_map, root or '') if class_map else class_to_idx
            return _open_shards(name, root, split, input_img_mode, class_to_idx=table, num_classes=num_classes,
                                on_bad_image=on_bad_image, input_key=input_key, world=world, **options)
        options |= dict(input_img_mode=input_img_mode, input_key=input_key, class_map=class_map)
        return _create(name, root, split, class_to_idx if not class_map else None, options)
    table = read_class_map(class_map, folder) if class_map else class_to_idx
    endings = input_key.split(';') if input_key else ()
    reader = FolderReader(folder, table, class_map=bool(class_map), endings=endings, world=world)
    return ImageDataset(reader, input_img_mode)


def find_root(name: str, root: str | None, split: str) -> Path | None:
    """Return the folder or tar file of a split; None for data sets that are not a folder of images, such as CIFAR's.

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
        if not rest and find_cifar(root):
            check_split_name(split)
            return None
        return find_split(root, split)
    if kind == 'torch' and rest in TRAIN_OR_TEST:
        check_split_name(split)
    return None


def _create(
        name: str,
        root: str | None,
        split: str,
        expected: Mapping[str, int] | None,
        options: dict[str, Any],
) -> Dataset:
    with _naming(name, split):
        dataset: Any = create_dataset(name, root=root, split=split, **options)
    found = class_to_idx(dataset)
    numbers: dict[int, int] | None = None
    if expected and found and all(isinstance(each, str) for each in found):
        map_classes(found, expected)
        numbers = {index: expected[each] for each, index in found.items()}
    if hasattr(dataset, 'reader') and not isinstance(dataset, IterableDataset):
        dataset = ImageDataset(dataset.reader, options['input_img_mode'])
    if numbers is None or all(index == number for index, number in numbers.items()):
        return dataset
    if isinstance(dataset, IterableDataset):
        stream: Any = dataset
        stream.target_transform, stream.reader.class_to_idx = numbers.__getitem__, dict(expected or {})
        return stream
    return RenumberedDataset(dataset, numbers, expected or {})


def _open_shards(name: str, root: str | None, split: str, image_mode: str, **options: Any) -> ImageDataset:
    wanted = 'class_to_idx', 'num_classes', 'on_bad_image', 'input_key', 'target_key', 'num_samples', 'world'
    with _naming(name, split):
        reader = wds.open_shards(root, split, **{key: options[key] for key in wanted if key in options})
    return ImageDataset(reader, image_mode)


@contextlib.contextmanager
def _naming(name: str, split: str) -> Iterator[None]:
    """Turn an error in the construction of a data set into one line that names it."""
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"data set '{name}': {error.name} is not installed: pip install {error.name}.") from error
    except Exception as error:  # the readers of timm and torchvision check arguments by whatever fails first
        raise UserError(f"data set '{name}', split '{split}': {first_line(error)}") from error


def check_num_classes(dataset: Any, num_classes: int | None) -> None:
    """Raise UserError if the data set has more classes than the network."""
    classes = class_to_idx(dataset)
    count = max(classes.values()) + 1 if classes else 0
    if num_classes and count > num_classes:
        raise UserError(f'the data has {count} classes and the model {num_classes}: set --num-classes {count}, or '
                        'name the right folder with --data-dir.')


def check_apart(train: Any, val: Any) -> None:
    """Raise UserError if a folder of one split holds that of another, so that they share images."""
    if not all(isinstance(getattr(dataset, 'reader', None), FolderReader) for dataset in (train, val)):
        return  # the root of another reader is a cache for all splits
    first, second = (Path(dataset.reader.root).resolve() for dataset in (train, val))
    if first == second or first in second.parents or second in first.parents:
        raise UserError(
            f"the training images ('{first}') and the validation images ('{second}') are not apart: make folders "
            "train/ and val/, or train without validation (--val-split '')."
        )

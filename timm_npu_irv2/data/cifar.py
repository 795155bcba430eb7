"""CIFAR-10 and CIFAR-100 as their authors distribute them: pickles of Python 2, which are read without running them."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.readers.reader import Reader

from ..errors import UserError, first_line
from ..serialization import open_regular
from .classes import clean_name, map_classes
from .splits import check_split_name

__all__ = ['CifarReader', 'find_cifar', 'read_cifar_classes']

SIDE = 32  # pixels
# Folder: (files of training, files of the test, file of names, key of the names, key of the labels)
_LAYOUTS = {
    'cifar-10-batches-py': ([f'data_batch_{number}' for number in range(1, 6)], ['test_batch'], 'batches.meta',
                            'label_names', 'labels'),
    'cifar-100-python': (['train'], ['test'], 'meta', 'fine_label_names', 'fine_labels'),
}
_REMEDIES = {
    'cifar-10-batches-bin': 'these are the binary files of CIFAR-10: take the Python version, cifar-10-python.tar.gz.',
    'cifar-100-binary': 'these are the binary files of CIFAR-100: take the Python version, cifar-100-python.tar.gz.',
    'cifar-10-python.tar.gz': 'extract it first with `tar xzf`, and name the folder that holds cifar-10-batches-py.',
    'cifar-100-python.tar.gz': 'extract it first with `tar xzf`, and name the folder that holds cifar-100-python.',
}


def find_cifar(root: str | Path) -> Path | None:
    """Return the folder of CIFAR-10's or CIFAR-100's pickles, which is ``root`` or in it; None if there is none.

    Raises:
        UserError: It is there in a form that is not read, as binary files or as an archive.
    """
    root = Path(root)
    for name, (_, test, *_rest) in _LAYOUTS.items():
        for folder in (root, root / name):
            if folder.name == name and (folder / test[0]).is_file():
                return folder
    for name, remedy in _REMEDIES.items():
        if root.name == name and root.exists():
            raise UserError(f'{root}: {remedy}')
        if (root / name).exists() and not any(path.is_dir() and path.name != name for path in root.iterdir()):
            raise UserError(f'{root / name}: {remedy}')
    return None


def read_cifar_classes(folder: Path) -> list[str]:
    """Return the names of the classes, in the order of their numbers."""
    _, _, meta, key, _ = _LAYOUTS[folder.name]
    names = _read(folder / meta).get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f'{folder / meta} is not the list of the classes.')
    return [clean_name(name) for name in names]


class CifarReader(Reader):
    """timm's reader interface for the pickles of CIFAR-10 and CIFAR-100.

    Args:
        folder: Folder that :func:`find_cifar` returned.
        split: Name of the split: train, or any of the names of validation and test, which are the test images.
        class_to_idx: Numbers of the network's classes by name; None for CIFAR's own numbers.

    Attributes:
        class_to_idx: Numbers of the classes by name.

    Raises:
        UserError: No such split, a file that is missing or damaged, or a class that the network does not know.
    """

    def __init__(self, folder: Path, split: str, class_to_idx: Mapping[str, int] | None = None) -> None:
        super().__init__()
        check_split_name(split)
        train, test, _, _, key = _LAYOUTS[folder.name]
        names = read_cifar_classes(folder)
        if class_to_idx is not None:
            map_classes(names, class_to_idx)
        self.class_to_idx = dict(class_to_idx or {name: index for index, name in enumerate(names)})
        self.root = str(folder)
        self._files = train if split.lower() in ('train', 'training') else test
        batches = [_read_batch(folder / file, key, len(names)) for file in self._files]
        self._images = np.concatenate([images for images, _ in batches])
        self._targets = [self.class_to_idx[names[label]] for _, labels in batches for label in labels]
        self._names = [f'{file}/{index}' for file, (images, _) in zip(self._files, batches, strict=True)
                       for index in range(len(images))]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._images[index]), self._targets[index]

    def __len__(self) -> int:
        return len(self._targets)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self._names[index]
        return f'{self.root}/{name}' if absolute else name.rpartition('/')[2] if basename else name


def _read_batch(path: Path, key: str, num_classes: int) -> tuple[np.ndarray, list[int]]:
    """Return the images (N, 32, 32, 3) in uint8 and the labels of a file."""
    content = _read(path)
    images, labels = content.get('data'), content.get(key)
    if (not isinstance(images, _Array) or not isinstance(labels, list) or images.shape != (len(labels), 3 * SIDE ** 2)
            or not all(isinstance(label, int) and 0 <= label < num_classes for label in labels)):
        raise UserError(f'{path} does not hold the images and labels of CIFAR.')
    pixels = np.frombuffer(images.content, np.uint8).reshape(-1, 3, SIDE, SIDE)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), labels


class _Array:
    """An array of bytes as NumPy pickles it, of which nothing is executed."""

    shape: tuple[int, ...] = ()
    content: bytes = b''

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, content = state
        if isinstance(content, str):  # of Python 2
            content = content.encode('latin1')
        if is_fortran or dtype.name != 'u1' or not isinstance(content, bytes):
            raise pickle.UnpicklingError('expected an array of uint8')
        self.shape, self.content = tuple(shape), content


class _Dtype:
    """A type of numbers as NumPy pickles it."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass


def _encode(text: str, encoding: str) -> bytes:
    """Return bytes as Python 3 pickles them for Python 2."""
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f'unexpected encoding {encoding[:20]}')
    return text.encode('latin1')


class _Unpickler(pickle.Unpickler):
    """An unpickler of dicts, lists, texts, numbers and arrays of bytes; whatever else a file names is refused."""

    known = {('numpy', 'ndarray'): _Array, ('numpy', 'dtype'): _Dtype, ('_codecs', 'encode'): _encode} | {
        (f'numpy.{core}.multiarray', '_reconstruct'): _Array for core in ('core', '_core')}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f'it names {module}.{name}, which has no place in this data set')
        return self.known[module, name]


def _read(path: Path) -> dict[str, Any]:
    """Return the dict in a pickle of CIFAR's, with texts as its keys."""
    try:
        with open_regular(path) as file:
            content = _Unpickler(file, encoding='latin1').load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        raise UserError(f'{path} cannot be read: {getattr(error, "strerror", None) or first_line(error)}.') from error

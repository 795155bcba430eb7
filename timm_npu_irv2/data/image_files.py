"""Images to classify, by name: files, folders and data sets, decoded by threads."""

import io
import itertools
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError, one_line
from ..serialization import open_regular
from .decode import read_image, to_pil_mode
from .folder import ImageFile, find_images, iterate_images

__all__ = ['DatasetImages', 'ImageList', 'IndexedImages', 'NamedFiles', 'NamedImages', 'decode_stream', 'find_files']

_logger = logging.getLogger(__name__)

Item = TypeVar('Item')
LISTS = ('.txt', '.lst')  # endings of lists of paths
LONGEST_LINE = 65536  # characters; a path has at most 4096 bytes


class NamedImages(Protocol):
    """Images with an index and a name.

    Attributes:
        max_threads: Number of threads that may read images at a time; None for any.
    """

    max_threads: int | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Image.Image: ...

    def name(self, index: int, full: bool = False) -> str:
        """Return the name of an image, or its path if ``full``."""
        ...


class NamedFiles:
    """Images in files, folders and tar files.

    Args:
        images: Images.
        mode: PIL mode of the images, such as 'RGB'.
    """

    max_threads: int | None = None

    def __init__(self, images: Sequence[ImageFile], mode: str):
        self.images, self.mode = images, mode
        self._ambiguous = len({image.name.rpartition('/')[2] for image in images}) < len(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Image.Image:
        with self.images[index].open() as file:
            return read_image(file, self.mode)

    def name(self, index: int, full: bool = False) -> str:
        """Return the name of a file, or its path if ``full`` or if several files have the same name."""
        image = self.images[index]
        return image.path if full or self._ambiguous else image.name.rpartition('/')[2]


class DatasetImages:
    """Images of a data set of timm or torchvision with an index; their labels are ignored."""

    max_threads: int | None = 1  # timm's readers may share a file between samples

    def __init__(self, dataset: Any, mode: str):
        self.dataset, self.mode = dataset, mode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Image.Image:
        return to_pil_mode(self.dataset[index][0], self.mode)  # torchvision's have the mode of their file

    def name(self, index: int, full: bool = False) -> str:
        """Return the name of a sample, or its index if it has none."""
        return str(self.dataset.filename(index, basename=not full) if hasattr(self.dataset, 'filename') else index)


class ImageList:
    """Images in files, folders, tar files and lists of paths, one after another: none of them is kept in memory.

    Args:
        places: Places, as :func:`find_files` takes them.
        mode: PIL mode of the images.
    """

    max_threads: int | None = None

    def __init__(self, places: Sequence[str], mode: str):
        self.places, self.mode = places, mode

    def __iter__(self) -> Iterator[ImageFile]:
        return itertools.chain.from_iterable(_images_at(place) for place in self.places)

    def read(self, image: ImageFile) -> Image.Image:
        """Return an image, decoded."""
        with image.open() as file:
            return read_image(file, self.mode)

    def name(self, image: ImageFile) -> str:
        """Return the path of an image, which no other image has."""
        return image.path


class IndexedImages:
    """Images with an index, behind the interface of :class:`ImageList`."""

    def __init__(self, images: NamedImages):
        self.images, self.max_threads, self.read = images, images.max_threads, images.__getitem__

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.images)))

    def name(self, index: int) -> str:
        """Return the path or the index of an image."""
        return self.images.name(index, full=True)


def find_files(places: Iterable[str], mode: str) -> NamedFiles:
    """Return the images that are named, and those in the places that are named, in natural order.

    Args:
        places: Image files; folders, which are searched to any depth; tar files, among them WebDataset shards, several
            as in 'train-{0000..0009}.tar'; and text files with such a place in each line.
        mode: PIL mode of the images.

    Raises:
        UserError: No such file or folder, or a folder or tar file without images.
    """
    return NamedFiles([image for place in places for image in _images_at(place, find_images)], mode)


def _images_at(
        place: str,
        search: Callable[..., Iterable[ImageFile]] = iterate_images,
        listed: bool = False,
) -> Iterator[ImageFile]:
    """Yield the images in one place; in a list, a file that is missing is an image that cannot be read."""
    path, exists = Path(place), os.path.exists(place)  # noqa: PTH110 - Path.exists may raise
    if not exists and (shards := _expand(place)):
        for shard in shards:
            yield from _images_at(shard, search)
    elif not exists and not listed:
        raise UserError(f'{place}: no such file or folder.')
    elif os.path.isdir(place) or path.suffix.lower() == '.tar':  # noqa: PTH112 - as above
        yield from search(path.as_posix(), tars=True)
    elif path.suffix.lower() in LISTS and not listed:
        for line in _lines(path):
            beside = str(path.parent / line)
            known = beside if os.path.exists(beside) and not os.path.exists(line) else line  # noqa: PTH110 - as above
            yield from _images_at(known, search, listed=True)
    else:
        yield ImageFile(path.parent.as_posix(), path.name)


def _expand(place: str) -> list[str]:
    """Return the names that a pattern such as 'train-{0000..0009}.tar' stands for; none if it is no pattern."""
    match = re.search(r'\{(\d+)\.\.(\d+)\}', place)
    if match is None:
        return []
    numbers = range(int(match[1]), int(match[2]) + 1)
    return [f'{place[:match.start()]}{number:0{len(match[1])}}{place[match.end():]}' for number in numbers]


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file that are not empty, whatever ends them, without a byte order mark."""
    try:
        with io.TextIOWrapper(
                open_regular(path), encoding='utf-8-sig', errors='surrogateescape') as file:  # names may be any bytes
            while line := file.readline(LONGEST_LINE):
                if len(line) == LONGEST_LINE:
                    raise UserError(f'{path} is no list of images: a line is longer than any path.')
                if line.strip():
                    yield line.rstrip('\r\n')
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'{path}: {error.strerror}') from error


def decode_stream(
        items: Iterator[Item],
        decode: Callable[[Item], np.ndarray],
        name: Callable[[Item], str],
        *,
        batch_size: int,
        num_threads: int,
        on_bad_image: str = 'stop',
) -> Iterator[tuple[list[Item], Tensor]]:
    """Yield batches of items and their uint8 images (N, C, H, W), decoded up to two batches ahead.

    Args:
        items: What stands for the images.
        decode: Function from an item to uint8 (C, H, W), called by any thread.
        name: Function from an item to its name, for messages.
        batch_size: Largest number of images in a batch.
        num_threads: Number of threads that decode.
        on_bad_image: 'stop' or 'skip' at an image that cannot be read.

    Raises:
        UserError: An image cannot be read, and ``on_bad_image`` is 'stop'.
    """
    queue: deque[tuple[Item, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        def refill() -> None:
            for item in islice(items, 2 * batch_size - len(queue)):
                queue.append((item, pool.submit(decode, item)))

        try:
            refill()
            while queue:
                batch = []
                for item, future in [queue.popleft() for _ in range(min(batch_size, len(queue)))]:
                    try:
                        batch.append((item, future.result()))
                    except Exception as error:  # as many types as there are image formats
                        _handle_bad_image(name(item), error, on_bad_image)
                refill()
                if batch:
                    yield [item for item, _ in batch], torch.from_numpy(np.stack([pixels for _, pixels in batch]))
        finally:
            for _, future in queue:
                future.cancel()


def _handle_bad_image(name: str, error: Exception, on_bad_image: str) -> None:
    reason = one_line(error)
    if on_bad_image == 'stop':
        raise UserError(
            f'image {name} cannot be read: {reason}; --on-bad-image skip leaves such images out.') from error
    _logger.warning(f'Skipped image {name}, which cannot be read: {reason}')

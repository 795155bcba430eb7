"""Images to classify, by name: files, folders and data sets, decoded by threads."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from .decode import read_image, to_pil_mode
from .folder import ImageFile, find_images

__all__ = ['DatasetImages', 'NamedFiles', 'NamedImages', 'decode_batches', 'find_files']

_logger = logging.getLogger(__name__)


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


def find_files(places: Iterable[str], mode: str) -> NamedFiles:
    """Return the images that are named, and those in the folders and tar files that are named, in natural order.

    Args:
        places: Image files, folders and tar files; folders are searched to any depth.
        mode: PIL mode of the images.

    Raises:
        UserError: No such file or folder, or a folder or tar file without images.
    """
    images: list[ImageFile] = []
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f'{place}: no such file or folder.')
        if place.is_dir() or place.suffix.lower() == '.tar':
            images += find_images(place)
        else:
            images.append(ImageFile(place.parent.as_posix(), place.name))
    return NamedFiles(images, mode)


def decode_batches(
        images: NamedImages,
        transform: Callable[[Image.Image], np.ndarray],
        *,
        batch_size: int,
        num_threads: int,
        on_bad_image: str = 'stop',
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield batches of indices and uint8 images (N, C, H, W), decoded up to two batches ahead.

    Args:
        images: Images to decode.
        transform: Function from an image to uint8 (C, H, W).
        batch_size: Largest number of images in a batch.
        num_threads: Number of threads that decode.
        on_bad_image: 'stop' or 'skip' at an image that cannot be read.

    Raises:
        UserError: An image cannot be read, and ``on_bad_image`` is 'stop'.
    """
    indices = iter(range(len(images)))
    queue: deque[tuple[int, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(max(1, min(num_threads, images.max_threads or num_threads))) as pool:
        def decode(index: int) -> np.ndarray:
            return transform(images[index])

        def refill() -> None:
            for index in islice(indices, 2 * batch_size - len(queue)):
                queue.append((index, pool.submit(decode, index)))

        try:
            refill()
            while queue:
                batch = {}
                for index, future in [queue.popleft() for _ in range(min(batch_size, len(queue)))]:
                    try:
                        batch[index] = future.result()
                    except Exception as error:  # as many types as there are image formats
                        _handle_bad_image(images.name(index, full=True), error, on_bad_image)
                refill()
                if batch:
                    yield list(batch), torch.from_numpy(np.stack(list(batch.values())))
        finally:
            for _, future in queue:
                future.cancel()


def _handle_bad_image(name: str, error: Exception, on_bad_image: str) -> None:
    reason = ' '.join((str(error) or type(error).__name__).split())[:200]
    if on_bad_image == 'stop':
        raise UserError(
            f'image {name} cannot be read: {reason}; --on-bad-image skip leaves such images out.') from error
    _logger.warning(f'Skipped image {name}, which cannot be read: {reason}')

"""The names of many images in a few arrays: ten million of them take half a gigabyte, and no process copies them."""

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import BinaryIO, overload

import numpy as np

from ..serialization import open_regular
from .classes import natural_key, natural_prefix

__all__ = ['ImageFile', 'Listing']

BLOCK = 1 << 24  # bytes searched at a time


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image in a folder, or in a tar file.

    Attributes:
        root: Folder or tar file.
        name: Path within it, with slashes; a tar within a tar counts as a folder.
        offset: Place of its bytes in the tar file; -1 in a folder.
        size: Number of its bytes in the tar file.
    """

    root: str
    name: str
    offset: int = -1
    size: int = 0

    @property
    def path(self) -> str:
        """Path of the file, or of the tar file and within it."""
        return self.name if self.root == '.' else f'{self.root}/{self.name}'

    @property
    def folder(self) -> str:
        """Folder within the root; empty for the root itself."""
        return self.name.rpartition('/')[0]

    def open(self) -> BinaryIO:
        """Open it for reading. Threads and processes can do so at the same time, even within one tar file."""
        if self.offset < 0:
            return open_regular(self.path)
        with open(self.root, 'rb') as file:  # noqa: PTH123 - a Path for each of a million images is slow
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


class Listing(Sequence[ImageFile]):
    """The images of a folder or a tar file in natural order.

    An image takes its name and 9 bytes, and 16 more in a tar file. An object for each would take 200, and every worker
    would copy it: CPython writes into objects that it only looks at, to count their references.

    Args:
        root: Folder or tar file.
        names: Paths within the root in UTF-8, each with a NUL behind it, as uint8 (bytes,).
        runs: (folder within the root, number of images in it that follow each other), in order.
        places: Offset and size of each image in the tar file, int64 (N, 2); None in a folder.
    """

    def __init__(
            self,
            root: str,
            names: np.ndarray,
            runs: Sequence[tuple[str, int]],
            places: np.ndarray | None = None,
    ):
        self.root, self.names, self.runs, self.places = root, names, runs, places
        self._ends = _find_ends(names)

    @classmethod
    def of_folders(cls, root: str, folders: dict[str, list[bytes]]) -> 'Listing':
        """Return the listing of a folder, and empty ``folders``.

        Args:
            root: Folder.
            folders: What :func:`pack` made of the images in each folder within it, in natural order.
        """
        buffer, runs = bytearray(), list[tuple[str, int]]()
        for group in _groups(folders):
            parts = [b''.join(folders.pop(folder)) for folder in group]
            if len(parts) == 1:
                buffer += parts[0]
                runs.append((group[0], parts[0].count(b'\0')))
            else:
                names = sorted((name for part in parts for name in unpack(part)), key=natural_key)
                buffer += pack(names)
                runs += _runs(names)
        return cls(root, np.frombuffer(buffer, np.uint8), runs)

    @classmethod
    def of_tar(cls, root: str, places: Mapping[str, tuple[int, int]]) -> 'Listing':
        """Return the listing of a tar file, for offset and size of each image in it by name."""
        names = sorted(places, key=natural_key)
        rows = np.fromiter((places[name] for name in names), np.dtype((np.int64, 2)), len(names))
        return cls(root, np.frombuffer(pack(names), np.uint8), _runs(names), rows)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> ImageFile: ...

    @overload
    def __getitem__(self, index: slice) -> list[ImageFile]: ...

    def __getitem__(self, index: int | slice) -> ImageFile | list[ImageFile]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        place = () if self.places is None else map(int, self.places[index])
        return ImageFile(self.root, self.name(index), *place)

    def name(self, index: int) -> str:
        """Return the path of an image within the root."""
        index = range(len(self))[index]
        start = self._ends[index - 1] + 1 if index else 0
        return self.names[start:self._ends[index]].tobytes().decode(errors='surrogateescape')

    def select(self, chosen: np.ndarray) -> 'Listing':
        """Return the listing of the images for which the bool array ``chosen`` (N,) is True."""
        if chosen.all():
            return self
        lengths = np.diff(self._ends, prepend=-1)
        names = self.names[np.repeat(chosen, lengths)]
        bounds = np.cumsum([count for _, count in self.runs])[:-1]
        counts = (int(part.sum()) for part in np.split(chosen, bounds))
        runs = [(folder, count) for (folder, _), count in zip(self.runs, counts, strict=True) if count]
        return Listing(self.root, names, runs, None if self.places is None else self.places[chosen])

    def hash_names(self) -> str:
        """Return the SHA-256 of the names with a NUL between them."""
        return hashlib.sha256(self.names[:-1].data).hexdigest()


def pack(names: Sequence[str], folder: str = '') -> bytes:
    """Return the names in a folder in UTF-8, each with a NUL behind it; the path of the folder ends with a slash."""
    return ''.join(f'{folder}{name}\0' for name in names).encode(errors='surrogateescape')


def unpack(names: bytes) -> list[str]:
    """Return the names that :func:`pack` packed."""
    return names.decode(errors='surrogateescape').split('\0')[:-1]


def _groups(folders: Iterable[str]) -> Iterator[list[str]]:
    """Yield the folders in the order of their images, those together whose images come in turns.

    The path of a folder ends with a slash, so a number or a word never goes on in the names of its images. Where the
    key of one path does not begin with that of another, these keys decide the order of all images in both folders.
    """
    group, first = list[str](), ''
    for key, folder in sorted((natural_prefix(folder), folder) for folder in folders):
        if group and not key.startswith(first):
            yield group
            group = []
        if not group:
            first = key
        group.append(folder)
    if group:
        yield group


def _runs(names: Iterable[str]) -> list[tuple[str, int]]:
    folders = groupby(name[:name.rfind('/') + 1] for name in names)
    return [(folder, sum(1 for _ in each)) for folder, each in folders]


def _find_ends(names: np.ndarray) -> np.ndarray:
    """Return the places of the NULs, int64 (N,)."""
    blocks = (names[start:start + BLOCK] for start in range(0, len(names), BLOCK))
    found = [np.flatnonzero(block == 0) + number * BLOCK for number, block in enumerate(blocks)]
    return np.concatenate(found) if found else np.zeros(0, np.int64)

"""Samples in a tar file: consecutive members of one name, with different endings, as WebDataset has them."""

import io
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from ..errors import first_line

__all__ = ['TarIndex', 'index_tar', 'iterate_members', 'read_sample', 'split_name']

# The errors of tarfile for archives that are damaged or cut off.
DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError)


class TarIndex(NamedTuple):
    """The places of the samples in a tar file.

    Attributes:
        bounds: Offsets (N + 1,), int64: sample i is in the bytes from bounds[i] to bounds[i + 1].
        error: Reason why the file cannot be read behind the last sample; '' for a whole file.
    """

    bounds: np.ndarray
    error: str = ''

    def __len__(self) -> int:
        return len(self.bounds) - 1


def split_name(name: str) -> tuple[str, str] | None:
    """Return the key and the lower-case ending of a member; None for one that belongs to no sample.

    The ending begins at the first dot of the file name, as in WebDataset. Members such as ``__meta__/x`` belong to the
    archive.
    """
    match = re.fullmatch(r'((?:.*/|)[^./]+)[.]([^/]*)', name, re.DOTALL)
    if match is None or re.match(r'__[^/]*__($|/)', name):
        return None
    return match[1], match[2].lower()


def index_tar(file: BinaryIO) -> TarIndex:
    """Return the places of the samples in a seekable tar file without compression.

    The last sample of a damaged file may be incomplete, so it is left out.
    """
    bounds, previous, error = [], None, ''
    try:
        with tarfile.open(fileobj=file, mode='r:') as archive:
            for member, (key, _) in _files_of_samples(archive):
                if key != previous:
                    bounds.append(member.offset)
                    previous = key
            end = archive.offset
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a missing end for an end
            raise tarfile.ReadError('unexpected end of data')
        bounds.append(end)
    except DAMAGE as failure:
        error = first_line(failure)
        bounds = bounds or [0]
    return TarIndex(np.array(bounds, dtype=np.int64), error)


def read_sample(content: bytes) -> tuple[str, dict[str, bytes]]:
    """Return the key of a sample and the contents of its files by ending.

    Args:
        content: Bytes of the sample in its tar file.

    Raises:
        ValueError: Two files have the same ending.
    """
    files: dict[str, bytes] = {}
    found = ''
    with tarfile.open(fileobj=io.BytesIO(content), mode='r:') as archive:
        for member, (key, ending) in _files_of_samples(archive):
            if ending in files:
                raise ValueError(f'it has two files .{ending}')
            found = key
            files[ending] = archive.extractfile(member).read()  # type: ignore[union-attr]  # a regular file
    return found, files


def _files_of_samples(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, tuple[str, str]]]:
    """Yield the files of samples, with key and ending."""
    for member in iterate_members(archive):
        name = split_name(member.name) if member.isreg() else None
        if name is not None:
            yield member, name


def iterate_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an archive, which keeps none of them in memory."""
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]  # the stubs do not name it
        yield member

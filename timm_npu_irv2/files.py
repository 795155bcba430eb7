"""Files that are whole or not there: what a crash, a full disk or a reader in between never sees half of."""

import contextlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from .errors import CannotWrite

__all__ = ['damaged_entry', 'replacing', 'write_whole']


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, whose file takes ``path``'s place at the end, and is removed after an error.

    The file is on the disk before it takes the place, so not even a power failure leaves half of it.

    Raises:
        OSError: The file can't be put there. What was there before still is.
    """
    # Always the same name, so that what a killed process left is overwritten and not kept beside the next.
    temporary = path.with_name(f'.{path.name}.part')
    try:
        yield temporary
        _synchronize(temporary)
        temporary.replace(path)
        with contextlib.suppress(OSError):  # some file systems can't do this to a folder, and need not
            _synchronize(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _synchronize(path: Path) -> None:
    """Wait until the disk has the file, or the folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content``, text in UTF-8, to ``path``.

    Raises:
        CannotWrite: What was there before still is.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise CannotWrite(f'cannot write {path}: {error.strerror or error}.') from error


def damaged_entry(path: Path) -> str | None:
    """The first entry of a zip file, such as torch writes, whose checksum is wrong, at which torch does not look.

    None if all are right, or the file is no zip file.

    Raises:
        Exception: Whatever else zipfile raises for a torn file.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()

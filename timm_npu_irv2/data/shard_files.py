"""The files of shards on this machine: where they are, or fetched into a folder that the processes of a rank share.

That folder holds the shards that are in use and the places of the samples in all shards met so far. It is removed at
the end; what a killed run has left is removed by the next one on this machine.
"""

import collections
import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import CannotWrite, UserError
from .fetch import decompress, fetch, is_compressed, is_remote, local_path
from .tar_index import DAMAGE, TarIndex, index_tar, read_sample

__all__ = ['ShardFiles']

PREFIX = 'timm_npu_irv2-shards-'
MOST_OPEN = 256  # files of a process


class ShardFiles:
    """The samples of shards, read from any place.

    Args:
        urls: Files, URLs or pipes.
        hashes: SHA-256 of each shard, which a fetched one must have; empty for no check.
        capacity: Number of fetched shards that are kept.
    """

    def __init__(self, urls: Sequence[str], hashes: Sequence[str] = (), capacity: int = 1):
        self.urls, self.hashes, self.capacity = urls, hashes, capacity
        self._folder, self._lock = _make_folder()
        self._open: collections.OrderedDict[int, tuple[BinaryIO, TarIndex]] = collections.OrderedDict()
        self._owner, self._mutex = os.getpid(), threading.RLock()
        weakref.finalize(self, _remove, self._folder, os.getpid())

    def count(self, number: int) -> tuple[int, str]:
        """Return the number of samples in a shard, and the reason why it cannot be read behind them; '' for none.

        Raises:
            UserError: The shard cannot be fetched.
        """
        with self._in_this_process():
            index = self._opened(number)[1]
        return len(index), index.error

    def read(self, number: int, sample: int) -> tuple[str, dict[str, bytes]]:
        """Return the key of a sample and the contents of its files by ending.

        Args:
            number: Number of the shard.
            sample: Number of the sample in it.

        Raises:
            UserError: The shard cannot be fetched.
            ValueError: The shard is damaged, or has fewer samples.
        """
        with self._in_this_process():
            file, index = self._opened(number)
            if sample >= len(index):
                raise ValueError(index.error or f'the shard has only {len(index)} samples')
            start, end = (int(place) for place in index.bounds[sample:sample + 2])
            content = os.pread(file.fileno(), end - start, start)
        try:
            return read_sample(content)
        except DAMAGE as error:
            raise ValueError(str(error)) from error

    def __getstate__(self) -> dict[str, Any]:  # for a worker that is not forked
        return {**self.__dict__, '_lock': None, '_mutex': None, '_open': None, '_owner': 0}

    def _in_this_process(self) -> contextlib.AbstractContextManager:
        """Return the lock of the open files, which another thread could close; a worker must open its own."""
        if os.getpid() != self._owner:
            self._owner, self._mutex, self._open = os.getpid(), threading.RLock(), collections.OrderedDict()
        return self._mutex

    def _opened(self, number: int) -> tuple[BinaryIO, TarIndex]:
        if number not in self._open:
            file = self._file(number)
            self._open[number] = file, self._index(number, file)
            while len(self._open) > min(self.capacity, MOST_OPEN):
                self._open.popitem(last=False)[1][0].close()
        self._open.move_to_end(number)
        return self._open[number]

    def _file(self, number: int) -> BinaryIO:
        """Open a shard, fetched or decompressed if need be."""
        url = self.urls[number]
        if not is_remote(url):
            path = local_path(url)
            try:
                if not is_compressed(path):
                    return path.open('rb')
            except OSError as error:
                raise UserError(f'shard {url} cannot be read: {error.strerror}.') from error
        target = self._folder / f'{number}.tar'
        with self._locked(number):
            if not target.exists():
                self._fetch(number, target)
                self._make_room(target)
            os.utime(target)
            return target.open('rb')

    def _fetch(self, number: int, target: Path) -> None:
        url, part = self.urls[number], target.with_suffix('.part')
        source = part
        if is_remote(url):
            fetch(url, part, self.hashes[number] if self.hashes else '')
        else:
            source = local_path(url)
        if is_compressed(source):
            with _translate_full_disk(target):
                decompress(source, target.with_suffix('.plain'))
            part = target.with_suffix('.plain')
        part.replace(target)

    def _make_room(self, newest: Path) -> None:
        """Remove the shards that have not been opened for longest; processes that have them open keep them."""
        with contextlib.suppress(FileNotFoundError):  # another process removes them, too
            others = [path for path in self._folder.glob('*.tar') if path != newest]
            others.sort(key=lambda path: path.stat().st_mtime)
            for path in others[:max(0, len(others) + 1 - self.capacity)]:
                path.unlink()

    def _index(self, number: int, file: BinaryIO) -> TarIndex:
        path = self._folder / f'{number}.npz'
        with self._locked(number):
            if path.exists():
                with np.load(path) as stored:
                    return TarIndex(stored['bounds'], str(stored['error']))
            index = index_tar(file)
            part = path.with_suffix('.npz-part')
            with _translate_full_disk(path), part.open('wb') as output:
                np.savez(output, bounds=index.bounds, error=np.array(index.error))
            part.replace(path)
        return index

    @contextlib.contextmanager
    def _locked(self, number: int) -> Iterator[None]:
        """Hold the lock of a shard among the processes that share the folder."""
        with (self._folder / f'{number}.lock').open('w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@contextlib.contextmanager
def _translate_full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CannotWrite(f'cannot write {path}: {error.strerror}; let TMPDIR name another folder.') from error


def _make_folder() -> tuple[Path, BinaryIO]:
    """Return a new folder and its lock, which is held until this process and its workers end."""
    root = Path(tempfile.gettempdir())
    for leftover in root.glob(f'{PREFIX}*'):
        _remove_if_stale(leftover)
    while True:
        with _translate_full_disk(root):
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
            lock = (folder / 'owner').open('wb')
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # else another process took it for a leftover before it was locked
            return folder, lock
        lock.close()


def _remove_if_stale(folder: Path) -> None:
    """Remove a folder unless a process that lives holds its lock."""
    with contextlib.suppress(OSError), (folder / 'owner').open('rb') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)

"""Files from elsewhere: http, pipes and other places that WebDataset opens, fetched whole and tried again.

An answer that is late, broken off or refused for the moment is asked for again, after a pause that doubles each time.
What has arrived is kept where the server can go on from there. A file is complete, or there is an error.
"""

import bz2
import contextlib
import errno
import gzip
import hashlib
import http.client
import logging
import lzma
import os
import shutil
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CannotWrite, UserError, one_line
from ..serialization import open_regular

__all__ = ['Missing', 'checksum', 'decompress', 'fetch', 'is_compressed', 'is_remote', 'local_path', 'shorten']

_logger = logging.getLogger(__name__)

ATTEMPTS = 6  # without progress, in a row
FIRST_PAUSE = 1.0  # seconds, doubled after each attempt
PROGRESS = 2**20  # bytes that have arrived: counting of the attempts starts again
PIECE = 2**18
FOR_THE_MOMENT = {408, 425, 429, 500, 502, 503, 504}  # HTTP codes of a server that may answer later
DECOMPRESSORS: dict[bytes, Callable[..., Any]] = {b'\x1f\x8b': gzip.open, b'BZh': bz2.open, b'\xfd7zXZ': lzma.open}


class Missing(UserError):
    """A file that the server does not have, or does not give out."""


class _Broken(OSError):
    """An answer that ended too early."""


def is_remote(url: str) -> bool:
    """Return True for what is not a file of this machine: a URL or a pipe."""
    return url.startswith('pipe:') or ('://' in url and not url.startswith('file:'))


def local_path(url: str) -> Path:
    """Return the path of a file of this machine, which may be written as a URL ``file:…``."""
    return Path(urllib.request.url2pathname(url.partition(':')[2]) if url.startswith('file:') else url)


def shorten(url: str) -> str:
    """Return a URL for messages, without a query, which may hold a key."""
    return url.partition('?')[0] if url.startswith('http') else url


def fetch(url: str, target: Path, sha256: str = '') -> None:
    """Write what a URL or a pipe gives to a file.

    Args:
        url: 'http://…', 'https://…', 'pipe:COMMAND', or another URL that WebDataset opens.
        target: File to write; it is not complete after an error.
        sha256: Checksum that the content must have; '' for no check.

    Raises:
        Missing: The server does not have it.
        UserError: It has not arrived after ``ATTEMPTS`` attempts without progress.
    """
    failures, pause, done = 0, FIRST_PAUSE, 0
    transfer = _Download(url) if url.startswith(('http://', 'https://')) else _Stream(url)
    with target.open('wb') as file:
        while True:
            try:
                transfer.run(file)
                _check(target, file, sha256)
                return
            except urllib.error.HTTPError as error:
                reason = f'HTTP {error.code} {error.reason}'
                if error.code not in FOR_THE_MOMENT:
                    raise Missing(f'{shorten(url)} cannot be fetched: {reason}.') from error
            except ValueError as error:
                raise UserError(f'{shorten(url)} cannot be fetched: {one_line(error)}') from error
            except (OSError, http.client.HTTPException, EOFError) as error:
                if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT):
                    raise CannotWrite(f'cannot write {target}: the disk is full; let TMPDIR name another '
                                      'folder.') from error
                reason = _reason(error)
            position = file.tell()
            failures, done = (1, position) if position >= done + PROGRESS else (failures + 1, done)
            pause = FIRST_PAUSE * 2 ** (failures - 1)
            if failures >= ATTEMPTS:
                raise UserError(f'{shorten(url)} cannot be fetched after {ATTEMPTS} attempts: {reason}. Continue when '
                                'it can be reached again; a training continues with --resume auto.')
            _logger.warning(f'{shorten(url)}: {reason}. Trying again in {pause:g} s.')
            time.sleep(pause)


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        error = error.reason
    if isinstance(error, TimeoutError):
        return f'no answer within {_timeout():g} s'
    return getattr(error, 'strerror', None) or one_line(error)


def _timeout() -> float:
    """Return the seconds of silence after which a server is asked again."""
    return float(os.environ.get('TIMM_NPU_IRV2_FETCH_TIMEOUT') or 60)


def _check(target: Path, file: BinaryIO, sha256: str) -> None:
    file.flush()
    if sha256 and checksum(target) != sha256:
        file.seek(0)
        file.truncate()
        raise _Broken('its checksum is not that of _info.json')


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


class _Download:
    """A file of an HTTP server, which goes on where it broke off if the server can."""

    def __init__(self, url: str) -> None:
        self.url, self.version = url, ''

    def run(self, file: BinaryIO) -> None:
        """Write the rest of the file, or all of it."""
        start = file.tell()
        headers = {'Range': f'bytes={start}-', 'If-Range': self.version} if start and self.version else {}
        request = urllib.request.Request(self.url, headers={'User-Agent': 'timm-npu-irv2', **headers})
        with urllib.request.urlopen(request, timeout=_timeout()) as answer:
            if answer.status != http.client.PARTIAL_CONTENT:
                start = 0
                file.seek(0)
                file.truncate()
            etag = answer.headers.get('ETag') or ''
            self.version = (etag if not etag.startswith('W/') else '') or answer.headers.get('Last-Modified') or ''
            length = answer.headers.get('Content-Length')
            while piece := answer.read1(PIECE):  # read would lose what has arrived before a silence
                file.write(piece)
            if length is not None and file.tell() != start + int(length):
                raise _Broken(f'the connection broke off after {file.tell()} of {start + int(length)} bytes')


class _Stream:
    """A source that WebDataset opens; each attempt reads it from its beginning."""

    def __init__(self, url: str) -> None:
        self.url = url

    def run(self, file: BinaryIO) -> None:
        """Write all of it."""
        from webdataset.gopen import gopen  # noqa: PLC0415 - an optional dependency

        file.seek(0)
        file.truncate()
        with contextlib.closing(gopen(self.url)) as content:
            shutil.copyfileobj(content, file, PIECE)


def is_compressed(path: Path) -> bool:
    """Return True if a file is compressed by gzip, bzip2 or xz."""
    with open_regular(path) as file:
        return any(file.read(6).startswith(magic) for magic in DECOMPRESSORS if not file.seek(0))


def decompress(source: Path, target: Path) -> None:
    """Write the content of a compressed file, as far as it can be read."""
    with source.open('rb') as file:
        start = file.read(6)
    opener = next(opener for magic, opener in DECOMPRESSORS.items() if start.startswith(magic))
    damage = EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError
    with contextlib.suppress(*damage), opener(source) as content, target.open('wb') as file:
        shutil.copyfileobj(content, file, PIECE)

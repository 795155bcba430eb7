"""Results in shards: files that are written as the results come, so that an interrupted run can go on.

Shard i has the results of images i·size, …, (i + 1)·size - 1 of a list of images, in any number of processes. A shard
appears whole or not at all. ``_run.json`` beside the shards says what they are of.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from ..serialization import atomic_write, make_folder, read_json
from .flags import DEVICE_SWITCHES
from .table import EXTENSIONS, to_csv, to_format, utf8_rows

__all__ = ['FORMATS', 'ImagesChanged', 'Shards', 'count_images', 'images_of_shards', 'open_shards',
           'settings_of', 'shard_rules', 'shards_to_write']

FORMATS = ('parquet', 'csv', 'json-record')
RECORD = '_run.json'  # readers of Parquet folders leave out names that start with an underscore

# Options that do not change the results of an image, so that an interrupted run may go on with others.
FREE = {
    'batch_size', 'channels_last', 'data', 'data_dir', 'dataset_download', 'device', 'device_modules', 'dist_backend',
    'dist_url', 'fullname', 'fuser', 'gradcam', 'log_freq', 'no_console_results', 'num_gpu', 'on_bad_image', 'picture',
    'results_dir', 'results_file', 'results_format', 'results_shards', 'resume', 'shards', 'torchcompile',
    'torchcompile_mode', 'torchscript', 'workers', *DEVICE_SWITCHES,
}

T = TypeVar('T')


class ImagesChanged(UserError):
    """A list of images that is not the one that the run began with."""


@dataclass(frozen=True)
class Shards:
    """A folder of result files.

    Attributes:
        folder: Folder.
        format: One of ``FORMATS``.
        size: Number of images in a shard; the last one may have fewer.
        images: Number of all images.
        digest: Checksum of the names of all images, as :func:`count_images` returns it.
    """

    folder: Path
    format: str
    size: int
    images: int
    digest: str

    def __len__(self) -> int:
        """Return the number of shards of the whole result."""
        return math.ceil(self.images / self.size)

    def path(self, number: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f'part-{number:08}{EXTENSIONS[self.format]}'

    def done(self) -> set[int]:
        """Return the numbers of the shards that are written."""
        return _numbers(self.folder, EXTENSIONS[self.format])

    def images_in(self, numbers: Iterable[int]) -> int:
        """Return the number of images in some shards."""
        return sum(min(self.size, self.images - number * self.size) for number in numbers)

    def write(self, number: int, rows: Sequence[dict[str, Any]], example: dict[str, Any]) -> None:
        """Write a shard.

        Args:
            number: Number of the shard.
            rows: Rows of the images that could be read.
            example: Row with the columns and types of the others, for a shard without rows.

        Raises:
            CannotWrite: The disk is full, or the folder refuses the file.
        """
        atomic_write(self.path(number), _encode(rows, self.format, example))


def _numbers(folder: Path, ending: str) -> set[int]:
    matches = (re.fullmatch(rf'part-(\d{{8}}){re.escape(ending)}', path.name) for path in folder.iterdir())
    return {int(match[1]) for match in matches if match}


def _encode(rows: Sequence[dict[str, Any]], format: str, example: dict[str, Any]) -> str | bytes:
    if format == 'csv' and not rows:
        return to_csv([example]).splitlines()[0] + '\n'
    if format != 'parquet':
        return to_format(rows, format, '')
    try:
        import pyarrow as pa  # noqa: PLC0415 - an optional dependency
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise UserError('--results-format parquet needs pyarrow: pip install pyarrow.') from error
    schema, buffer = pa.Table.from_pylist(utf8_rows([example])).schema, io.BytesIO()
    pq.write_table(pa.Table.from_pylist(utf8_rows(rows), schema=schema), buffer)
    return buffer.getvalue()


def shard_rules(args: Namespace) -> list[tuple[Any, str]]:
    """Return the rules for results in shards, for ``check_rules``."""
    return [
        (not args.results_dir, 'several processes, --results-shards and --resume write shards: name a folder for them '
                               'with --results-dir.'),
        (args.results_file, '--results-file is one file at the end: leave it out, since shards are in --results-dir.'),
        (args.picture, '--picture needs all images in one process and without shards: leave it out.'),
        (len(args.results_format) > 1 or args.results_format[0] not in FORMATS,
         f'--results-format {" ".join(args.results_format)}: shards have one of {", ".join(FORMATS)}.'),
    ]


def settings_of(args: Namespace, weights: str = '') -> dict[str, Any]:
    """Return the options of inference.py that the results depend on, with the checksum of the checkpoint.

    Args:
        args: Options of inference.py.
        weights: Checksum of the weights, where no checkpoint is named: a published model may have a new revision.
    """
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    return {**settings, 'checkpoint': _checksum(args.checkpoint) or weights}


def _checksum(place: str) -> str:
    """Return the checksum of a file of weights, or of the files in the folder of a deployed network."""
    if not place:
        return ''
    path, digest = Path(place), hashlib.sha256()
    for each in sorted(path.iterdir()) if path.is_dir() else [path]:
        if each.is_file():
            with each.open('rb') as file:
                while block := file.read(2**20):
                    digest.update(block)
    return digest.hexdigest()


def shards_to_write(
        args: Namespace, settings: Sequence[dict[str, Any]], names: Iterable[str],
) -> tuple[Shards, list[int]]:
    """Return the shards of a run of inference.py, and the numbers of those that are missing.

    Args:
        args: Options of inference.py.
        settings: What the results depend on, of each process.
        names: Names of all images.
    """
    count, digest = count_images(names)
    shards = open_shards(Path(args.results_dir), args.results_format[0], args.results_shards, count, digest, settings,
                         args.resume)
    return shards, sorted(set(range(len(shards))) - shards.done())


def open_shards(
        folder: Path,
        format: str,
        size: int | None,
        images: int,
        digest: str,
        settings: Sequence[dict[str, Any]],
        resume: bool,
) -> Shards:
    """Return the shards of a new run, or of one that goes on.

    Args:
        folder: Folder, which is created.
        format: One of ``FORMATS``.
        size: Number of images in a shard; None for that of the run that goes on, or 1000.
        images: Number of images.
        digest: Checksum of their names.
        settings: What the results depend on, as JSON can hold it, of each process.
        resume: Go on with what is in the folder.

    Raises:
        UserError: The folder has results and ``resume`` is false, or they are of other images or settings; or the
            processes have different settings.
        CannotWrite: The folder cannot be written to.
    """
    make_folder(folder)
    with _alone_in(folder):
        return _open_shards(folder, format, size, images, digest, settings, resume)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let no other process begin a run in the folder meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open_shards(
        folder: Path, format: str, size: int | None, images: int, digest: str, settings: Sequence[dict[str, Any]],
        resume: bool,
) -> Shards:
    record, earlier = folder / RECORD, None
    if os.path.lexists(record):
        if not resume:
            raise UserError(f'{folder} has the results of an earlier run: go on with it with --resume, or name another '
                            'folder with --results-dir.')
        earlier = read_json(record)
        size = earlier.get('shard_size') if size is None else size
    elif any(_numbers(folder, ending) for ending in EXTENSIONS.values()):
        raise UserError(f'{folder} has shards, but no {RECORD} that says what they are of: name another folder with '
                        '--results-dir.')
    size = size if isinstance(size, int) and size > 0 else 1000
    every = [{'images': images, 'names': digest, 'shard_size': size, 'format': format,
              'settings': json.loads(json.dumps(own, default=str))} for own in settings]
    now = every[0]
    for rank, own in enumerate(every):
        if own != now:
            raise UserError(f'rank {rank} has {_difference(now, own)} than rank 0: give all processes the same.')
    if earlier is None:
        atomic_write(record, json.dumps(now, indent=2) + '\n')
    elif earlier != now:
        raise UserError(f'--resume: {folder} was begun with {_difference(earlier, now)}: do as then, or name another '
                        'folder with --results-dir.')
    return Shards(folder, format, size, images, digest)


def _difference(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    if earlier.get('images') != now['images']:
        return f'{earlier.get("images")} images, of which there are {now["images"]} now'
    if earlier.get('names') != now['names']:
        return 'other images, or in another order'
    old = {**earlier, **(earlier.get('settings') or {})}
    new = {**now, **now['settings']}
    changed = [name for name in new if name not in ('settings', 'names') and old.get(name) != new[name]]
    return ', '.join(f'another {name.replace("_", "-")}' for name in changed[:5]) or 'another version of this program'


class _Names:
    """The number of some names, and their checksum."""

    def __init__(self) -> None:
        self.count, self._hash = 0, hashlib.sha256()

    def add(self, name: str) -> None:
        self.count += 1
        self._hash.update(name.encode(errors='surrogateescape') + b'\0')

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def count_images(names: Iterable[str]) -> tuple[int, str]:
    """Return the number of names and their checksum."""
    found = _Names()
    for name in names:
        found.add(name)
    return found.count, found.digest


def images_of_shards(
        images: Iterable[T],
        name: Callable[[T], str],
        shards: Shards,
        chosen: Iterable[int],
) -> Iterator[tuple[int, T]]:
    """Yield (number of the shard, image) for the images of some shards.

    Args:
        images: All images, in their order.
        name: Function from an image to its name.
        shards: Shards that they are divided into.
        chosen: Numbers of the shards to yield.

    Raises:
        ImagesChanged: The images are not those that ``shards`` were opened for. It is raised at the end.
    """
    wanted, found = frozenset(chosen), _Names()
    for image in images:
        if found.count // shards.size in wanted:
            yield found.count // shards.size, image
        found.add(name(image))
    if (found.count, found.digest) != (shards.images, shards.digest):
        raise ImagesChanged('images were added, removed or renamed during the run: its shards may be of others than '
                            f'they should be. Remove {shards.folder} and start again.')

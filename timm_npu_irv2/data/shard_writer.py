"""WebDataset shards from a folder of images.

    timm-npu-irv2 shards DIR OUT          # train/ and val/ of DIR as shards with _info.json, as timm reads them
    timm-npu-irv2 shards --check OUT      # compare the shards with their checksums

The same command goes on with an interrupted run, and writes shards again that are damaged. The bytes of a shard depend
on the images and the options alone.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from .. import rules, schema
from ..errors import CannotWrite, UserError
from ..serialization import atomic_file, atomic_write, make_folder, open_record, read_json
from .classes import read_class_map
from .fetch import checksum
from .folder import FolderReader
from .samplers import derive_seed
from .splits import find_split

__all__ = ['check_shards', 'write_shards']

JPEG = 'jpeg', 'jpe', 'jfif'  # timm reads .jpg, .png and .webp alone
RECORD = '_shards.jsonl'  # the settings, and a line for each shard that is written


@dataclass(frozen=True)
class Shard:
    """A shard that is written.

    Attributes:
        name: Name of the file.
        samples: Number of images.
        sha256: Checksum of the file.
    """

    name: str
    samples: int
    sha256: str


def write_shards(
        root: Path,
        out: Path,
        *,
        images_per_shard: int = 1000,
        seed: int = 42,
        class_map: str = '',
) -> tuple[int, int]:
    """Write the images of a folder as shards, or go on with it; return the numbers of shards, and of those written now.

    The images of the training split are shuffled; those of the others are in their order.

    Args:
        root: Folder with train/ and val/, or with class folders.
        out: Folder of the shards.
        images_per_shard: Number of images in a shard; the last one may have fewer.
        seed: Seed of the shuffle.
        class_map: File of class indices by name; '' to number the class folders.

    Raises:
        UserError: No images, or ``out`` has shards of other images or settings.
        CannotWrite: The disk is full, or the folder refuses the files.
    """
    if root.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f'{out} is inside of {root}, where its shards would be taken for images: name another folder.')
    readers = _find_splits(root, class_map)
    settings = {'images_per_shard': images_per_shard, 'seed': seed, 'splits': {
        split: {'images': len(reader), 'names': reader.hash_names()} for split, reader in readers.items()}}
    make_folder(out)
    with _open_record(out, settings) as (record, done):
        total = sum(-(-len(reader) // images_per_shard) for reader in readers.values())
        written, splits = 0, {}
        with tqdm(total=total, unit='shard', disable=None) as bar:
            for split, reader in readers.items():
                shards = []
                for name, images in _divide(split, reader, images_per_shard, seed):
                    shard = done.get(name)
                    if shard is None or not _is_whole(out, shard):
                        shard = _write_shard(out, name, reader, images, shard)
                        print(json.dumps(asdict(shard)), file=record, flush=True)
                        written += 1
                    shards.append(shard)
                    bar.update()
                splits[split] = _describe(split, shards)
        info = {'class_to_idx': next(iter(readers.values())).class_to_idx, 'splits': splits}
        atomic_write(out / '_info.json', json.dumps(info, indent=1) + '\n')
    return total, written


def check_shards(out: Path) -> int:
    """Compare the shards of a folder with their checksums and return their number.

    Raises:
        UserError: A shard is damaged or missing, or there are no checksums.
    """
    path = out / '_info.json'
    info = read_json(path)
    with rules.naming(path):
        schema.check_shards(info)
    splits = info.get('splits', {}).values()
    if not splits or not all(split.get('sha256') for split in splits):
        raise UserError(f'{path} has no checksums: make the shards with timm-npu-irv2 shards.')
    hashes = {name: sha256 for split in splits
              for name, sha256 in zip(split['filenames'], split['sha256'], strict=True)}
    damaged = [name for name, sha256 in tqdm(hashes.items(), unit='shard', disable=None)
               if not _is_whole(out, Shard(name, 0, sha256))]
    if damaged:
        raise UserError(f'{len(damaged)} of {len(hashes)} shards are damaged or missing, such as {out / damaged[0]}: '
                        'the command that made them writes them again.')
    return len(hashes)


def _find_splits(root: Path, class_map: str) -> dict[str, FolderReader]:
    """Return the images of the splits of a folder; a folder of class folders is the training split."""
    table = read_class_map(class_map, root) if class_map else None
    readers: dict[str, FolderReader] = {}
    for split in 'train', 'validation', 'test':
        try:
            folder = find_split(root, split)
        except UserError:
            if not root.exists():
                raise
            continue
        if readers and (folder == root or any(Path(each.root) == folder for each in readers.values())):
            continue
        expected = table or next((reader.class_to_idx for reader in readers.values()), None)
        readers[split] = FolderReader(folder, expected, class_map=bool(class_map))
    if not readers:
        raise UserError(f'there are no images to make shards of in {root}: it needs train/ and val/, or class folders.')
    return readers


@contextlib.contextmanager
def _open_record(out: Path, settings: dict[str, Any]) -> Iterator[tuple[TextIO, dict[str, Shard]]]:
    """Yield the record of a folder, which no other process may write to meanwhile, and the shards that are written."""
    path = out / RECORD
    foreign = (UserError(f'{out} has tar files, but no {RECORD} that says what they are of: name another folder.')
               if any(out.glob('*.tar')) else None)
    if foreign and not os.path.lexists(path):
        raise foreign
    try:
        with open_record(path) as record:
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
            earlier, done = _read_record(record)
            if earlier is None:
                if foreign:
                    raise foreign
                record.seek(0)
                record.truncate()
                print(json.dumps(settings), file=record, flush=True)
            elif earlier != settings:
                raise UserError(f'{out} was begun with {_difference(earlier, settings)}: do as then, or name another '
                                'folder.')
            else:
                print(file=record, flush=True)  # ends a line that a killed process has begun
            yield record, done
    except BlockingIOError as error:
        raise UserError(f'another process is writing to {out}: wait until it has ended.') from error
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise CannotWrite(f'cannot write {path}: {error.strerror or error}.') from error


def _read_record(record: TextIO) -> tuple[dict[str, Any] | None, dict[str, Shard]]:
    settings, done = None, {}
    for line in record:
        try:
            entry = json.loads(line)
            if settings is None:
                settings = dict(entry)
            else:
                done[entry['name']] = Shard(**entry)
        except (KeyError, TypeError, ValueError, RecursionError):
            continue  # a line that was being written when the process was killed
    return settings, done


def _difference(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    names = {'images_per_shard': '--images-per-shard', 'seed': '--seed'}
    changed = [f'{option} {earlier.get(name)}' for name, option in names.items() if earlier.get(name) != now[name]]
    return ', '.join(changed) or 'other images'


def _divide(split: str, reader: FolderReader, size: int, seed: int) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Yield the name of each shard, and (key, index) of its images."""
    order = torch.arange(len(reader))
    if split == 'train':
        order = torch.randperm(len(reader), generator=torch.Generator().manual_seed(derive_seed(seed, len(reader))))
    for number, images in enumerate(order.split(size)):
        first = number * size
        yield f'{split}-{number:05}.tar', [(f'{first + i:09}', index) for i, index in enumerate(images.tolist())]


def _is_whole(out: Path, shard: Shard) -> bool:
    try:
        return checksum(out / shard.name) == shard.sha256
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f'{out / shard.name} cannot be read: {error.strerror}.') from error


def _write_shard(
        out: Path,
        name: str,
        reader: FolderReader,
        images: Sequence[tuple[str, int]],
        earlier: Shard | None,
) -> Shard:
    """Write a shard; ``earlier`` is what is known of it if it is damaged or missing."""
    with atomic_file(out / name) as file:
        hashing: Any = _HashingFile(file)
        with tarfile.open(fileobj=hashing, mode='w|', format=tarfile.GNU_FORMAT) as archive:
            for key, index in images:
                for ending, content in _sample(reader, index):
                    member = tarfile.TarInfo(f'{key}.{ending}')
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        written = Shard(name, len(images), hashing.digest.hexdigest())
        if earlier is not None and written != earlier:
            raise UserError(f'{out / name} is damaged, and images in it have changed since it was made: remove {out}, '
                            'and make all shards again.')
    return written


class _HashingFile:
    """A file that computes the checksum of what is written to it."""

    def __init__(self, file: Any) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.file.write(content)


def _sample(reader: FolderReader, index: int) -> Iterator[tuple[str, bytes]]:
    """Yield ending and content of each file of a sample."""
    image = reader.images[index]
    try:
        file, target = reader[index]
        with file:
            content = file.read()
    except OSError as error:
        raise UserError(f'{image.path} cannot be read: {error.strerror}.') from error
    meta = {'filename': image.name, 'label': image.folder.rpartition('/')[2]}
    ending = image.name.rpartition('.')[2].lower()
    yield 'jpg' if ending in JPEG else ending, content
    yield 'cls', str(target).encode()
    yield 'json', json.dumps(meta).encode()


def _describe(split: str, shards: Sequence[Shard]) -> dict[str, Any]:
    """Return a split as timm's reader finds it in _info.json."""
    return {
        'name': split, 'num_samples': sum(shard.samples for shard in shards),
        'filenames': [shard.name for shard in shards], 'shard_lengths': [shard.samples for shard in shards],
        'sha256': [shard.sha256 for shard in shards],
    }

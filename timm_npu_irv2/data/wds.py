"""WebDataset shards as a data set with an index: any sample can be read, in any order and by any process.

The global order of an epoch, its augmentation and the position of a run are then those of every other data set, so
they are exact for any number of processes and workers. torchdata's StatefulDataLoader keeps the states of workers,
which are of use to the same number of workers alone; litdata and MosaicML's streaming read formats of their own, and
WebDataset itself has no position: so none of them is used here, and WebDataset opens what is neither a file nor http.
"""

import hashlib
import io
import json
import math
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from timm.data.readers.reader import Reader
from timm.data.readers.targets import get_field, has_field, parse_target_keys

from ..distributed import World, agree
from ..errors import UserError
from .classes import clean_name, map_classes
from .fetch import shorten
from .folder import ENDINGS
from .samplers import SHUFFLE_WINDOW
from .shard_files import ShardFiles
from .shard_list import ShardList, find_shards

__all__ = ['LeftOut', 'ShardReader', 'open_shards']

IMAGES = ('jpg', 'png', 'webp', 'jpeg', *sorted(ending[1:] for ending in ENDINGS - {'.png', '.webp'}))


class LeftOut(Exception):
    """A sample that belongs to no class on purpose: its label is -1."""


class ShardReader(Reader):
    """timm's reader interface for shards.

    A label is the number in the .cls file; with ``target_key`` it is that field of the .json file, a number or the name
    of a class.

    Args:
        shards: Shards with their numbers of samples.
        class_to_idx: Class indices by name, which names in the .json files are looked up in; None for those of the
            shards.
        num_classes: Number of classes of the network, which labels must be below; None for no check.
        input_key: Endings of images, with ';' between them; the first one that a sample has is read.
        target_key: Field of the .json files; None for the field that the shards name, or the .cls files.
        num_samples: Number of samples in an epoch; None for those that there are.

    Attributes:
        class_to_idx: Class indices by name.
        lengths: Number of samples in each shard.
        bad_images: Reasons by the names of the shards whose end cannot be read.
        epoch_samples: Number of samples in an epoch; None for those that there are.
    """

    def __init__(
            self,
            shards: ShardList,
            *,
            class_to_idx: Mapping[str, int] | None = None,
            num_classes: int | None = None,
            input_key: str | None = None,
            target_key: str | None = None,
            num_samples: int | None = None,
    ):
        super().__init__()
        if parse_target_keys(target_key):
            raise UserError('--target-key names one field: an image has one class.')
        self.shards, self.lengths = shards, shards.lengths
        self.class_to_idx = dict(class_to_idx or shards.class_to_idx)
        self._numbers = self._renumber(shards.class_to_idx)
        self.num_classes, self.target_key = num_classes, target_key or shards.label
        self.endings = (input_key or ';'.join(IMAGES)).split(';')
        self._starts = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))
        if not len(self):
            raise UserError(f'there is no sample in {len(shards.urls)} shards, such as {shorten(shards.urls[0])}.')
        total = num_samples or shards.total
        self.bad_images, self.epoch_samples = shards.damaged, total if total != len(self) else None
        self._files = ShardFiles(shards.urls, shards.hashes, capacity=self._spread())

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        shard, sample = self._place(index)
        (found, _), expected = self._files.count(shard), self.lengths[shard]
        if found > expected:
            raise UserError(f'shard {self._url(shard)} has {found} samples, not {expected} as _info.json says: write '
                            'that file again.')
        key, files = self._files.read(shard, sample)
        name = f'{self._url(shard)}/{key}'
        target = self._target(files, name)
        content = next((files[ending] for ending in self.endings if ending in files), None)
        if content is None:
            raise ValueError(f'there is no .{", .".join(self.endings)} file for it')
        return io.BytesIO(content), target

    def hash_names(self) -> str:
        """Return a checksum of the names and the lengths of the shards."""
        names = (url.rpartition('/')[2] for url in self.shards.urls)
        lines = '\0'.join(f'{name}|{length}' for name, length in zip(names, self.lengths, strict=True))
        return hashlib.sha256(lines.encode(errors='surrogateescape')).hexdigest()

    def _renumber(self, own: Mapping[str, int]) -> dict[int, int]:
        """Return the number of the network for each number in the shards, whose names ``own`` tells."""
        if not own or own == self.class_to_idx:
            return {}
        named = {clean_name(name): number for name, number in own.items()}
        map_classes(named, self.class_to_idx)
        return {number: self.class_to_idx[name] for name, number in named.items()}

    def keep_for_lanes(self, number: int) -> None:
        """Keep the fetched shards of some lanes, where fewer processes than at the beginning read those of others."""
        self._files.capacity = min(len(self.lengths), self._spread() * number)

    def _place(self, index: int) -> tuple[int, int]:
        """Return the number of the shard, and of the sample in it."""
        shard = int(np.searchsorted(self._starts, index, side='right')) - 1
        return shard, int(index - self._starts[shard])

    def _url(self, shard: int) -> str:
        return shorten(self.shards.urls[shard])

    def _spread(self) -> int:
        """Return how many shards are read at the same time."""
        return min(len(self.lengths), math.ceil(SHUFFLE_WINDOW / max(1, np.median(self.lengths))) + 2)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        shard, sample = self._place(index)
        try:
            name, _ = self._files.read(shard, sample)
        except ValueError:
            name = f'#{sample}'
        if basename:
            return name.rpartition('/')[2]
        return f'{self._url(shard)}/{name}' if absolute else f'{self._url(shard).rpartition("/")[2]}/{name}'

    def _target(self, files: dict[str, bytes], name: str) -> int:
        """Return the index of a sample's class."""
        key, label = self.target_key, None
        if key and 'json' in files:
            fields = json.loads(files['json'])
            label = get_field(fields, key) if has_field(fields, key) else None
        elif not key and 'cls' in files:
            label = files['cls'].decode(errors='replace').strip()
        if label is None:
            raise ValueError(f'it has no class, as there is no {key or ".cls file"} for it')
        index = self._index(label, name, by_name=bool(key))
        if index < 0:
            raise LeftOut
        if index >= (self.num_classes or index + 1):
            raise UserError(f'image {name} has class {index}, and the network has {self.num_classes}: set '
                            '--num-classes in a training, or name the right shards.')
        return index

    def _index(self, label: Any, name: str, by_name: bool) -> int:
        if isinstance(label, str) and by_name:
            index = self.class_to_idx.get(clean_name(label))
            if index is None:
                known = 'the network does not know' if self.class_to_idx else 'has no number: give one with --class-map'
                raise UserError(f"image {name} is of class '{label}', which {known}.")
            return index
        try:
            return self._numbers.get(int(label), int(label))
        except (TypeError, ValueError) as error:
            raise UserError(f'image {name} has the class {label!r}, which is no number.') from error


def open_shards(
        root: str | None,
        split: str,
        *,
        on_bad_image: str = 'stop',
        world: World | None = None,
        **options: Any,
) -> ShardReader:
    """Return a reader of the samples in WebDataset shards.

    Args:
        root: Folder or URL of the shards.
        split: Name of the split, or of its shards.
        on_bad_image: 'stop' or 'skip' at a shard that cannot be read to its end.
        world: This process among all, if all open the shards together, so that rank 0 alone counts their samples.
        options: Further arguments of :class:`ShardReader`.
    """
    return ShardReader(agree(lambda: find_shards(root or '', split, on_bad_image), world or World()), **options)

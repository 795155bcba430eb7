"""WebDataset shards through timm's reader, with this package's image reader, bad images and class table."""

import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.dataset import IterableImageDataset
from timm.data.readers.reader_wds import ReaderWds
from timm.data.readers.targets import get_field, has_field

from ..errors import UserError, first_line
from .classes import clean_name
from .decode import read_image
from .folder import ENDINGS

__all__ = ['BadImages', 'ShardReader', 'open_shards']

IMAGES = ('jpg', 'png', 'webp', 'jpeg', *sorted(ending[1:] for ending in ENDINGS - {'.png', '.webp'}))


class BadImages:
    """A record of images that cannot be read, written by the processes that load and read by the main one."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix='timm_npu_irv2-')
        self._path, self._position = Path(self._folder.name) / 'bad_images', 0

    def __getstate__(self) -> dict[str, Any]:  # for a process that loads, which must not remove the folder
        return {'_path': self._path, '_position': 0}

    def add(self, name: str, reason: str) -> None:
        """Add an image."""
        with self._path.open('a', encoding='utf-8') as file:  # a line is written whole
            file.write(json.dumps([name, reason]) + '\n')

    def new(self) -> Iterator[tuple[str, str]]:
        """Yield (name, reason) of the images that were added since the last call."""
        if not self._path.exists():
            return
        with self._path.open('rb') as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b'\n'):
                    break
                self._position += len(line)
                name, reason = json.loads(line)
                yield name, reason


class ShardReader(ReaderWds):
    """timm's reader of shards, which stops at an image that cannot be read, or records it.

    A label is the number in the .cls file; with ``target_key`` it is that field of the .json file, a number or the name
    of a class.

    Args:
        options: Arguments of timm's reader.
        class_to_idx: Class indices by name, which names in the .json files are looked up in; None if there are none.
        num_classes: Number of classes of the network, which labels must be below; None for no check.
        on_bad_image: 'stop' or 'skip' at an image or a shard that cannot be read.
    """

    def __init__(
            self,
            *,
            class_to_idx: Mapping[str, int] | None = None,
            num_classes: int | None = None,
            on_bad_image: str = 'stop',
            **options: Any,
    ):
        super().__init__(**{'input_key': ';'.join(IMAGES), **options})
        if self.target_keys:
            raise UserError('--target-key names one field: an image has one class.')
        self.class_to_idx, self.num_classes = dict(class_to_idx or {}), num_classes
        self.on_bad_image, self.bad_images = on_bad_image, BadImages()

    def _lazy_init(self) -> None:
        import webdataset  # noqa: PLC0415 - an optional dependency

        super()._lazy_init()
        pipeline: Any = self.ds
        stages = pipeline.pipeline
        tar = -4 if self.is_training else -3  # before the shuffle of samples, their decoding and their renaming
        stages[tar] = self._samples
        stages[-2] = webdataset.map(self._decode)

    def _samples(self, shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the samples of shards, one after another: in all of them at once, names that repeat would merge."""
        from webdataset.tariterators import tarfile_samples  # noqa: PLC0415 - an optional dependency

        for shard in shards:
            yield from tarfile_samples([shard], handler=partial(self._handle_shard, shard['url']))

    def _decode(self, sample: dict[str, Any]) -> dict[str, Any] | None:
        """Return the image and the label of a sample; None to leave it out."""
        name = f'{sample.get("__url__", "")}/{sample["__key__"]}'
        content = next((sample[key] for key in self.input_key.split(';') if key in sample), None)
        try:
            target = self._target(sample, name)
            if target is None:
                return None
            if content is None:
                raise ValueError(f'there is no {self.input_key.replace(";", ", .")} file for it')
            image: Image.Image = read_image(io.BytesIO(content), self.input_img_mode or 'RGB')
        except UserError:
            raise
        except Exception as error:  # decoders fail in as many ways as files can be damaged
            self._report(name, error)
            return None
        return {'jpg': image, 'target': target}

    def _target(self, sample: dict[str, Any], name: str) -> int | None:
        """Return the index of a sample's class; None for -1, which timm leaves out."""
        key, label = self.target_key or self.split_info.alt_label, None
        if key and 'json' in sample:
            fields = json.loads(sample['json'])
            label = get_field(fields, key) if has_field(fields, key) else None
        elif not key and 'cls' in sample:
            label = sample['cls'].decode(errors='replace').strip()
        if label is None:
            raise ValueError(f'it has no class, as there is no {key or ".cls file"} for it')
        index = self._index(label, name, by_name=bool(key))
        if index >= (self.num_classes or index + 1):
            raise UserError(f'image {name} has class {index}, and the network has {self.num_classes}: set '
                            '--num-classes in a training, or name the right shards.')
        return None if index < 0 else index

    def _index(self, label: Any, name: str, by_name: bool) -> int:
        if isinstance(label, str) and by_name:
            index = self.class_to_idx.get(clean_name(label))
            if index is None:
                known = 'the network does not know' if self.class_to_idx else 'has no number: give one with --class-map'
                raise UserError(f"image {name} is of class '{label}', which {known}.")
            return index
        try:
            return int(label)
        except (TypeError, ValueError) as error:
            raise UserError(f'image {name} has the class {label!r}, which is no number.') from error

    def _handle_shard(self, name: str, error: Exception) -> bool:
        """Report a shard that cannot be read to its end."""
        if isinstance(error, UserError):
            raise error
        self._report(name, error)
        return True

    def _report(self, name: str, error: Exception) -> None:
        # WebDataset adds arguments to the errors of others, which would be part of their text.
        reason = first_line(Exception(error.args[0])) if len(error.args) > 1 else first_line(error)
        if self.on_bad_image == 'stop':
            raise UserError(f'image {name} cannot be read: {reason}') from error
        self.bad_images.add(name, reason)


def open_shards(root: str | None, **options: Any) -> IterableImageDataset:
    """Return a stream of the images in WebDataset shards.

    Args:
        root: Folder or URL of the shards.
        options: Further arguments of :class:`ShardReader`.
    """
    given = {name: value for name, value in options.items() if value is not None}
    return IterableImageDataset(None, reader=ShardReader(root=root or '', **given))

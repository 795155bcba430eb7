"""What a worker does: read the images of a batch, augment them, and make uint8 tensors of them.

An image that can't be read, or whose pixels have no known meaning, never becomes another image unnoticed: it stops the
run, or it is left out, told and counted.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError, first_line
from .decode import to_pil_mode
from .samplers import Batch, SampleKey, derive_seed, preserve_rng_state, reseed

__all__ = [
    'BatchDataset',
    'LoadedBatch',
    'SplitTransform',
    'WorkerLost',
    'ignore_signals',
    'is_lost_worker',
    'to_pil_mode',
]

GRACE = 30  # torchrun's, too, between SIGTERM and SIGKILL


class LoadedBatch(NamedTuple):
    """A batch on its way from a worker to the device.

    Attributes:
        images: uint8 (or, without the prefetcher, float) images; None if none of the batch could be read.
        targets: Their class indices.
        seed: For what is drawn on the device.
        mixes: Whether the batch may be mixed.
        skipped: (index in the data set, name, reason) of the images that could not be read.
    """

    images: Tensor | None
    targets: Tensor | None
    seed: int
    mixes: bool
    skipped: list[tuple[int, str, str]]


class SplitTransform:
    """timm's three transforms for augmentation splits as one: a clean image and ``num_splits - 1`` augmented ones."""

    def __init__(self, transforms: Sequence[Callable], num_splits: int):
        self.base, self.augment, self.finish = transforms
        self.num_splits = num_splits

    def __call__(self, image: Any) -> tuple[Any, ...]:
        image = self.base(image)
        augmented = (self.augment(image) for _ in range(self.num_splits - 1))
        return tuple(self.finish(each) for each in (image, *augmented))


class BatchDataset(Dataset[LoadedBatch]):
    """A map-style data set whose keys are whole batches.

    Args:
        samples: timm's or torchvision's data set of (PIL image, class index), without a transform.
        transforms: One for each image size that a batch can have.
        image_mode: The PIL mode that every image is brought to.
        collate: Makes tensors of a list of (image, class index).
        seed: The run's seed; None for transforms without randomness.
        on_bad_image: 'stop' with a UserError at an image that cannot be read, or 'skip' it. In training the next one
            of the data set takes its place, so that batches keep their size; elsewhere its place is left out.
    """

    def __init__(
            self,
            samples: Dataset,
            transforms: Sequence[Callable],
            image_mode: str,
            collate: Callable,
            seed: int | None = None,
            on_bad_image: str = 'stop',
    ):
        self.samples, self.transforms, self.image_mode, self.collate = samples, transforms, image_mode, collate
        self.seed, self.on_bad_image = seed, on_bad_image

    def __getitem__(self, batch: Batch) -> LoadedBatch:
        skipped: dict[int, tuple[str, str]] = {}
        with preserve_rng_state():
            samples = [sample for draw in batch.draws for sample in self._sample(batch, draw, skipped)]
            images, targets = self.collate(samples) if samples else (None, None)
        told = [(index, name, reason) for index, (name, reason) in skipped.items()]
        return LoadedBatch(images, targets, batch.seed, batch.mixup, told)

    def _sample(self, batch: Batch, draw: SampleKey, skipped: dict[int, tuple[str, str]]) -> Iterator[tuple[Any, Any]]:
        """The draw's image and target, once; not at all where it is skipped and nothing takes its place."""
        places = range(draw.index, draw.index + (len(self.samples) if self.seed is not None else 1))
        for index in (place % len(self.samples) for place in places):
            try:
                image, target = self._read(index)
            except Exception as error:  # decoders fail in as many ways as files can be damaged
                skipped[index] = self._name(index), first_line(error)
                if self.on_bad_image == 'stop':
                    raise UserError('image {} cannot be read: {}'.format(*skipped[index])) from error
                continue
            if self.seed is not None:
                reseed(derive_seed(self.seed, batch.epoch, *draw))
            yield self.transforms[batch.size](image), target
            return
        if self.seed is not None:
            raise UserError('none of {} images can be read; the last one, {}: {}'.format(len(places), *skipped[index]))

    def _read(self, index: int) -> tuple[Image.Image, Any]:
        """Decode one image; not through timm's ImageDataset, which puts others in the places of those it can't read."""
        if not hasattr(self.samples, 'reader'):
            image, target = self.samples[index]
            return to_pil_mode(image, self.image_mode), target
        file, target = self.samples.reader[index]
        with file if hasattr(file, 'close') else contextlib.nullcontext():
            return to_pil_mode(Image.open(file), self.image_mode), -1 if target is None else target

    def _name(self, index: int) -> str:
        """The image's file, or what else tells which it is."""
        if hasattr(self.samples, 'filename'):
            return self.samples.filename(index, absolute=True)
        return f'{index} of the data set'


def ignore_signals(worker_id: int) -> None:
    """For workers: Ctrl-C and a cluster's SIGTERM reach the whole process group, but a last step is still to be made.

    The main process ends its workers in time; one that it can't end otherwise goes after ``GRACE`` seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))


class WorkerLost(RuntimeError):
    """A worker was killed while it sent a batch."""


def is_lost_worker(error: BaseException) -> bool:
    """Whether an error is torch's for a worker that was killed; it can come up anywhere in the main process."""
    return isinstance(error, WorkerLost) or (isinstance(error, RuntimeError) and 'DataLoader worker (pid' in str(error))

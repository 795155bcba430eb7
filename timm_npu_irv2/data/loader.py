"""Loaders: images from disk to the device.

timm makes the data sets, the transforms, Mixup and random erasing. This package adds order: a sampler
(``samplers.py``) decides in the main process which samples a batch holds and with which seeds; a worker process turns
a :class:`Batch` into uint8 images (``worker.py``); :class:`DeviceLoader` moves them to the device and normalises, mixes
and erases there, one batch ahead.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from timm.data import Mixup
from timm.data.loader import fast_collate
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from .. import device as devices
from ..distributed import World
from ..errors import UserError, first_line
from ..ops.normalize import normalize_images
from .augmentation import Augmentation
from .dataset import ImageDataset, class_to_idx
from .fast import collate, has_jpeg_decoder
from .pipeline import ImagePipeline
from .samplers import (
    BatchSampler,
    EvalBatchSampler,
    RankSampler,
    ScheduledBatches,
    TrainBatchSampler,
    UniformBatches,
    order_shards,
    preserve_rng_state,
    reseed,
)
from .worker import (
    BatchDataset,
    LoadedBatch,
    WorkerDataLoader,
    start_method,
    start_worker,
    translate_worker_errors,
)

__all__ = ['DeviceLoader', 'create_eval_loader', 'create_train_loader', 'create_train_sampler']

_logger = logging.getLogger(__name__)


class DeviceLoader:
    """A loader of normalised images (N, C, H, W) and their targets, on the device and in its layout.

    Args:
        batches: Data set of whole batches.
        sampler: Sampler of the batches.
        pipeline: Mean and deviation of the images.
        device: Device of the batches.
        num_workers: Number of worker processes; 0 loads in this process.
        dtype: Type of the images.
        mixup: timm's Mixup of whole batches.
        erasing: timm's random erasing of whole batches.
        mirror: True to let the mirror image follow each image.

    Attributes:
        sampler: Sampler of the batches.
        samples: Data set of the images.
        bad_images: Reasons by the names of the images that could not be read so far.
        class_to_idx: Class indices by name; None where the data set does not know them.
        pipeline: Image pipeline of the network.
    """

    def __init__(
            self,
            batches: BatchDataset,
            sampler: BatchSampler,
            pipeline: ImagePipeline,
            device: torch.device,
            *,
            num_workers: int = 0,
            dtype: torch.dtype = torch.float32,
            mixup: Mixup | None = None,
            erasing: RandomErasing | None = None,
            mirror: bool = False,
    ):
        self.sampler, self.samples, self.device, self.dtype = sampler, batches.samples, device, dtype
        self.mixup, self.erasing, self.mirror, self.pipeline = mixup, erasing, mirror, pipeline
        self.mean, self.std = (torch.tensor(values, device=device) for values in (pipeline.mean, pipeline.std))
        self.memory_format = devices.memory_format(device)
        self.class_to_idx = class_to_idx(batches.samples)
        self.bad_images: dict[str, str] = {}
        self._skipped: set[int] = set()
        self._loader = WorkerDataLoader(
            batches,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            multiprocessing_context=start_method(num_workers),
            pin_memory=device.type != 'cpu',
            persistent_workers=num_workers > 0,
            worker_init_fn=functools.partial(start_worker, main_process=os.getpid()),
            generator=torch.Generator(),  # iterating leaves torch's global generator alone
        )
        for name, reason in getattr(getattr(self.samples, 'reader', None), 'bad_images', {}).items():
            self._report(name, reason, 'the end of shard')
        self._running: Iterator | None = None  # the workers' endless stream, and its position
        self._position: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch, wherever the iteration starts."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with translate_worker_errors():
            yield from devices.prefetch(self._readable(), self._to_device, self.device)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch that the next iteration yields, without its first ``start_batch`` batches."""
        self.sampler.set_epoch(epoch, start_batch)

    @property
    def indices(self) -> list[int] | None:
        """Indices in the data set, in the order in which an evaluation loader yielded them; None in training."""
        indices = self.sampler.indices
        return None if indices is None else [index for index in indices if index not in self._skipped]

    def close(self) -> None:
        """End the workers now instead of when the loader is deleted."""
        iterator: Any = self._loader._iterator
        self._loader._iterator = self._running = None
        if self._loader.num_workers and iterator is not None:
            # The signal of a worker that was killed raises here, and would print a traceback in a destructor.
            with contextlib.suppress(RuntimeError):
                iterator._shutdown_workers()

    @property
    def average_batch_size(self) -> float:
        """Expected batch size, which differs from --batch-size where several image sizes are scheduled."""
        return self.sampler.average_batch_size

    @property
    def several_sizes(self) -> bool:
        """True if the batches have different image sizes."""
        return len(self._loader.dataset.transforms) > 1  # type: ignore[attr-defined]  # a BatchDataset, see __init__

    @property
    def mixup_enabled(self) -> bool:
        """True if the batches of the next epoch are mixed. It can be switched off."""
        return self.mixup is not None and self.sampler.mixes(self.sampler.epoch)

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self.sampler.mixup_enabled = enabled

    def _from_workers(self) -> Iterator:
        if not self.sampler.endless:
            yield from self._loader
            return
        epoch, start = self.sampler.epoch, self.sampler.start_batch
        if self._running is None or self._position != (epoch, start):
            self._running = iter(self._loader)
        self._position = None
        yield from islice(self._running, len(self.sampler) - start)
        self._position = (epoch + 1, 0)

    def _readable(self) -> Iterator[LoadedBatch]:
        """Yield the batches with at least one image, and log each skipped image once."""
        for loaded in self._from_workers():
            batch = LoadedBatch(*loaded)
            for index, name, reason in batch.skipped:
                self._skipped.add(index)
                if reason:
                    self._report(name, reason)
            if batch.images is not None:
                yield batch

    def _report(self, name: str, reason: str, what: str = 'image') -> None:
        """Log something bad once, and keep it."""
        if name not in self.bad_images:
            _logger.warning(f'Skipped {what} {name}, which cannot be read: {reason}')
        self.bad_images[name] = reason

    def _to_device(self, batch: LoadedBatch) -> tuple[Tensor, Tensor]:
        images, targets, seed, mixes, _ = batch
        assert images is not None and targets is not None  # _readable drops empty batches
        images = images.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = normalize_images(images, self.mean, self.std, self.dtype, self.memory_format)
        else:
            images = images.to(self.dtype, memory_format=self.memory_format)
        if self.mirror:  # each image, then its mirror image
            return torch.stack((images, images.flip(3)), 1).flatten(0, 1), targets.repeat_interleave(2)
        if self.mixup is None and self.erasing is None:
            return images, targets
        with preserve_rng_state(self.device):
            reseed(seed, self.device)
            if self.mixup is not None:
                self.mixup.mixup_enabled = mixes
                images, targets = self.mixup(images, targets)
            if self.erasing is not None:
                images = self.erasing(images)
        return images, targets


def create_train_sampler(
        size: int,
        world: World,
        batch_sizes: Sequence[int],
        *,
        seed: int = 42,
        epoch_repeats: float = 0.0,
        aug_repeats: float = 0.0,
        mixup_off_epoch: int = 0,
        endless: bool = False,
        num_batches: int | None = None,
        lengths: Sequence[int] = (),
        lanes: int = 1,
        **schedule: Any,
) -> TrainBatchSampler:
    """Return the sampler of this process's shuffled batches; whole batches only.

    Args:
        size: Number of samples in the data set.
        world: This process among all.
        batch_sizes: Batch size for each image size.
        seed: Seed of the run.
        epoch_repeats: Passes over the data set per epoch; 0 means one.
        aug_repeats: Number of times each sample comes in a row.
        mixup_off_epoch: First epoch without Mixup; 0 keeps it on.
        endless: Keep the workers busy between epochs.
        num_batches: Batches in an epoch; None for what the data gives.
        lengths: Number of samples in each shard; empty for data that is not in shards.
        lanes: Number of processes among which shards are dealt out, see :func:`.samplers.order_shards`.
        schedule: Further arguments of timm's ``ScheduledBatchSampler``, for several image sizes.

    Raises:
        UserError: The images make no whole batch, or the schedule is impossible.
    """
    samples = RankSampler(size, world.rank, world.size, seed, epoch_repeats, aug_repeats, lengths, lanes)
    if len(samples) < min(batch_sizes) and not num_batches:
        raise UserError(f'{size} training images make no whole batch of {min(batch_sizes)} for each of {world.size} '
                        'process(es): use a smaller --batch-size.')
    if len(batch_sizes) == 1 and not any(schedule.get(name) for name in ('choice_weights', 'schedule_epochs')):
        uniform = UniformBatches(samples, batch_sizes[0], num_batches)
        return TrainBatchSampler(uniform, seed, world.rank, mixup_off_epoch, endless)
    try:
        batches = ScheduledBatches(samples, batch_sizes, seed=seed, num_batches=num_batches, **schedule)
    except ValueError as error:
        raise UserError(f'--train-img-sizes: {first_line(error)}') from error
    return TrainBatchSampler(batches, seed, world.rank, mixup_off_epoch, endless)


def create_train_loader(
        dataset: Dataset,
        sampler: TrainBatchSampler,
        pipeline: ImagePipeline,
        device: torch.device,
        *,
        augmentation: Augmentation | None = None,
        mixup: Mixup | None = None,
        img_sizes: Sequence[int] = (),
        num_workers: int = 0,
        use_prefetcher: bool = True,
        on_bad_image: str = 'stop',
        input_backend: str = 'pillow',
        dtype: torch.dtype = torch.float32,
) -> DeviceLoader:
    """Return the loader of augmented training images.

    Args:
        dataset: Data set with an index.
        sampler: Sampler that :func:`create_train_sampler` returns.
        pipeline: Size, mode, mean and deviation of the images.
        device: Device of the batches.
        augmentation: Settings of the augmentation; None for the defaults.
        mixup: timm's Mixup; None for none.
        img_sizes: Edges of the square images, one for each batch size of the sampler; empty for that of the pipeline.
        num_workers: Number of worker processes.
        use_prefetcher: False to normalise and erase in the workers.
        on_bad_image: 'stop' or 'skip' at an image that cannot be read.
        input_backend: 'pillow', or 'fast' for RGB images as arrays (see ``fast.py``).
        dtype: Type of the images.
    """
    augmentation = augmentation or Augmentation()
    fast = _prepare_backend(input_backend, dataset, pipeline)
    sizes: Sequence[Any] = img_sizes or [pipeline.input_size[-2:]]
    batches = BatchDataset(
        dataset,
        [augmentation.transform(pipeline, size, use_prefetcher, fast) for size in sizes],
        pipeline.input_img_mode,
        _collate(use_prefetcher, fast),
        sampler.seed,
        on_bad_image,
    )
    return DeviceLoader(
        batches,
        sampler,
        pipeline,
        device,
        num_workers=num_workers,
        dtype=dtype,
        mixup=mixup,
        # Without the prefetcher the transform erases, sample by sample.
        erasing=augmentation.random_erasing(device) if use_prefetcher else None,
    )


def create_eval_loader(
        dataset: Dataset,
        pipeline: ImagePipeline,
        world: World,
        *,
        batch_size: int,
        num_workers: int = 0,
        use_prefetcher: bool = True,
        on_bad_image: str = 'stop',
        mirror: bool = False,
        input_backend: str = 'pillow',
        dtype: torch.dtype = torch.float32,
) -> DeviceLoader:
    """Return the loader of evaluation images in their order; rank r yields samples r, r + world.size, …, each once.

    Of shards each process has its own, see :func:`.samplers.order_shards`.

    Args:
        dataset: Data set with an index.
        pipeline: Image pipeline of the network.
        world: This process among all, and its device.
        batch_size: Images in a batch.
        num_workers: Number of worker processes.
        use_prefetcher: False to normalise in the workers.
        on_bad_image: 'stop' or 'skip' at an image that cannot be read.
        mirror: True to let the mirror image follow each image.
        input_backend: 'pillow', or 'fast' for RGB images as arrays (see ``fast.py``).
        dtype: Type of the images.
    """
    fast = _prepare_backend(input_backend, dataset, pipeline)
    size = len(dataset)  # type: ignore[arg-type]  # torch's Dataset declares no __len__
    batches = BatchDataset(
        dataset,
        [pipeline.transform(not use_prefetcher, fast)],
        pipeline.input_img_mode,
        _collate(use_prefetcher, fast),
        None,
        on_bad_image,
    )
    lengths = getattr(getattr(dataset, 'reader', None), 'lengths', ())
    order = order_shards(lengths, world.size) if lengths else None
    sampler = EvalBatchSampler(size, world.rank, world.size, batch_size, order)
    return DeviceLoader(
        batches, sampler, pipeline, world.device, num_workers=num_workers, dtype=dtype, mirror=mirror)


def _prepare_backend(name: str, dataset: Dataset, pipeline: ImagePipeline) -> bool:
    """Let ``dataset`` read as the input backend does; return True for the fast one."""
    if name == 'fast' and pipeline.input_img_mode != 'RGB':
        _logger.warning(f"--input-backend fast is for RGB images, not '{pipeline.input_img_mode}': using pillow.")
        return False
    if name == 'fast' and not has_jpeg_decoder():
        _logger.warning("--input-backend fast: Pillow decodes JPEG files, since simplejpeg is not installed: "
                        "pip install 'timm-npu-irv2[fast]'.")
    if isinstance(dataset, ImageDataset):
        dataset.fast = name == 'fast'
    return name == 'fast'


def _collate(use_prefetcher: bool, fast: bool) -> Callable:
    if fast:
        return collate
    return fast_collate if use_prefetcher else default_collate

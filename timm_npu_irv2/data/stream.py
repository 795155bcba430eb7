"""Data sets that are streams, through timm's own loader."""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.data import create_loader
from timm.data.mixup import FastCollateMixup
from torch import Tensor

from .. import device as devices
from ..distributed import World
from ..errors import UserError
from .augmentation import Augmentation
from .dataset import class_to_idx
from .pipeline import ImagePipeline
from .worker import send_errors, translate_worker_errors

__all__ = ['StreamLoader', 'create_stream_loader']

_logger = logging.getLogger(__name__)


class StreamLoader:
    """timm's loader behind the interface of :class:`~timm_npu_irv2.data.loader.DeviceLoader`.

    A stream has no sample index, so neither the augmentation nor a restart in the middle of an epoch is exact.

    Args:
        loader: Loader of ``timm.data.create_loader``.
        device: Device of the batches.
        dtype: Type of the images.
        pipeline: Image pipeline of the network.
        mixup: timm's Mixup that the loader collates with.
    """

    indices = None

    def __init__(
            self,
            loader: Any,
            device: torch.device,
            dtype: torch.dtype,
            pipeline: ImagePipeline,
            mixup: FastCollateMixup | None = None,
    ):
        self._loader, self.device, self.dtype, self.mixup, self.pipeline = loader, device, dtype, mixup, pipeline
        self.memory_format = devices.memory_format(device)
        self.samples, self.class_to_idx = loader.dataset, class_to_idx(loader.dataset)
        self.average_batch_size = float(getattr(loader, 'loader', loader).batch_size)
        self.bad_images: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with translate_worker_errors():
            try:
                for images, targets in self._loader:
                    yield images.to(self.device, self.dtype, memory_format=self.memory_format), targets.to(self.device)
            except (SyntaxError, ValueError, OSError) as error:
                if isinstance(error, UserError | ConnectionError):
                    raise
                raise UserError(f'an image of the stream cannot be read: {_last_line(error)}; --on-bad-image skip is '
                                'for data sets with an index.') from error

    def close(self) -> None:
        """Do nothing: the workers end with each iteration."""

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch. A stream always starts at its beginning."""
        if start_batch:
            _logger.warning(f'A stream cannot start in the middle of an epoch: epoch {epoch} starts again.')
        self.samples.set_epoch(epoch)

    @property
    def mixup_enabled(self) -> bool:
        """True if batches are mixed. It can be switched off."""
        return self.mixup is not None and self.mixup.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        if self.mixup is not None:
            self.mixup.mixup_enabled = enabled


def create_stream_loader(
        dataset: Any,
        pipeline: ImagePipeline,
        world: World,
        *,
        batch_size: int,
        augmentation: Augmentation | None = None,
        mixup: FastCollateMixup | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        use_prefetcher: bool = True,
        worker_seeding: str = 'all',
        dtype: torch.dtype = torch.float32,
) -> StreamLoader:
    """Return a loader for a stream.

    Args:
        dataset: Stream of timm's.
        pipeline: Image pipeline of the network.
        world: This process among all, and its device.
        batch_size: Images in a batch.
        augmentation: Settings of the augmentation; None for evaluation.
        mixup: timm's Mixup, which collates; None for none.
        num_workers: Number of worker processes.
        pin_memory: Use page-locked memory.
        use_prefetcher: False to normalise in the workers.
        worker_seeding: timm's choice of generators that a worker seeds, 'all' or 'part'.
        dtype: Type of the images.
    """
    if augmentation is None:
        options: dict[str, Any] = {
            'mean': pipeline.mean, 'std': pipeline.std, 'interpolation': pipeline.interpolation,
            'crop_pct': pipeline.crop_pct, 'crop_mode': pipeline.crop_mode,
            'crop_border_pixels': pipeline.crop_border_pixels, 'use_prefetcher': use_prefetcher,
        }
    else:
        options = {**augmentation.transform_options(pipeline, use_prefetcher), 're_split': augmentation.re_split,
                   'worker_seeding': worker_seeding, 'persistent_workers': False}
    loader = create_loader(
        dataset,
        input_size=pipeline.input_size,
        batch_size=batch_size,
        num_workers=num_workers,
        distributed=world.distributed,
        pin_memory=pin_memory,
        img_dtype=dtype,
        device=world.device,
        collate_fn=mixup,
        **options,
    )
    inner = getattr(loader, 'loader', loader)
    inner.worker_init_fn = functools.partial(_start_worker, inner.worker_init_fn)
    return StreamLoader(loader, world.device, dtype, pipeline, mixup)


def _start_worker(seed_worker: Callable[[int], None], worker_id: int) -> None:
    send_errors()
    seed_worker(worker_id)


def _last_line(error: BaseException) -> str:
    """Return the last line of an error's text: a worker's has a traceback before it."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]

"""Images from disk to the device: augmentation, and the two loaders.

timm makes the data sets, the transforms, Mixup and random erasing. What is added is order: a *plan* (``plan.py``)
decides in the main process which samples a batch holds and with which seeds; a worker maps a plan's :class:`Batch` to
uint8 images (``images.py``); :class:`DeviceLoader` brings them to the device and normalises, mixes and erases there,
one batch ahead.
"""

import logging
from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from timm.data import Mixup, create_loader, create_transform
from timm.data.loader import adapt_to_chs, fast_collate
from timm.data.mixup import FastCollateMixup
from timm.data.random_erasing import RandomErasing
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from .. import device as devices
from ..distributed import World
from ..errors import UserError, first_line
from ..ops.normalize import normalize_images
from .dataset import channels_of, check_num_classes, check_same_classes, class_to_idx, image_mode, open_dataset
from .samplers import Batch, RankSampler, SampleKey, TrainBatchSampler, preserve_rng_state, reseed
from .worker import BatchDataset, LoadedBatch, SplitTransform, WorkerLost, ignore_signals

__all__ = ['DeviceLoader', 'IterableLoader', 'create_eval_loader', 'create_train_loader', 'mixup_active']

_logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------- loaders


class DeviceLoader:
    """Batches on the device: images (N, C, H, W), normalised, in ``dtype`` and the device's layout; and targets.

    Attributes:
        plan: The batches of an epoch.
        samples: The data set.
        bad_images: The images met so far that could not be read, with the reasons.
        class_to_idx: Class name to index, where the data set knows it.
        average_batch_size: The expected batch size of this process.
    """

    def __init__(
            self,
            batches: BatchDataset,
            plan: TrainBatchSampler | Sequence[Batch],
            world: World,
            *,
            num_workers: int,
            mean: Sequence[float],
            std: Sequence[float],
            dtype: torch.dtype,
            mixup: Mixup | None = None,
            erasing: RandomErasing | None = None,
            mirror: bool = False,
    ):
        self.plan, self.samples, self.device, self.dtype = plan, batches.samples, world.device, dtype
        self.mixup, self.erasing, self.mirror = mixup, erasing, mirror
        self.mean = torch.tensor(mean, device=world.device)
        self.std = torch.tensor(std, device=world.device)
        self.memory_format = devices.memory_format(world.device)
        self.class_to_idx = class_to_idx(batches.samples)
        self.bad_images: dict[str, str] = {}
        self._skipped: set[int] = set()
        self._loader = DataLoader(
            batches,
            batch_size=None,
            sampler=plan,
            num_workers=num_workers,
            pin_memory=world.device.type != 'cpu',
            persistent_workers=num_workers > 0,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # iterating leaves torch's global generator alone
        )
        self._running: Iterator | None = None  # the workers' endless stream, and where it stands
        self._position: tuple[int, int] | None = None

    def __len__(self) -> int:
        """The batches of a whole epoch, wherever the iteration starts."""
        return len(self.plan)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            yield from devices.prefetch(self._readable(), self._to_device, self.device)
        except UserError as error:  # a worker's comes with a traceback in its text
            raise UserError(str(error).strip().splitlines()[-1].rpartition('UserError: ')[2]) from error
        except (EOFError, ConnectionError) as error:  # in the middle of what the worker had to say
            raise WorkerLost from error

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch that the next iteration yields, without its first ``start_batch`` batches."""
        self.plan.set_epoch(epoch, start_batch)

    @property
    def indices(self) -> list[int] | None:
        """The data set's indices in the order in which an evaluation loader yielded them; None in training."""
        if isinstance(self.plan, TrainBatchSampler):
            return None
        return [draw.index for batch in self.plan for draw in batch.draws if draw.index not in self._skipped]

    def close(self) -> None:
        """End the workers now, and not when nobody needs the loader any more."""
        self._running = None
        self._loader._iterator = None

    @property
    def average_batch_size(self) -> float:
        """The expected batch size, which differs from --batch-size where several image sizes are scheduled."""
        return self.plan.schedule.average_batch_size

    @property
    def mixup_enabled(self) -> bool:
        """Whether the next epoch's batches are mixed. It can be switched off."""
        return self.mixup is not None and self.plan.mixes(self.plan.epoch)

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self.plan.mixup_enabled = enabled

    def _from_workers(self) -> Iterator:
        if not getattr(self.plan, 'endless', False):
            yield from self._loader
            return
        epoch, start = self.plan.epoch, self.plan.start_batch
        if self._running is None or self._position != (epoch, start):
            self._running = iter(self._loader)
        self._position = None
        yield from islice(self._running, len(self.plan) - start)
        self._position = (epoch + 1, 0)

    def _readable(self) -> Iterator[LoadedBatch]:
        """The batches that hold any image. Images that were skipped are told once each."""
        for loaded in self._from_workers():
            batch = LoadedBatch(*loaded)
            for index, name, reason in batch.skipped:
                if name not in self.bad_images:
                    _logger.warning(f'Skipped image {name}, which cannot be read: {reason}')
                self.bad_images[name] = reason
                self._skipped.add(index)
            if batch.images is not None:
                yield batch

    def _to_device(self, batch: LoadedBatch) -> tuple[Tensor, Tensor]:
        images, targets, seed, mixes, _ = batch
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


class IterableLoader:
    """timm's own loader behind the interface of :class:`DeviceLoader`, for data sets that are streams.

    A stream has no sample index, so neither augmentation nor a restart in mid-epoch is exact here.
    """

    def __init__(self, loader: Any, device: torch.device, dtype: torch.dtype, mixup: Mixup | None = None):
        self._loader, self.device, self.dtype, self.mixup = loader, device, dtype, mixup
        self.memory_format = devices.memory_format(device)
        self.samples, self.class_to_idx, self.indices = loader.dataset, class_to_idx(loader.dataset), None
        self.average_batch_size = float(getattr(loader, 'loader', loader).batch_size)
        self.bad_images: dict[str, str] = {}  # timm leaves them out, and names them in the log

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in self._loader:
            images_there = images.to(self.device, self.dtype, memory_format=self.memory_format)
            yield images_there, targets.to(self.device)

    def close(self) -> None:
        """End the workers; nothing to do, since they end with each iteration."""

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch. A stream always starts at its beginning."""
        if start_batch:
            _logger.warning(f'A stream cannot start in mid-epoch: epoch {epoch} starts again from its first batch.')
        self.samples.set_epoch(epoch)

    @property
    def mixup_enabled(self) -> bool:
        """Whether batches are mixed. It can be switched off."""
        return self.mixup is not None and self.mixup.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        if self.mixup is not None:
            self.mixup.mixup_enabled = enabled


# ------------------------------------------------------------------------------------------------------ creation


def create_train_loader(
        args: Namespace,
        data_config: dict[str, Any],
        world: World,
        num_aug_splits: int = 0,
        dtype: torch.dtype = torch.float32,
) -> DeviceLoader | IterableLoader:
    """The shuffled, augmented training set, whole batches only.

    Args:
        args: The options of train.py; ``args.num_classes`` is the model's.
        data_config: What timm's ``resolve_data_config`` gives.
        world: This process among all, and its device.
        num_aug_splits: Clean and augmented copies in a batch (--aug-splits), 0 for none.
        dtype: The type of the images.

    Raises:
        UserError: The data is missing, empty or does not fit the options or the model.
    """
    samples = open_dataset(args, args.train_split, data_config, training=True)
    mean, std = (adapt_to_chs(data_config[key], channels_of(args, data_config)) for key in ('mean', 'std'))
    if isinstance(samples, IterableDataset):
        return _iterable_train_loader(args, data_config, world, samples, num_aug_splits, dtype)
    check_num_classes(samples, args)
    transforms = [
        create_transform(size, **_train_transform_options(args, data_config, num_aug_splits, mean, std))
        for size in args.train_img_sizes or [data_config['input_size'][-2:]]
    ]
    if num_aug_splits:
        transforms = [SplitTransform(parts, num_aug_splits) for parts in transforms]
    batches = BatchDataset(
        samples,
        transforms,
        image_mode(args, data_config),
        default_collate if args.no_prefetcher else fast_collate,
        args.seed,
        args.on_bad_image,
    )
    return DeviceLoader(
        batches,
        _train_plan(args, len(samples), world),
        world,
        num_workers=args.workers,
        mean=mean,
        std=std,
        dtype=dtype,
        mixup=Mixup(**_mixup_options(args)) if mixup_active(args) else None,
        erasing=_erasing(args, num_aug_splits, world.device),
    )


def create_eval_loader(
        args: Namespace,
        data_config: dict[str, Any],
        world: World,
        dtype: torch.dtype = torch.float32,
        train_loader: DeviceLoader | IterableLoader | None = None,
) -> DeviceLoader | IterableLoader:
    """The validation set in its order: rank r yields samples r, r + world.size, …, each of them once.

    Args:
        args: The options of train.py or validate.py.
        data_config: What timm's ``resolve_data_config`` gives.
        world: This process among all, and its device.
        dtype: The type of the images.
        train_loader: The training set that the validation set must agree with.

    Raises:
        UserError: The data is missing, empty, or has other classes than the training set or more than the model.
    """
    if args.tta > 2:
        raise UserError(f'--tta {args.tta}: there are two views of an image, itself and its mirror image; use --tta 2.')
    samples = open_dataset(args, args.val_split, data_config, training=False)
    batch_size = args.validation_batch_size or args.batch_size
    options = _eval_transform_options(args, data_config)
    if isinstance(samples, IterableDataset):
        return _iterable_loader(args, data_config, world, samples, dtype, batch_size=batch_size, **options)
    check_num_classes(samples, args)
    if train_loader is not None:
        check_same_classes(train_loader.samples, samples)
    transform = create_transform(data_config['input_size'], is_training=False, **options)
    collate = default_collate if args.no_prefetcher else fast_collate
    own = [SampleKey(index, 0) for index in range(world.rank, len(samples), world.size)]
    return DeviceLoader(
        BatchDataset(samples, [transform], image_mode(args, data_config), collate, None, args.on_bad_image),
        [Batch(own[start:start + batch_size]) for start in range(0, len(own), batch_size)],
        world,
        num_workers=args.workers,
        mean=options['mean'],
        std=options['std'],
        dtype=dtype,
        mirror=args.tta == 2,
    )


def mixup_active(args: Namespace) -> bool:
    """Whether Mixup or CutMix is asked for, so that targets are distributions over classes."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def _train_plan(args: Namespace, size: int, world: World) -> TrainBatchSampler:
    # One image size is a schedule with one choice.
    share = RankSampler(size, world.rank, world.size, args.seed, args.epoch_repeats, args.aug_repeats)
    progressive = args.train_size_schedule == 'progressive'
    sizes = args.train_img_sizes or [0]
    batch_sizes = args.train_batch_sizes or [args.batch_size] * len(sizes)
    if len(batch_sizes) != len(sizes):
        raise UserError('--train-batch-sizes must have as many values as --train-img-sizes.')
    if mixup_active(args) and any(batch_size % 2 for batch_size in batch_sizes):
        raise UserError('Mixup and CutMix pair the images of a batch: use an even --batch-size.')
    if len(share) < min(batch_sizes) and not args.train_batches_per_epoch:
        raise UserError(
            f'{size} training images make no whole batch of {min(batch_sizes)} for each of {world.size} '
            'process(es): use a smaller --batch-size.'
        )
    try:
        schedule = ScheduledBatchSampler(
            share,
            batch_sizes,
            choice_weights=args.train_size_probs,
            seed=args.seed,
            num_batches=args.train_batches_per_epoch,
            choice_schedule=args.train_size_schedule,
            schedule_epochs=args.epochs if progressive else None,
            schedule_spread=args.train_size_schedule_spread,
            schedule_random_mix=args.train_size_random_mix,
        )
    except ValueError as error:
        raise UserError(f'--train-img-sizes: {first_line(error)}') from error
    return TrainBatchSampler(schedule, args.seed, world.rank, args.mixup_off_epoch, args.use_multi_epochs_loader)


def _train_transform_options(
        args: Namespace,
        data_config: dict[str, Any],
        num_aug_splits: int,
        mean: Sequence[float],
        std: Sequence[float],
) -> dict[str, Any]:
    if num_aug_splits and (args.no_aug or args.no_prefetcher or args.train_img_sizes or mixup_active(args)):
        raise UserError(
            '--aug-splits goes with none of --no-aug, --no-prefetcher, --train-img-sizes, --mixup and --cutmix.')
    return {
        'is_training': True,
        'no_aug': args.no_aug,
        'train_crop_mode': args.train_crop_mode,
        'scale': args.scale,
        'ratio': args.ratio,
        'hflip': args.hflip,
        'vflip': args.vflip,
        'color_jitter': args.color_jitter,
        'color_jitter_prob': args.color_jitter_prob,
        'grayscale_prob': args.grayscale_prob or 0.0,
        'gaussian_blur_prob': args.gaussian_blur_prob or 0.0,
        'auto_augment': args.aa,
        'interpolation': _train_interpolation(args, data_config),
        'mean': mean,
        'std': std,
        're_prob': args.reprob,
        're_mode': args.remode,
        're_count': args.recount,
        'use_prefetcher': not args.no_prefetcher,
        'separate': num_aug_splits > 0,
    }


def _eval_transform_options(args: Namespace, data_config: dict[str, Any]) -> dict[str, Any]:
    channels = channels_of(args, data_config)
    mean, std = (adapt_to_chs(data_config[key], channels) for key in ('mean', 'std'))
    return {
        'interpolation': data_config['interpolation'],
        'crop_pct': data_config['crop_pct'],
        'crop_mode': data_config.get('crop_mode'),
        'crop_border_pixels': getattr(args, 'crop_border_pixels', None),
        'mean': mean,
        'std': std,
        'use_prefetcher': not args.no_prefetcher,
    }


def _train_interpolation(args: Namespace, data_config: dict[str, Any]) -> str:
    return data_config['interpolation'] if args.no_aug or not args.train_interpolation else args.train_interpolation


def _mixup_options(args: Namespace) -> dict[str, Any]:
    return {
        'mixup_alpha': args.mixup,
        'cutmix_alpha': args.cutmix,
        'cutmix_minmax': args.cutmix_minmax,
        'prob': args.mixup_prob,
        'switch_prob': args.mixup_switch_prob,
        'mode': args.mixup_mode,
        'label_smoothing': args.smoothing,
        'num_classes': args.num_classes,
    }


def _erasing(args: Namespace, num_aug_splits: int, device: torch.device) -> RandomErasing | None:
    # Without the prefetcher the transform erases, sample by sample.
    if not args.reprob or args.no_aug or args.no_prefetcher:
        return None
    splits = (num_aug_splits or 2) if args.resplit else 0
    return RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, num_splits=splits, device=device)


# ------------------------------------------------------------------------------------------------------- streams


def _iterable_train_loader(
        args: Namespace,
        data_config: dict[str, Any],
        world: World,
        samples: IterableDataset,
        num_aug_splits: int,
        dtype: torch.dtype,
) -> IterableLoader:
    if num_aug_splits or args.train_img_sizes or args.aug_repeats:
        raise UserError('--aug-splits, --aug-repeats and --train-img-sizes need a data set with an index.')
    if args.no_prefetcher and mixup_active(args):
        raise UserError('--no-prefetcher does not go with --mixup or --cutmix where the data set is a stream.')
    _logger.info('The data set is a stream: augmentation and resuming follow timm, not (seed, epoch, sample index).')
    options = _train_transform_options(args, data_config, 0, data_config['mean'], data_config['std'])
    del options['separate']
    mixup = FastCollateMixup(**_mixup_options(args)) if mixup_active(args) else None
    return _iterable_loader(
        args, data_config, world, samples, dtype, mixup, batch_size=args.batch_size,
        re_split=args.resplit, worker_seeding=args.worker_seeding, persistent_workers=False, **options,
    )


def _iterable_loader(
        args: Namespace,
        data_config: dict[str, Any],
        world: World,
        samples: IterableDataset,
        dtype: torch.dtype,
        mixup: FastCollateMixup | None = None,
        **options: Any,
) -> IterableLoader:
    loader = create_loader(
        samples,
        input_size=data_config['input_size'],
        num_workers=args.workers,
        distributed=world.distributed,
        pin_memory=args.pin_mem,
        img_dtype=dtype,
        device=world.device,
        collate_fn=mixup,
        **options,
    )
    return IterableLoader(loader, world.device, dtype, mixup)

"""From the options to loaders."""

import logging
import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from timm.data import Mixup
from timm.data.mixup import FastCollateMixup
from torch.utils.data import Dataset, IterableDataset

from ..cli.checks import given_options, name_option
from ..data.augmentation import Augmentation
from ..data.cifar import find_cifar, read_cifar_classes
from ..data.dataset import check_apart, check_num_classes, find_root, open_dataset
from ..data.loader import DeviceLoader, create_eval_loader, create_train_loader, create_train_sampler
from ..data.pipeline import ImagePipeline
from ..data.samplers import TrainBatchSampler
from ..data.stream import StreamLoader, create_stream_loader
from ..distributed import World
from ..errors import UserError

__all__ = ['build_eval_loader', 'build_train_loader', 'count_classes', 'mixup_active']

_logger = logging.getLogger(__name__)


def build_train_loader(
        args: Namespace,
        pipeline: ImagePipeline,
        world: World,
        *,
        num_classes: int,
        batch_size: int,
        epoch_samples: int | None = None,
        lanes: int | None = None,
        dtype: torch.dtype = torch.float32,
) -> DeviceLoader | StreamLoader:
    """Return the loader of the shuffled, augmented training set; whole batches only.

    Args:
        args: Options of train.py.
        pipeline: Image pipeline of the network.
        world: This process among all, and its device.
        num_classes: Number of classes of the network.
        batch_size: Images of this process in a batch.
        epoch_samples: Samples in an epoch of all processes together, where the run has begun with another number of
            processes; None for what the data gives.
        lanes: Number of processes at the beginning of the run, among which shards are dealt out; None for those of now.
        dtype: Type of the images.

    Raises:
        UserError: The data is missing or empty, or does not fit the options or the network.
    """
    dataset = _open(args, args.train_split, pipeline, world=world, is_training=True, batch_size=batch_size,
                    repeats=args.epoch_repeats, num_samples=args.train_num_samples, num_classes=num_classes)
    if isinstance(dataset, IterableDataset):
        return _build_train_stream(args, dataset, pipeline, world, num_classes, batch_size, dtype)
    check_num_classes(dataset, num_classes)
    if args.aug_splits and (args.no_aug or args.no_prefetcher or args.train_img_sizes or mixup_active(args)):
        raise UserError(
            '--aug-splits goes with none of --no-aug, --no-prefetcher, --train-img-sizes, --mixup and --cutmix.')
    sampler = _train_sampler(args, dataset, world, batch_size, epoch_samples, lanes or world.size)
    with name_option(_augmentation_options(args)):
        return create_train_loader(
            dataset,
            sampler,
            pipeline,
            world.device,
            augmentation=_augmentation(args),
            mixup=Mixup(**_mixup_options(args, num_classes)) if mixup_active(args) else None,
            img_sizes=args.train_img_sizes or (),
            num_workers=args.workers,
            use_prefetcher=not args.no_prefetcher,
            on_bad_image=args.on_bad_image,
            input_backend=args.input_backend,
            dtype=dtype,
        )


def build_eval_loader(
        args: Namespace,
        pipeline: ImagePipeline,
        world: World,
        *,
        split: str,
        batch_size: int,
        num_classes: int | None = None,
        num_samples: int | None = None,
        dtype: torch.dtype = torch.float32,
        class_to_idx: Mapping[str, int] | None = None,
        train_loader: DeviceLoader | StreamLoader | None = None,
) -> DeviceLoader | StreamLoader:
    """Return the loader of an evaluation set in its order: rank r yields samples r, r + world.size, …, each once.

    Args:
        args: Options of train.py or validate.py.
        pipeline: Image pipeline of the network.
        world: This process among all, and its device.
        split: Name of the split.
        batch_size: Images of this process in a batch.
        num_classes: Number of classes of the network; None for no check.
        num_samples: Number of samples in a stream that does not know it.
        dtype: Type of the images.
        class_to_idx: Class indices of the network by name; None to number the classes of the data in their order.
        train_loader: Loader of the training set, which gives the class indices.

    Raises:
        UserError: The data is missing or empty, or has a class that the network does not know.
    """
    if args.tta > 2:
        raise UserError(f'--tta {args.tta}: there are two views of an image, itself and its mirror image; use --tta 2.')
    if train_loader is not None:
        class_to_idx = train_loader.class_to_idx
    # Without a training, each process opens network and data on its own: one of several networks may be skipped.
    together = world if train_loader is not None else None
    dataset = _open(args, split, pipeline, world=together, class_to_idx=class_to_idx, is_training=False,
                    batch_size=batch_size, num_samples=num_samples, num_classes=num_classes)
    if isinstance(dataset, IterableDataset):
        return create_stream_loader(
            dataset, pipeline, world, batch_size=batch_size, num_workers=args.workers, pin_memory=args.pin_mem,
            use_prefetcher=not args.no_prefetcher, dtype=dtype)
    check_num_classes(dataset, num_classes)
    if num_samples and hasattr(getattr(dataset, 'reader', None), 'lengths'):
        _logger.info('--val-num-samples: all images of the shards are evaluated.')
    if train_loader is not None:
        check_apart(train_loader.samples, dataset)
    return create_eval_loader(
        dataset, pipeline, world, batch_size=batch_size, num_workers=args.workers,
        use_prefetcher=not args.no_prefetcher, on_bad_image=args.on_bad_image, mirror=args.tta == 2,
        input_backend=args.input_backend, dtype=dtype)


def count_classes(args: Namespace) -> int | None:
    """Return the number of classes of a folder or of CIFAR; None for other data sets, and for --class-map."""
    root = find_root(args.dataset, args.data_dir, args.train_split)
    if not args.dataset and not args.class_map and (cifar := find_cifar(args.data_dir)):
        return len(read_cifar_classes(cifar))
    if root is None or not root.is_dir() or args.class_map:
        return None
    with os.scandir(root) as entries:
        return sum(entry.is_dir() and not entry.name.startswith('.') for entry in entries) or None


def mixup_active(args: Namespace) -> bool:
    """Return True if Mixup or CutMix is on, so that targets are distributions over classes."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def _open(args: Namespace, split: str, pipeline: ImagePipeline, **options: Any) -> Dataset:
    dataset = open_dataset(
        args.dataset,
        args.data_dir,
        split,
        class_map=args.class_map,
        download=args.dataset_download,
        input_img_mode=pipeline.input_img_mode,
        input_key=args.input_key,
        target_key=args.target_key,
        seed=args.seed,
        trust_remote_code=args.dataset_trust_remote_code,
        on_bad_image=args.on_bad_image,
        **options,
    )
    if args.input_backend == 'fast' and isinstance(dataset, IterableDataset):
        raise UserError('--input-backend fast needs a data set with an index, and this one is a stream.')
    return dataset


def _train_sampler(
        args: Namespace,
        dataset: Any,
        world: World,
        batch_size: int,
        epoch_samples: int | None,
        lanes: int,
) -> TrainBatchSampler:
    sizes = args.train_img_sizes or [0]
    batch_sizes = args.train_batch_sizes or [batch_size] * len(sizes)
    if len(batch_sizes) != len(sizes):
        raise UserError('--train-batch-sizes must have as many values as --train-img-sizes.')
    if mixup_active(args) and any(each % 2 for each in batch_sizes):
        raise UserError('Mixup and CutMix pair the images of a batch: use an even --batch-size.')
    reader: Any = getattr(dataset, 'reader', None)
    if hasattr(reader, 'keep_for_lanes'):
        reader.keep_for_lanes(lanes if lanes % world.size else lanes // world.size)
    if not args.train_batches_per_epoch:
        epoch_samples = epoch_samples or getattr(reader, 'epoch_samples', None)
    return create_train_sampler(
        len(dataset),
        world,
        batch_sizes,
        seed=args.seed,
        epoch_repeats=args.epoch_repeats,
        aug_repeats=args.aug_repeats,
        mixup_off_epoch=args.mixup_off_epoch,
        endless=args.use_multi_epochs_loader,
        num_batches=-(-epoch_samples // (batch_size * world.size)) if epoch_samples else args.train_batches_per_epoch,
        lengths=getattr(reader, 'lengths', ()),
        lanes=lanes,
        choice_weights=args.train_size_probs,
        choice_schedule=args.train_size_schedule,
        schedule_epochs=args.epochs if args.train_size_schedule == 'progressive' else None,
        schedule_spread=args.train_size_schedule_spread,
        schedule_random_mix=args.train_size_random_mix,
    )


def _augmentation_options(args: Namespace) -> str:
    return given_options(vars(args), 'Augmentation and regularisation') or 'the augmentation'


# Options that have other names than the settings of the augmentation.
_OPTIONS = {'auto_augment': 'aa', 'interpolation': 'train_interpolation', 're_prob': 'reprob', 're_mode': 'remode',
            're_count': 'recount', 're_split': 'resplit', 'num_aug_splits': 'aug_splits'}


def _augmentation(args: Namespace) -> Augmentation:
    given = {each.name: getattr(args, _OPTIONS.get(each.name, each.name)) for each in fields(Augmentation)}
    return Augmentation(**{name: value for name, value in given.items() if value is not None})


def _mixup_options(args: Namespace, num_classes: int) -> dict[str, Any]:
    return {
        'mixup_alpha': args.mixup,
        'cutmix_alpha': args.cutmix,
        'cutmix_minmax': args.cutmix_minmax,
        'prob': args.mixup_prob,
        'switch_prob': args.mixup_switch_prob,
        'mode': args.mixup_mode,
        'label_smoothing': args.smoothing,
        'num_classes': num_classes,
    }


def _build_train_stream(
        args: Namespace,
        dataset: IterableDataset,
        pipeline: ImagePipeline,
        world: World,
        num_classes: int,
        batch_size: int,
        dtype: torch.dtype,
) -> StreamLoader:
    if args.aug_splits or args.train_img_sizes or args.aug_repeats:
        raise UserError('--aug-splits, --aug-repeats and --train-img-sizes need a data set with an index.')
    if args.no_prefetcher and mixup_active(args):
        raise UserError('--no-prefetcher does not go with --mixup or --cutmix where the data set is a stream.')
    _logger.info('The data set is a stream: augmentation and resuming follow timm, not (seed, epoch, sample index).')
    with name_option(_augmentation_options(args)):
        return create_stream_loader(
            dataset,
            pipeline,
            world,
            batch_size=batch_size,
            augmentation=_augmentation(args),
            mixup=FastCollateMixup(**_mixup_options(args, num_classes)) if mixup_active(args) else None,
            num_workers=args.workers,
            pin_memory=args.pin_mem,
            use_prefetcher=not args.no_prefetcher,
            worker_seeding=args.worker_seeding,
            dtype=dtype,
        )

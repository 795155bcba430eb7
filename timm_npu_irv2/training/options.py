"""The options of train.py: command line over YAML file over defaults, then checks of options against each other.

Every mistake raises a :class:`UserError` of one line. Neither the device nor the data is touched.
"""

import argparse
import os
import re
from collections.abc import Sequence
from typing import Any

import torch

from .. import precision
from ..cli.checks import check_compile_backend, check_image_size, check_rules, dataset_rules
from ..cli.flags import TRAIN

__all__ = ['parse_args', 'precision_options']

PUBLISHED = ('inception_resnet_v2_npu', 'inception_resnet_v2')  # models that hub.export accepts
WARMUP_EPOCHS = 5  # timm's default
NOT_ARCHITECTURE = ('features_only', 'out_indices', 'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay',
                    'checkpoint_path', 'cache_dir', 'scriptable', 'exportable', 'num_classes', 'in_chans')


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the options of train.py.

    Args:
        argv: Command line without the name of the program.

    Returns:
        Namespace with timm's attribute names. ``data`` is merged into ``data_dir``.

    Raises:
        UserError: Unknown option, value out of range, or contradiction.
    """
    args = TRAIN.parse(argv)
    _settle(args)
    check_image_size(args.model, _image_sizes(args))
    precision.check_options(**precision_options(args))
    for rules in _data_rules, _model_rules, _loss_rules, _process_rules, _schedule_rules:
        check_rules(rules(args))
    check_compile_backend(args.torchcompile)
    return args


def _settle(args: argparse.Namespace) -> None:
    """Merge options that mean the same."""
    args.data_dir = args.data or args.data_dir
    del args.data
    if args.opt_level is not None:
        args.amp = args.opt_level != 'O0'
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    if args.warmup_epochs is None:
        args.warmup_epochs = WARMUP_EPOCHS if args.epochs > WARMUP_EPOCHS or args.warmup_prefix else args.epochs // 2


_Rules = list[tuple[Any, str]]


def _image_sizes(args: argparse.Namespace) -> list[int]:
    sizes = (args.img_size, *(args.input_size or ())[1:], *(args.train_img_sizes or ()))
    return [size for size in sizes if size]


def _data_rules(args: argparse.Namespace) -> _Rules:
    most = max(64, 4 * (os.cpu_count() or 1))
    return [
        *dataset_rules(args.dataset),
        (args.workers > most,
         f'--workers {args.workers}: this machine has {os.cpu_count()} CPU cores; use at most {most}.'),
    ]


def _model_rules(args: argparse.Namespace) -> _Rules:
    channels = args.in_chans or (args.input_size or [3])[0]
    return [
        (args.img_size and args.input_size and args.input_size[1:] != [args.img_size] * 2,
         '--img-size and --input-size give different sizes: use one of them.'),
        (args.in_chans and args.input_size and args.input_size[0] != args.in_chans,
         '--in-chans and --input-size give different numbers of channels: use one of them.'),
        (args.gp == '', '--gp: a classifier needs a pooling, such as avg.'),
        (args.torchscript and args.torchcompile, '--torchscript and --torchcompile exclude each other.'),
        (args.torchscript and args.opt_level == 'O2', '--torchscript and --opt-level O2 exclude each other.'),
        *((name in args.model_kwargs, f'--model-kwargs {name}=…: not an argument of the architecture; see --help.')
          for name in NOT_ARCHITECTURE),
        (args.torchscript and args.sync_bn, '--torchscript cannot script the layers of --sync-bn: leave one out.'),
        (args.torchscript and args.kd_model_name, '--torchscript and --kd-model-name exclude each other.'),
        (args.sync_bn and args.split_bn, '--sync-bn and --split-bn exclude each other.'),
        (args.torchcompile_mode and not args.torchcompile, '--torchcompile-mode needs --torchcompile.'),
        *((values is not None and len(values) not in (1, channels), f'{name}: expected 1 or {channels} numbers.')
          for name, values in (('--mean', args.mean), ('--std', args.std))),
        (args.kd_model_name is None and (args.distill_loss_weight is not None or args.task_loss_weight is not None),
         '--distill-loss-weight and --task-loss-weight need a teacher: --kd-model-name.'),
    ]


def _loss_rules(args: argparse.Namespace) -> _Rules:
    ranges = {'--scale': args.scale, '--ratio': args.ratio, '--cutmix-minmax': args.cutmix_minmax}
    mixed = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    return [
        (args.aug_splits == 1, '--aug-splits 1: use 0 for none, or at least 2.'),
        (args.jsd_loss and args.aug_splits < 2, '--jsd-loss needs --aug-splits 2 or more.'),
        (args.jsd_loss and args.bce_loss, '--jsd-loss and --bce-loss exclude each other.'),
        (args.split_bn and args.aug_splits < 2 and not args.resplit, '--split-bn needs --aug-splits or --resplit.'),
        (mixed and args.aug_splits > 1, '--mixup and --cutmix do not work with --aug-splits.'),
        *((values is not None and (len(values) != 2 or values[0] > values[1]),
           f'{name}: expected two numbers, the smaller one first.')
          for name, values in ranges.items()),
        (args.scale[-1] > 1 and args.train_crop_mode in (None, 'rrc'),
         '--scale: the area of the random crop must be at most 1.'),
        (args.cutmix_minmax is not None and args.cutmix_minmax[-1] - args.cutmix_minmax[0] < 0.05,
         '--cutmix-minmax: the two numbers must differ by at least 0.05.'),
        (args.train_img_sizes and args.aug_splits > 1, '--train-img-sizes does not work with --aug-splits.'),
        (args.train_img_sizes and args.use_multi_epochs_loader,
         '--train-img-sizes does not work with --use-multi-epochs-loader.'),
    ]


def precision_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of :func:`timm_npu_irv2.precision.create_precision`."""
    return {
        'amp': args.amp,
        'amp_impl': args.amp_impl,
        'amp_dtype': getattr(torch, args.amp_dtype) if args.amp_dtype else None,
        'opt_level': args.opt_level,
        'loss_scale': args.loss_scale,
        'model_dtype': getattr(torch, args.model_dtype) if args.model_dtype else None,
    }


def _process_rules(args: argparse.Namespace) -> _Rules:
    devices = (args.device_list or '').replace(' ', '').strip(',')
    names = devices.split(',') if devices else []
    return [
        (args.device_list is not None and not (all(map(str.isdecimal, names)) and len(set(names)) == len(names) > 0),
         f"--device-list '{args.device_list}': expected different device indices, such as '0,1,2,3'."),
        (len(names) > 1 and not args.multiprocessing_distributed,
         '--device-list with several devices needs --multiprocessing-distributed.'),
        ((args.rank or 0) >= (args.world_size or 1) and args.rank,
         f'--rank {args.rank} must be less than --world-size {args.world_size or 1}.'),
        (args.dist_url and not re.fullmatch(r'env://|tcp://[^/:]+:\d+|tcp://\[[^\]]+\]:\d+', args.dist_url),
         f"--dist-url '{args.dist_url}': expected tcp://host:port or env://."),
        (args.wandb_resume_id and not args.resume, '--wandb-resume-id needs --resume.'),
        (args.push_to_hub and args.model.partition('.')[0] not in PUBLISHED,
         f'--push-to-hub publishes {" and ".join(PUBLISHED)}, not {args.model}.'),
        (args.push_to_hub and not args.epochs,
         '--push-to-hub needs at least one epoch: `timm-npu-irv2 hub` publishes a checkpoint.'),
        (args.elastic and args.resume != 'auto',
         '--elastic needs --resume auto: after a change of machines the run goes on from its newest checkpoint.'),
        (args.elastic and (args.no_resume_opt or args.start_epoch is not None),
         '--elastic does not go with --no-resume-opt and --start-epoch, which would act again at every change.'),
        (args.resume == 'auto' and not args.experiment, '--resume auto needs --experiment, the folder to search.'),
    ]


def _schedule_rules(args: argparse.Namespace) -> _Rules:
    sizes = args.train_img_sizes or ()
    epochs = args.epochs + args.cooldown_epochs + (args.warmup_epochs if args.warmup_prefix else 0)
    return [
        (args.epochs and not args.warmup_prefix and args.warmup_epochs > args.epochs and args.sched != 'none',
         f'--warmup-epochs {args.warmup_epochs} must not exceed --epochs {args.epochs}: add a smaller '
         '--warmup-epochs, or --warmup-prefix.'),
        (args.epochs and (args.start_epoch or 0) >= epochs,
         f'--start-epoch {args.start_epoch}: the training ends after {epochs} epoch(s).'),
        (args.sched == 'plateau' and args.sched_on_updates, '--sched plateau does not work with --sched-on-updates.'),
        (args.decay_rate > 1 and args.sched in ('step', 'multistep', 'plateau'),
         f'--decay-rate {args.decay_rate:g}: must be at most 1 for --sched {args.sched}.'),
        (args.lr_noise is not None and sorted(args.lr_noise) != args.lr_noise,
         '--lr-noise: expected the smaller number first.'),
        (args.lr_noise is not None and len(args.lr_noise) > 2, '--lr-noise: expected one or two numbers.'),
        (sorted(set(args.decay_milestones)) != args.decay_milestones, '--decay-milestones must be increasing.'),
        *((values is not None and len(values) != len(sizes), f'{name}: expected one for each of --train-img-sizes.')
          for name, values in (
              ('--train-batch-sizes', args.train_batch_sizes), ('--train-size-probs', args.train_size_probs))),
        (args.train_size_schedule == 'progressive' and len(sizes) < 2,
         '--train-size-schedule progressive needs at least two --train-img-sizes.'),
        (args.train_size_probs is not None and sum(args.train_size_probs) <= 0, '--train-size-probs: all are 0.'),
    ]

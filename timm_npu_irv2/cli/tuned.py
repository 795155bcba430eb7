"""``--tuned``: the scripts run with the settings that ``benchmark.py tune`` found to be fastest."""

import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import get_pretrained_cfg

from .. import device as devices
from ..ops.variants import CHOICES, is_in_environment
from ..serialization import peek_checkpoint
from ..tuning import Tuned, apply_settings, describe_missing, describe_outdated, resolve_tuned
from .flags import OUR_MODEL

__all__ = ['choose_settings', 'eval_workload', 'settings_in', 'train_workload', 'use_tuned', 'with_settings']

_logger = logging.getLogger(__name__)


def train_workload(args: Namespace, device: torch.device, batch_size: int) -> dict[str, Any]:
    """Return the workload of train.py, as :func:`use_tuned` takes it."""
    default: Any = get_pretrained_cfg(OUR_MODEL)
    size = (args.input_size or default.input_size)[1:]
    size = (args.img_size, args.img_size) if args.img_size else size
    return {'task': 'train', 'batch_size': batch_size, 'img_size': size[-1],
            'precision': None if size[0] != size[1] or args.train_img_sizes else _train_precision(args, device)}


def eval_workload(
        args: Namespace,
        device: torch.device,
        batch_size: int,
        input_size: Sequence[int],
        deployed: bool,
) -> dict[str, Any]:
    """Return the workload of validate.py and inference.py, as :func:`use_tuned` takes it.

    Args:
        args: Options of the script.
        device: Device of the run.
        batch_size: Images in a batch.
        input_size: Channels, height and width of the images.
        deployed: The network is a deployed one, for which there is nothing to choose.
    """
    height, width = input_size[-2:]
    fits = height == width and not deployed
    return {'task': 'eval', 'batch_size': batch_size, 'img_size': width,
            'precision': _eval_precision(args, device) if fits else None}


def _train_precision(args: Namespace, device: torch.device) -> str | None:
    """Return the precision in the words of a result; None for apex, which tune does not measure."""
    if args.amp_impl == 'apex':
        return None
    if not args.amp or args.opt_level == 'O0':
        return args.model_dtype or 'float32'
    return f'{args.opt_level or "O1"} {args.amp_dtype or _half(device)}'


def _eval_precision(args: Namespace, device: torch.device) -> str | None:
    """Return the precision in the words of a result; None for autocast, which tune does not measure."""
    if args.amp:
        return None
    if getattr(args, 'fast', False):
        return str(devices.fast_dtype(device)).removeprefix('torch.')
    return args.model_dtype or 'float32'


def _half(device: torch.device) -> str:
    return str(devices.half_dtype(device)).removeprefix('torch.')


def use_tuned(args: Namespace, device: torch.device, **workload: Any) -> Namespace:
    """Apply the settings of --tuned, and return the options with those that are options.

    Args:
        args: Options of the script; they are not changed.
        device: Device of the run.
        **workload: What :func:`train_workload` or :func:`eval_workload` returns.

    Raises:
        UserError: The file is not a result, or is one for another device, other versions or another task.
    """
    return with_settings(args, device, choose_settings(args, device, **workload))


def choose_settings(
        args: Namespace,
        device: torch.device,
        *,
        task: str,
        batch_size: int,
        img_size: int,
        precision: str | None,
        before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the settings of --tuned, and say in the log where they come from.

    An option, or a variable of the environment, that the user has set takes precedence. With --deterministic,
    only a file that --tuned names is used. A run that goes on keeps its settings unless --tuned is a file or off.

    Args:
        args: Options of the script.
        device: Device of the run.
        task: 'train' or 'eval'.
        batch_size: Images in a batch.
        img_size: Height and width of an image in pixels.
        precision: Precision in words; None if no result can fit.
        before: Settings of the run that goes on; None for a new one.

    Raises:
        UserError: The file is not a result, or is one for another device, other versions or another task.
    """
    if args.model.partition('.')[0] != OUR_MODEL or precision is None:
        return {}
    if args.deterministic and args.tuned == 'auto':  # a result that comes or goes would change the bits
        return {}
    workload: dict[str, Any] = dict(task=task, batch_size=batch_size, img_size=img_size, precision=precision)
    tuned = resolve_tuned(args.tuned, device, **workload)
    if args.tuned == 'auto' and before is not None:
        return _keep(_undecided(before, args), tuned)
    if tuned is None:
        if args.tuned == 'auto' and (line := describe_outdated(device, **workload)):
            _logger.info(line)
        return {}
    settings = _undecided(tuned.chosen, args)
    _logger.info(tuned.describe(settings))
    return settings


def with_settings(args: Namespace, device: torch.device, settings: Mapping[str, Any]) -> Namespace:
    """Apply settings, and return the options with those that are options.

    Args:
        args: Options of the script; they are not changed.
        device: Device of the run.
        settings: {setting: value}.
    """
    apply_settings(settings, device)
    options = {name: settings[name] for name in ('recompute', 'torchcompile', 'engine') if name in settings}
    if 'fused_optimizer' in settings:
        options['opt_kwargs'] = {**args.opt_kwargs, 'fused': settings['fused_optimizer']}
    return Namespace(**{**vars(args), **options})


def settings_in(checkpoint: Path | None, device: torch.device) -> dict[str, Any] | None:
    """Return the settings of the run that wrote a checkpoint; None if it ran on another kind of device, or is not told.

    Args:
        checkpoint: Checkpoint; None for no run.
        device: Device of the run that goes on.
    """
    entry = ((checkpoint and peek_checkpoint(checkpoint)) or {}).get('tuned')
    return dict(entry['settings']) if entry and entry['device'] == device.type else None


def _keep(settings: dict[str, Any], tuned: Tuned | None) -> dict[str, Any]:
    """Return the settings of the run that goes on, and say so where another run would have others."""
    if settings or (tuned is not None and tuned.chosen):
        words = ', '.join(f'{name}={value}' for name, value in settings.items()) or 'the default ones'
        _logger.info(f'Tuned settings: {words}, as before (from the checkpoint; --tuned FILE or off changes them).'
                     f'{describe_missing(settings)}')
    return settings


def _undecided(settings: Mapping[str, Any], args: Namespace) -> dict[str, Any]:
    """Return the settings that the user has not decided about."""
    return {name: value for name, value in settings.items() if not _is_set(name, args)}


def _is_set(name: str, args: Namespace) -> bool:
    """Return True if the user has decided about a setting."""
    given = vars(args)
    if name in CHOICES:
        return is_in_environment(name)
    if name == 'fused_optimizer':
        return given['opt'] != 'sgd' or bool({'fused', 'foreach'} & given['opt_kwargs'].keys())
    if name in _CONFLICTS:
        return any(given.get(option) for option in _CONFLICTS[name])
    return given.get(name) is not None


# Options beside which a setting is not used.
_CONFLICTS = {
    'recompute': ('recompute', 'grad_checkpointing'),
    'cudnn_benchmark': ('deterministic',),
    'torchcompile': ('torchcompile', 'torchscript', 'engine', 'gradcam'),
    'engine': ('engine', 'torchscript', 'torchcompile', 'test_pool', 'gradcam', 'calibration', 'deterministic'),
}

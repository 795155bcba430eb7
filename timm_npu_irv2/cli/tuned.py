"""``--tuned``: the scripts run with the settings that ``benchmark.py tune`` found to be fastest."""

import logging
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import get_pretrained_cfg

from .. import device as devices
from ..ops.variants import CHOICES
from ..tuning import Tuned, apply_settings, environment_of, resolve_tuned
from .flags import OUR_MODEL

__all__ = ['eval_workload', 'train_workload', 'use_tuned']

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


def use_tuned(
        args: Namespace,
        device: torch.device,
        *,
        task: str,
        batch_size: int,
        img_size: int,
        precision: str | None,
) -> Namespace:
    """Apply the settings of --tuned, and return the options with those that are options.

    An option, or a variable of the environment, that the user has set takes precedence. With --deterministic,
    only a file that --tuned names is used.

    Args:
        args: Options of the script; they are not changed.
        device: Device of the run.
        task: 'train' or 'eval'.
        batch_size: Images in a batch.
        img_size: Height and width of an image in pixels.
        precision: Precision in words; None if no result can fit.

    Raises:
        UserError: The file is not a result, or is one for another kind of device or task.
    """
    if args.model.partition('.')[0] != OUR_MODEL or precision is None:
        return args
    if args.deterministic and args.tuned == 'auto':  # a result that comes or goes would change the bits
        return args
    tuned = resolve_tuned(
        args.tuned, device, task=task, batch_size=batch_size, img_size=img_size, precision=precision)
    if tuned is None:
        return args
    kept = {name: value for name, value in tuned.chosen.items() if not _is_set(name, args)}
    apply_settings(kept, device)
    missing = {name: value for name, value in environment_of(kept).items() if os.environ.get(name) != value}
    _logger.info(_line(tuned, kept, missing))
    return Namespace(**{**vars(args), **_options(kept, args)})


def _is_set(name: str, args: Namespace) -> bool:
    """Return True if the user has decided about a setting."""
    variables, given = os.environ.get('TIMM_NPU_IRV2_VARIANTS', ''), vars(args)
    if name in CHOICES:
        return f'{name}=' in variables or (name == 'kernels' and 'TIMM_NPU_IRV2_KERNELS' in os.environ)
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


def _options(kept: Mapping[str, Any], args: Namespace) -> dict[str, Any]:
    """Return the options, by their attributes, that settings are."""
    options = {name: kept[name] for name in ('recompute', 'torchcompile', 'engine') if name in kept}
    if 'fused_optimizer' in kept:
        options['opt_kwargs'] = {**args.opt_kwargs, 'fused': kept['fused_optimizer']}
    return options


def _line(tuned: Tuned, kept: Mapping[str, Any], missing: Mapping[str, str]) -> str:
    words = ', '.join(f'{name}={value}' for name, value in kept.items()) or 'the default ones'
    start = f' Start with {" ".join(f"{name}={value}" for name, value in missing.items())} for all of them.'
    return f'Tuned settings: {words} (from {tuned.path}; --tuned off ignores it).{start if missing else ""}'

"""Checkpoints: everything a run needs to go on, in files that timm can read.

A file is timm's training checkpoint (``state_dict``, ``state_dict_ema``, ``optimizer``, ``epoch``, ``metric``, ...)
with one more entry, ``training``: where in the epoch the run is, and what each process has for itself (random states,
running statistics, sums of the metrics).
"""

import argparse
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import clean_state_dict
from timm.utils import unwrap_model
from torch import Tensor, nn

from .. import device as devices
from ..distributed import World, gather_objects
from ..errors import UserError
from ..serialization import read_checkpoint
from .engine import Position, Trainer

__all__ = ['resume', 'training_state']

_logger = logging.getLogger(__name__)
_State = dict[str, Any]


# What is in them


def training_state(trainer: Trainer, args: argparse.Namespace, extra: _State | None = None) -> _State | None:
    """All that :func:`resume` needs. Called by every process; the result is rank 0's, None elsewhere."""
    processes = gather_objects(_process_state(trainer), trainer.world)
    if not trainer.world.is_primary:
        return None
    return {
        'epoch': max(0, trainer.position.epoch - (trainer.position.batch == 0)),  # timm's: the epoch last trained in
        'version': 2,
        'arch': args.model,
        'args': vars(args),
        'optimizer': trainer.optimizer.state_dict(),
        'amp_scaler': trainer.precision.state_dict(),
        **_model_entries(trainer),
        'training': {
            'position': vars(trainer.position),
            'num_classes': args.num_classes,
            'class_to_idx': getattr(trainer.loader, 'class_to_idx', None),  # names, for hub.py
            'scheduler': _scheduler_state(trainer),
            'throughput': (trainer.throughput.images, trainer.throughput.seconds),
            'skipped': (trainer.precision.skipped_steps, trainer.precision.skipped_in_a_row),
            'processes': processes,
        },
        **(extra or {}),
    }


def _model_entries(trainer: Trainer) -> _State:
    """timm's entries: the student's weights (in float32), and what a distillation task trains besides."""
    module = trainer.task.get_trainable_module()
    entries = _split(trainer.precision.model_state_dict(module), '')
    ema = trainer.task.get_trainable_module(ema=True)
    if ema is not None:
        entries.update(_split(unwrap_model(ema).state_dict(), '_ema'))
    return entries


def _split(state_dict: _State, suffix: str) -> _State:
    student = {key.removeprefix('student.'): value for key, value in state_dict.items() if key.startswith('student.')}
    projection = {key.removeprefix('projection.'): value for key, value in state_dict.items()
                  if key.startswith('projection.')}
    if not student:
        return {'state_dict' + suffix: state_dict}
    entries = {'state_dict' + suffix: student}
    if projection:
        entries['task_state' + suffix] = {'projection': projection}
    return entries


def _join(checkpoint: _State, suffix: str, module: nn.Module) -> _State:
    """The inverse of :func:`_split`, for a module that may wrap the student."""
    state_dict = clean_state_dict(checkpoint['state_dict' + suffix])
    if not hasattr(module, 'student'):
        return state_dict
    projection = checkpoint.get('task_state' + suffix, {}).get('projection', {})
    return {**{f'student.{key}': value for key, value in state_dict.items()},
            **{f'projection.{key}': value for key, value in projection.items()}}


def _process_state(trainer: Trainer) -> _State:
    """What differs from process to process."""
    state = {'random': _random_state(trainer.world), 'meter': trainer.meter.state_dict()}
    if not trainer.world.is_primary:  # rank 0's are in the state dicts
        state['buffers'] = _buffers(trainer)
    return state


def _buffers(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """BatchNorm's running statistics, which each process has of its own until the end of the epoch."""
    modules = {'model': trainer.task.get_trainable_module(), 'ema': trainer.task.get_trainable_module(ema=True)}
    return {name: {key: value.cpu() for key, value in unwrap_model(module).named_buffers()}
            for name, module in modules.items() if module is not None}


def _random_state(world: World) -> _State:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        'torch': torch.get_rng_state(),
        'device': devices.get_rng_state(world.device),
        'numpy': (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        'python': random.getstate(),
    }


def _set_random_state(state: _State, world: World) -> None:
    torch.set_rng_state(state['torch'])
    devices.set_rng_state(world.device, state['device'])
    kind, keys, position, has_gauss, gauss = state['numpy']
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, values, gauss_next = state['python']
    random.setstate((version, tuple(values), gauss_next))


def _scheduler_state(trainer: Trainer) -> _State | None:
    """timm's schedulers are functions of the epoch; only plateau's has a memory, in torch's scheduler inside it."""
    inner = getattr(trainer.scheduler, 'lr_scheduler', None)
    return inner.state_dict() if inner is not None else None


# Going on


def resume(trainer: Trainer, path: Path, args: argparse.Namespace) -> _State:
    """Bring ``trainer`` to where the run of a checkpoint was.

    A checkpoint of ours continues exactly. From any other (timm's, the model zoo's) come the weights, the epoch, and
    the optimizer's state if it fits.

    Args:
        trainer: As for a new run, with its EMA set up, before torch.compile and DDP wrap anything.
        path: The file.
        args: The options; ``no_resume_opt`` leaves out optimizer, loss scale and random states, ``start_epoch``
            overrides the epoch.

    Returns:
        The checkpoint.

    Raises:
        UserError: The file cannot be read, or is of another architecture or number of classes.
    """
    checkpoint = read_checkpoint(path)
    _check_fits(checkpoint, path, args)
    _load_weights(trainer, checkpoint, path)
    training = checkpoint.get('training')
    if not args.no_resume_opt:
        _load_optimizer(trainer, checkpoint, path)
    if args.start_epoch is None:
        trainer.position = _position(trainer, checkpoint)
    if training is not None and not args.no_resume_opt and args.start_epoch is None:
        _load_exactly(trainer, training)
    _logger.info(f'Resumed from {path}: epoch {trainer.position.epoch}, batch {trainer.position.batch}.')
    return checkpoint


def _check_fits(checkpoint: _State, path: Path, args: argparse.Namespace) -> None:
    found = checkpoint.get('training', {}).get('num_classes', args.num_classes)
    if checkpoint.get('training') is not None and checkpoint['arch'] != args.model:
        raise UserError(f"{path} is a checkpoint of --model {checkpoint['arch']}, not of {args.model}.")
    if found != args.num_classes:
        raise UserError(f'{path} is a checkpoint with {found} classes, not {args.num_classes}: use --num-classes '
                        f'{found}, or --pretrained-path to start a new run from its weights.')


def _load_weights(trainer: Trainer, checkpoint: _State, path: Path) -> None:
    module = trainer.task.get_trainable_module()
    ema = trainer.task.get_trainable_module(ema=True)
    try:
        trainer.precision.load_model_state_dict(module, _join(checkpoint, '', unwrap_model(module)))
        if ema is None:
            return
        if checkpoint.get('state_dict_ema') is None:
            ema.set(trainer.precision.float32_model(module))
        else:
            unwrap_model(ema).load_state_dict(_join(checkpoint, '_ema', unwrap_model(ema)))
    except RuntimeError as error:
        reason = ' '.join(str(error).split())[:300]
        raise UserError(f'{path} does not fit the model: {reason}') from error


def _load_optimizer(trainer: Trainer, checkpoint: _State, path: Path) -> None:
    state = checkpoint.get('optimizer')
    own = [len(group['params']) for group in trainer.optimizer.state_dict()['param_groups']]
    if state is None or [len(group['params']) for group in state['param_groups']] != own:
        _logger.warning(f'{path} holds no optimizer state that fits this network: momenta start from zero.')
        return
    trainer.optimizer.load_state_dict(state)
    if checkpoint.get('amp_scaler'):
        trainer.precision.load_state_dict(checkpoint['amp_scaler'])


def _position(trainer: Trainer, checkpoint: _State) -> Position:
    if 'training' in checkpoint:
        return Position(**checkpoint['training']['position'])
    epoch = checkpoint.get('epoch', 0) + (checkpoint.get('version', 0) > 1)  # older files count the epoch up first
    return Position(epoch, 0, epoch * trainer.updates_per_epoch)


def _load_exactly(trainer: Trainer, training: _State) -> None:
    world, processes = trainer.world, training['processes']
    trainer.throughput.images, trainer.throughput.seconds = training['throughput']
    trainer.precision.skipped_steps, trainer.precision.skipped_in_a_row = training.get('skipped', (0, 0))
    if training['scheduler'] is not None and hasattr(trainer.scheduler, 'lr_scheduler'):
        trainer.scheduler.lr_scheduler.load_state_dict(training['scheduler'])
    if len(processes) != world.size:
        _logger.warning(f'The checkpoint is of {len(processes)} process(es), this run has {world.size}: it goes on, '
                        'but not exactly as it would have.')
        if trainer.position.batch:
            trainer.position = Position(trainer.position.epoch, 0, trainer.position.epoch * trainer.updates_per_epoch)
        return
    own = processes[world.rank]
    trainer.meter.load_state_dict(own['meter'])
    _set_random_state(own['random'], world)
    for name, buffers in own.get('buffers', {}).items():
        module = trainer.task.get_trainable_module(ema=name == 'ema')
        for key, buffer in unwrap_model(module).named_buffers() if module is not None else ():
            buffer.copy_(buffers[key])

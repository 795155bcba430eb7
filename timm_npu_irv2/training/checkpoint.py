"""Checkpoints: everything that a run needs to continue, in files that timm can read.

A file is timm's training checkpoint (``state_dict``, ``state_dict_ema``, ``optimizer``, ``epoch``, ``metric``, ...)
with one more entry, ``training``: the position in the epoch, and the state of each process (random states, running
statistics, sums of the metrics).
"""

import logging
import random
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import clean_state_dict
from timm.utils import unwrap_model
from torch import Tensor, nn

from .. import device as devices
from .. import rules, schema
from ..data.samplers import derive_seed, reseed
from ..distributed import World, gather_objects
from ..errors import UserError, one_line
from ..escaping import printable
from ..serialization import read_checkpoint
from .engine import Position, Trainer
from .layout import check_layout, stored_layout
from .resumption import changed_options, check_data, check_options, order_classes

__all__ = ['RunInfo', 'resume', 'training_state']

_logger = logging.getLogger(__name__)
_State = dict[str, Any]


@dataclass(frozen=True)
class RunInfo:
    """Facts about a run that its checkpoints tell.

    Attributes:
        model: timm's name of the model.
        num_classes: Number of classes of the model.
        options: Options of train.py as they were given.
        data: Fingerprints of the data sets, see :func:`~timm_npu_irv2.training.resumption.describe_data`.
    """

    model: str
    num_classes: int
    options: dict[str, Any]
    data: dict[str, dict[str, Any]] = field(default_factory=dict)


# Saving


def training_state(trainer: Trainer, info: RunInfo, extra: _State | None = None) -> _State | None:
    """Return the content of a checkpoint on rank 0, None elsewhere. Every process must call this.

    Args:
        trainer: Trainer between two steps.
        info: Facts about the run.
        extra: Further entries of the checkpoint.
    """
    processes = gather_objects(_process_state(trainer), trainer.world)
    pipeline = getattr(trainer.loader, 'pipeline', None)
    if not trainer.world.is_primary:
        return None
    return {
        'epoch': max(0, trainer.position.epoch - (trainer.position.batch == 0)),  # timm's: the epoch last trained in
        'version': 2,
        'arch': info.model,
        'args': info.options,
        'optimizer': trainer.optimizer.state_dict(),
        'amp_scaler': trainer.precision.state_dict(),
        **_model_entries(trainer),
        'training': {
            'format': 2,  # 1 had no fingerprint of the data, and options that had been worked out
            'data': info.data,
            'position': {**vars(trainer.position), 'samples': _samples_done(trainer)},
            'layout': trainer.layout.state_dict(),
            'num_classes': info.num_classes,
            'class_to_idx': getattr(trainer.loader, 'class_to_idx', None),  # for all who use the network
            'pipeline': pipeline.to_config() if pipeline else None,  # likewise
            'scheduler': _scheduler_state(trainer),
            'throughput': (trainer.throughput.images, trainer.throughput.seconds),
            'skipped': (trainer.precision.skipped_steps, trainer.precision.skipped_in_a_row),
            'processes': processes,
        },
        **(extra or {}),
    }


def _model_entries(trainer: Trainer) -> _State:
    """Return timm's entries: the student's weights in float32, and the projection that a distillation task trains."""
    module = trainer.module
    entries = _split(trainer.precision.model_state_dict(module), '')
    ema = trainer.ema
    if ema is not None:
        entries.update(_split(unwrap_model(ema).state_dict(), '_ema'))
    return entries


def _split(state_dict: _State, suffix: str) -> _State:
    # Contiguous, whatever the layout in training: timm's clean_checkpoint.py writes safetensors, which take no other.
    state_dict = {key: value.contiguous() for key, value in state_dict.items()}
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
    """Return the inverse of :func:`_split`, for a module that may wrap the student."""
    state_dict = clean_state_dict(checkpoint['state_dict' + suffix])
    if not hasattr(module, 'student'):
        return state_dict
    projection = checkpoint.get('task_state' + suffix, {}).get('projection', {})
    return {**{f'student.{key}': value for key, value in state_dict.items()},
            **{f'projection.{key}': value for key, value in projection.items()}}


def _samples_done(trainer: Trainer) -> int:
    """Return how many samples of the global order of its epoch the run has trained on."""
    layout = trainer.layout
    samples = trainer.position.batch * layout.images_per_batch
    return samples if layout.epoch_samples is None else min(samples, layout.epoch_samples)


def _process_state(trainer: Trainer) -> _State:
    """Return the state that differs from process to process."""
    state = {
        'random': _random_state(trainer.world),
        'meter': trainer.meter.state_dict(),
        'hidden': trainer.hidden_state.state_dict(),
    }
    if not trainer.world.is_primary:  # rank 0's are in the state dicts
        state['buffers'] = _buffers(trainer)
    return state


def _buffers(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """Return BatchNorm's running statistics, which processes do not share before the end of the epoch."""
    modules = {'model': trainer.module, 'ema': trainer.ema}
    return {name: {key: value.cpu() for key, value in unwrap_model(module).named_buffers()}
            for name, module in modules.items() if module is not None}


def _random_state(world: World) -> _State:
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = numpy_state
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
    """Return the state of plateau's inner torch scheduler; timm's other schedulers are functions of the epoch."""
    inner = getattr(trainer.scheduler, 'lr_scheduler', None)
    return inner.state_dict() if inner is not None else None


# Resuming


def resume(
        trainer: Trainer,
        path: Path,
        info: RunInfo,
        *,
        load_optimizer: bool = True,
        start_epoch: int | None = None,
        allow_changed_data: bool = False,
) -> _State:
    """Bring ``trainer`` to the state of a checkpoint.

    A run continues exactly from a checkpoint of this package. From any other (timm's, the model zoo's) come the
    weights, the epoch, and the optimizer's state if it fits.

    Args:
        trainer: Trainer of a new run with its EMA set up, before torch.compile and DDP wrap anything.
        path: Checkpoint, or file of weights.
        info: Facts about this run.
        load_optimizer: False leaves out optimizer, loss scale and random states.
        start_epoch: Epoch in place of the checkpoint's.
        allow_changed_data: Continue although the data sets are not those of the checkpoint, from the beginning of the
            epoch.

    Returns:
        The content of the checkpoint.

    Raises:
        UserError: The file cannot be read, is of another architecture or number of classes, or belongs to a run with
            other data, or with other options that may not change.
    """
    checkpoint = read_checkpoint(path)
    _check_fits(checkpoint, path, info)
    changed: list[str] = []
    if load_optimizer and (checkpoint.get('training') or {}).get('format', 1) >= 2:
        changed = changed_options(checkpoint['args'], info.options)
        if (applied := check_options(path, checkpoint['args'], info.options)):
            _logger.info(f'Changed since the checkpoint: {applied}.')
        check_layout(path, stored_layout(checkpoint['training'], checkpoint['args']), trainer.layout,
                     several_sizes=bool(info.options.get('train_img_sizes')))
    is_same_data = _is_same_data(checkpoint, path, info, allow_changed_data)
    _load_weights(trainer, checkpoint, path)
    if load_optimizer:
        _load_optimizer(trainer, checkpoint, path, changed)
    if start_epoch is not None:
        trainer.position = Position(start_epoch, 0, start_epoch * trainer.updates_per_epoch)
    else:
        trainer.position = _position(trainer, checkpoint)
        if load_optimizer and checkpoint.get('training') is not None:
            with rules.naming(path):
                _load_exactly(trainer, checkpoint, is_same_data)
    trainer.resumed_from = path
    _logger.info(f'Resumed from {path}: epoch {trainer.position.epoch}, batch {trainer.position.batch}.')
    return checkpoint


def _check_fits(checkpoint: _State, path: Path, info: RunInfo) -> None:
    training = checkpoint.get('training')
    if training is None:
        return
    if checkpoint['arch'] != info.model:
        raise UserError(f"{path} is a checkpoint of --model {printable(checkpoint['arch'])}, not of {info.model}.")
    found = training.get('num_classes', info.num_classes)
    if found != info.num_classes:
        raise UserError(f'{path} is a checkpoint with {found} classes, not {info.num_classes}: use --num-classes '
                        f'{found}, or --pretrained-path to start a new run from its weights.')


def _is_same_data(checkpoint: _State, path: Path, info: RunInfo, allow_changed_data: bool) -> bool:
    training = checkpoint.get('training') or {}
    data = training.get('data')
    if data is None and training.get('class_to_idx'):  # an older checkpoint
        data = {'training': {'classes': order_classes(training['class_to_idx'])}}
    try:
        check_data(path, data or {}, info.data)
    except UserError as error:
        if not allow_changed_data:
            raise
        _logger.warning(f'Continuing with changed data: {error}'.partition(' Restore it')[0])
        return False
    return True


def _load_weights(trainer: Trainer, checkpoint: _State, path: Path) -> None:
    module = trainer.module
    ema = trainer.ema
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


# Options that are values of the optimizer's parameter groups, which its state would overwrite.
_GROUP_OPTIONS = {'weight_decay': 'weight_decay', 'momentum': 'momentum', 'opt_eps': 'eps', 'opt_betas': 'betas'}


def _load_optimizer(trainer: Trainer, checkpoint: _State, path: Path, changed: Collection[str]) -> None:
    """Load the state of the optimizer, but keep the values of options that have changed."""
    state = checkpoint.get('optimizer')
    own = [len(group['params']) for group in trainer.optimizer.state_dict()['param_groups']]
    if state is None or [len(group['params']) for group in state['param_groups']] != own:
        if 'training' in checkpoint:
            raise UserError(f'{path} holds the state of an optimizer with other parameter groups: resume with its '
                            '--weight-decay, or use --no-resume-opt.')
        _logger.warning(f'{path} has no optimizer state that fits this network: the optimizer starts anew.')
        return
    given = [dict(group) for group in trainer.optimizer.param_groups]
    try:
        with rules.naming(path):
            trainer.optimizer.load_state_dict(schema.restored_optimizer(state, trainer.optimizer))
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f'{path}: the state of the optimizer is incomplete: {one_line(error)}') from error
    total = sum(len(group['params']) for group in state['param_groups'])
    if 0 < len(state['state']) < total:
        _logger.warning(f'{path} has optimizer state for {len(state["state"])} of {total} parameters: that of the '
                        'others starts anew.')
    for group, fresh in zip(trainer.optimizer.param_groups, given, strict=True):
        for option, name in _GROUP_OPTIONS.items():
            if option in changed and name in group:
                group[name] = fresh[name]
        if any(option.split('_')[0] == 'lr' for option in changed):
            _change_learning_rate(group, fresh)
    if checkpoint.get('amp_scaler'):
        trainer.precision.load_state_dict(checkpoint['amp_scaler'])


def _change_learning_rate(group: _State, fresh: _State) -> None:
    """Scale a group's learning rate as the one that the schedule starts from has changed."""
    before, now = (each.get('initial_lr', each['lr']) for each in (group, fresh))
    group['lr'] = _scale_rate(group['lr'], before, now)
    if 'initial_lr' in group:
        group['initial_lr'] = now


def _scale_rate(rate: Any, before: Any, now: Any) -> Any:
    if before == now:
        return rate
    return rate * now / before if before else now


def _change_restored_rates(trainer: Trainer, checkpoint: _State) -> None:
    """Scale the rates from before the noise likewise, which plateau's scheduler restores at its next step."""
    rates, groups = getattr(trainer.scheduler, 'restore_lr', None), trainer.optimizer.param_groups
    if rates is None:
        return
    rules.many(rules.number(), len(groups), len(groups))(rates, 'restore_lr')
    found = (checkpoint.get('optimizer') or {}).get('param_groups', groups)
    trainer.scheduler.restore_lr = [
        _scale_rate(rate, before['initial_lr'], now['initial_lr']) if 'initial_lr' in before else rate
        for rate, before, now in zip(rates, found, groups, strict=True)]


def _position(trainer: Trainer, checkpoint: _State) -> Position:
    training = checkpoint.get('training')
    if training is None:
        epoch = checkpoint.get('epoch', 0) + (checkpoint.get('version', 0) > 1)  # older files count the epoch up first
        return Position(epoch, 0, epoch * trainer.updates_per_epoch)
    position = dict(training['position'])
    samples, layout = position.pop('samples', None), stored_layout(training, checkpoint['args'])
    if not layout.divides_like(trainer.layout):
        position['batch'] = trainer.layout.batches_done(samples) if samples and layout.epoch_samples else 0
    return Position(**position)


def _load_exactly(trainer: Trainer, checkpoint: _State, is_same_data: bool) -> None:
    world, training = trainer.world, checkpoint['training']
    processes, layout = training['processes'], stored_layout(training, checkpoint['args'])
    trainer.throughput.images, trainer.throughput.seconds = training['throughput']
    trainer.precision.skipped_steps, trainer.precision.skipped_in_a_row = training.get('skipped', (0, 0))
    is_same_world = len(processes) == world.size
    rank = world.rank if is_same_world else 0
    own, own_scheduler = processes[rank], _scheduler_state(trainer)
    if 'hidden' in own:
        trainer.hidden_state.load_state_dict(own['hidden'], f'training.processes[{rank}].hidden')
        _change_restored_rates(trainer, checkpoint)
    elif training['scheduler'] is not None and own_scheduler is not None:  # an older checkpoint
        trainer.scheduler.lr_scheduler.load_state_dict(
            rules.known_entries(training['scheduler'], own_scheduler, 'training.scheduler'))
    if not layout.divides_like(trainer.layout) and world.is_primary:
        _logger.warning(f'The checkpoint is of a run with {layout} images in an update, this one has {trainer.layout}: '
                        'it continues with the next image, but not with the same bits.')
    begins_again = not is_same_data or not (layout.epoch_samples or layout.divides_like(trainer.layout))
    if begins_again and training['position']['batch']:
        _logger.info(f'Epoch {trainer.position.epoch} begins again.')
        trainer.position = Position(trainer.position.epoch, 0, trainer.position.epoch * trainer.updates_per_epoch)
    if is_same_world and not begins_again:
        _load_process(trainer, own)
    elif not is_same_world:
        _start_process(trainer, checkpoint, begins_again)


def _start_process(trainer: Trainer, checkpoint: _State, begins_again: bool) -> None:
    """Give this process a state of its own where the checkpoint is of another number of processes.

    The random states depend on the position, so that nothing is drawn twice. The sums of the metrics go to rank 0. The
    statistics of BatchNorm are rank 0's everywhere, as they are in the state dict.
    """
    world, position = trainer.world, trainer.position
    reseed(derive_seed(checkpoint['args']['seed'], position.epoch, _samples_done(trainer), world.rank, world.size),
           world.device)
    if begins_again:
        return
    meters = [process['meter'] for process in checkpoint['training']['processes']] if world.is_primary else []
    trainer.meter.load_state_dict({name: sum(meter[name] for meter in meters) for name in ('loss', 'hits', 'count')})


def _load_process(trainer: Trainer, own: _State) -> None:
    """Give this process the state of its predecessor: random states, sums of the metrics, running statistics."""
    world = trainer.world
    where, present = f'training.processes[{world.rank}]', _random_state(world)
    if own['random']['device'] is None or present['device'] is None:  # the run goes on on another kind of device
        present.pop('device')
    rules.known_entries(own['random'], present, f'{where}.random')
    present = _buffers(trainer)
    own_buffers = _with_counts(own.get('buffers', {}), present)
    rules.known_entries(own_buffers, present, f'{where}.buffers')
    trainer.meter.load_state_dict(own['meter'])
    _set_random_state(own['random'], world)
    for name, buffers in own_buffers.items():
        module = trainer.ema if name == 'ema' else trainer.module
        for key, buffer in unwrap_model(module).named_buffers() if module is not None else ():
            buffer.copy_(buffers[key])


def _with_counts(buffers: _State, present: _State) -> _State:
    """Return the buffers of a process with the counts of batches, which older checkpoints have in the weights alone."""
    counts = {name: {key: value for key, value in own.items() if key.endswith('.num_batches_tracked')}
              for name, own in present.items()}
    return {name: {**counts.get(name, {}), **own} if isinstance(own, dict) else own for name, own in buffers.items()}

"""From the options to the objects of a run: model, optimizer, scheduler."""

import contextlib
import difflib
import importlib
import inspect
import logging
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import create_model, is_model, list_models
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask
from timm.utils import ModelEmaV3, distribute_bn, set_jit_fuser
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from .. import device as devices
from ..cli.checks import name_option
from ..cli.evaluation import classes_in
from ..data.worker import is_lost_worker
from ..distributed import World, is_lost_peer
from ..errors import UserError, first_line
from ..optim import combines_gradients, create_optimizer
from ..precision import Precision, create_precision
from ..serialization import load_weights
from .engine import Position, TrainSettings
from .layout import Layout
from .options import WARMUP_EPOCHS, precision_options

__all__ = ['build_model', 'build_optimizer', 'build_precision', 'build_scheduler', 'compile_and_distribute',
           'describe_train_loss', 'distribute_batch_norm', 'fast_forward', 'learning_rate', 'place_model',
           'set_global_options', 'setup_ema', 'train_settings', 'translate_lost_process_errors',
           'translate_out_of_memory', 'translate_small_batch']

_logger = logging.getLogger(__name__)

MOST_EPOCHS = 10 ** 6


def set_global_options(args: Namespace) -> None:
    """Import --device-modules, and set the switches of whole libraries (--fuser, --fast-norm).

    Raises:
        UserError: A module cannot be imported.
    """
    for module in args.device_modules or ():
        with name_option(f'--device-modules {module}'):
            importlib.import_module(module)
    if args.fuser:
        with name_option(f'--fuser {args.fuser}'):
            set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()


def build_model(args: Namespace, num_classes: int | None = None) -> nn.Module:
    """Return timm's model with its initial weights, on the CPU.

    Args:
        args: Options of train.py.
        num_classes: Number of classes without --num-classes; None for the model's.

    Raises:
        UserError: There is no such model, it does not take an option, or its weights are not available.
    """
    if ':' not in args.model and not is_model(args.model.split('.')[0]):
        close = difflib.get_close_matches(args.model, list_models(), n=3)
        hint = f' Did you mean {" or ".join(close)}?' if close else ''
        raise UserError(f'--model {args.model}: timm has no such model.{hint}')
    given = {'--initial-checkpoint': args.initial_checkpoint, '--pretrained-path': args.pretrained_path}
    for option, path in given.items():
        if path and not Path(path).is_file():
            raise UserError(f'{option} {path}: no such file.')
    if args.num_classes is None and num_classes is not None:
        _logger.info(f'Classifier: {num_classes} outputs, one per class of the data.')
    model = _create(args, args.num_classes or num_classes)
    with name_option(f'--model {args.model}'):
        _initialize_head(model, args)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = module.momentum if args.bn_momentum is None else args.bn_momentum
            module.eps = module.eps if args.bn_eps is None else args.bn_eps
    if args.grad_checkpointing or args.recompute:
        _recompute(model, args)
    return model


def _recompute(model: Any, args: Namespace) -> None:
    if args.recompute and not hasattr(model, 'recompute_cheap'):
        raise UserError(f'--recompute is for inception_resnet_v2_npu, not {args.model}: use --grad-checkpointing.')
    with name_option('--recompute' if args.recompute else '--grad-checkpointing'):
        model.set_grad_checkpointing(args.recompute or True)


def _create(args: Namespace, num_classes: int | None) -> nn.Module:
    """Return the model with the weights that the options name; --initial-checkpoint decides the number of classes."""
    pretrained, initial = args.pretrained_path, args.initial_checkpoint
    overlay: dict[str, Any] | None = None
    if pretrained:  # -1: adapt the head
        source = {'file': pretrained} if _is_numpy(pretrained) else {'state_dict': load_weights(pretrained, True)}
        overlay = {**source, 'num_classes': -1}
    weights = load_weights(initial, use_ema=True) if initial and not _is_numpy(initial) else None
    options = {
        'pretrained': args.pretrained or bool(args.pretrained_path),
        'pretrained_cfg_overlay': overlay,
        'in_chans': args.in_chans or (args.input_size or [3])[0],
        'num_classes': num_classes or (classes_in(weights, args.model) if weights else None),
        'drop_rate': args.drop,
        'drop_path_rate': args.drop_path,
        'drop_block_rate': args.drop_block,
        'global_pool': args.gp,
        'scriptable': args.torchscript,
        'checkpoint_path': initial if _is_numpy(initial) else '',
    }
    with name_option(f'--model {args.model}' + (f' --pretrained-path {pretrained}' if pretrained else '')):
        model: Any = create_model(args.model, **{**options, **args.model_kwargs})
    model.pretrained_cfg.pop('state_dict', None)  # or the weights would be in memory twice
    if weights is not None:
        _load_initial(model, weights, args)
    return model


def _load_initial(model: Any, weights: dict[str, Tensor], args: Namespace) -> None:
    """Load the weights of --initial-checkpoint, which must fit as they are."""
    option, found = f'--initial-checkpoint {args.initial_checkpoint}', classes_in(weights, args.model)
    if found is not None and found != model.num_classes:
        raise UserError(f'{option}: it has {found} classes and the model {model.num_classes}: leave out --num-classes, '
                        'or use --pretrained-path, which adapts the classifier.')
    with name_option(option):
        model.load_state_dict(weights)


def _is_numpy(path: str | None) -> bool:
    """Return True for arrays of JAX, which some models of timm's read by themselves."""
    return Path(path or '').suffix in ('.npz', '.npy')


@torch.no_grad()
def _initialize_head(model: Any, args: Namespace) -> None:
    head = model.get_classifier()
    if args.head_init_scale is not None:
        head.weight.mul_(args.head_init_scale)
        head.bias.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        head.bias.fill_(args.head_init_bias)


def place_model(
        model: nn.Module,
        world: World,
        *,
        channels_last: bool = False,
        torchscript: bool = False,
        bn_splits: int = 0,
        sync_bn: bool = False,
) -> nn.Module:
    """Return the model on its device, in the device's layout.

    Args:
        model: Model on the CPU.
        world: This process among all, and its device.
        channels_last: The layout that was asked for. The device's own is used in any case, with a note in the log.
        torchscript: Compile the model with ``torch.jit.script``.
        bn_splits: Number of augmentation splits with statistics of their own (--split-bn); 0 for none.
        sync_bn: Compute the statistics of BatchNorm over all processes.

    Raises:
        UserError: The device has no synchronized BatchNorm.
    """
    if bn_splits:
        model = convert_splitbn_model(model, bn_splits)
    layout = devices.memory_format(world.device)
    if channels_last and layout != torch.channels_last:
        _logger.info(f'--channels-last has no effect: a {world.device.type} chooses its own layouts.')
    model = model.to(world.device, memory_format=layout)  # type: ignore[call-overload]  # torch's stubs lack this form
    if sync_bn and world.distributed:
        if world.device.type == 'cpu':
            raise UserError('--sync-bn needs NPUs or GPUs: torch has no synchronized BatchNorm on a CPU.')
        model = convert_sync_batchnorm(model)
    if not torchscript:
        return model
    with name_option('--torchscript'):
        return torch.jit.script(model)


def build_precision(args: Namespace, world: World) -> Precision:
    """Return the precision of --amp, --amp-dtype, --amp-impl, --opt-level, --loss-scale and --model-dtype."""
    return create_precision(world.device, **precision_options(args))


def learning_rate(args: Namespace, batch_size: float) -> float:
    """Return --lr, or the rate that --lr-base gives for ``batch_size`` images in an update."""
    if args.lr is not None:
        return args.lr
    ratio = batch_size / args.lr_base_size
    is_adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
    scale = args.lr_base_scale or ('sqrt' if is_adaptive else 'linear')
    lr = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
    _logger.info(f'Learning rate {lr:.4g}: {args.lr_base:g} for {args.lr_base_size} images, {scale} scaling.')
    return lr


def build_optimizer(model: nn.Module, args: Namespace, lr: float) -> torch.optim.Optimizer:
    """Return timm's optimizer for --opt and the options around it.

    Raises:
        UserError: There is no such optimizer, or it does not take an option.
    """
    with name_option(f'--opt {args.opt}'):
        return create_optimizer(model, args, lr=lr, **args.opt_kwargs)


def setup_ema(
        task: TrainingTask,
        precision: Precision,
        *,
        decay: float,
        use_warmup: bool = False,
        on_cpu: bool = False,
) -> None:
    """Give the task a moving average of the weights that the optimizer updates.

    Args:
        task: Task with the module that ``precision.prepare`` returned.
        precision: Precision of the run, which knows the float32 weights.
        decay: Decay per update.
        use_warmup: Let the decay grow at the beginning.
        on_cpu: Keep the average in host memory.
    """
    task.trainable_module_ema = ModelEmaV3(
        precision.float32_model(cast(nn.Module, task.get_trainable_module())),
        decay=decay,
        use_warmup=use_warmup,
        device=torch.device('cpu') if on_cpu else None,
    )


_COMPRESSIONS = {'fp16': default_hooks.fp16_compress_hook, 'bf16': default_hooks.bf16_compress_hook}


def compile_and_distribute(
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        world: World,
        *,
        backend: str | None = None,
        mode: str | None = None,
        sync_buffers: bool = True,
        grad_compress: str | None = None,
) -> None:
    """Compile the task's model, then wrap it in DistributedDataParallel, so that DDP stays out of the compiled graph.

    Args:
        task: Task to compile and to distribute.
        optimizer: Optimizer of the run.
        world: This process among all. A single one is not wrapped.
        backend: Backend of torch.compile; None does not compile.
        mode: Mode of torch.compile.
        sync_buffers: Broadcast rank 0's buffers before each forward pass.
        grad_compress: Type in which float32 gradients are sent, 'fp16' or 'bf16'; None sends them as they are.
    """
    if backend:
        task.compile(backend=backend, mode=mode)
        task.compile_ema(backend=backend, mode=mode)
    if not world.distributed:
        return
    # torch 2.14 renamed the argument.
    is_renamed = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel).parameters
    with _preserve_buffers(cast(nn.Module, task.get_trainable_module())):
        task.prepare_distributed(
            device_ids=None if world.device.type == 'cpu' else [world.device],
            gradient_as_bucket_view=not combines_gradients(optimizer),
            **{'forward_sync_buffers' if is_renamed else 'broadcast_buffers': sync_buffers},
        )
    if grad_compress:
        cast(DistributedDataParallel, task.trainable_module).register_comm_hook(None, _COMPRESSIONS[grad_compress])


@contextlib.contextmanager
def _preserve_buffers(module: nn.Module) -> Iterator[None]:
    """Keep the buffers of this process, which DDP's constructor overwrites by rank 0's."""
    saved = [(buffer, buffer.clone()) for buffer in module.buffers()]
    yield
    for buffer, value in saved:
        buffer.copy_(value)


def build_scheduler(
        optimizer: torch.optim.Optimizer,
        args: Namespace,
        updates_per_epoch: int,
        decreasing_metric: bool,
) -> tuple[Any, int]:
    """Return timm's scheduler (None for --sched none), and the number of epochs with warm-up and cool-down.

    Raises:
        UserError: The phases of the schedule do not fit into the run.
    """
    if args.epochs == 0:
        return None, 0
    kwargs = scheduler_kwargs(args, decreasing_metric=decreasing_metric)
    if args.epochs <= WARMUP_EPOCHS and args.warmup_epochs == args.epochs // 2:
        _logger.info(f'Warm-up: {args.warmup_epochs} of {args.epochs} epoch(s), since {WARMUP_EPOCHS} do not fit.')
    with name_option(f'--sched {args.sched}'):
        scheduler, epochs = create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates_per_epoch)
    if epochs > MOST_EPOCHS:
        raise UserError(f'--lr-cycle-mul and --lr-cycle-limit make {epochs:.3g} epochs: use smaller values.')
    return scheduler, epochs


def fast_forward(scheduler: Any, position: Position) -> None:
    """Set the learning rate of timm's scheduler at ``position``. Plateau's is part of its state instead."""
    if scheduler is None or hasattr(scheduler, 'lr_scheduler') or not position.updates:
        return
    scheduler.step(position.epoch)
    scheduler.step_update(position.updates)


def distribute_batch_norm(task: TrainingTask, world: World, mode: str, *, include_ema: bool = True) -> None:
    """Give all processes the same running statistics of BatchNorm.

    Args:
        task: Task whose modules have the statistics.
        world: This process among all.
        mode: 'reduce' for the mean over the processes, 'broadcast' for rank 0's; '' leaves them as they are.
        include_ema: Do the same to the moving average.
    """
    if not world.distributed or not mode:
        return
    distribute_bn(task.get_trainable_module(), world.size, mode == 'reduce')
    if include_ema and task.has_ema():
        distribute_bn(task.get_trainable_module(ema=True), world.size, mode == 'reduce')


@contextlib.contextmanager
def translate_out_of_memory(
        world: World, batch_size: int, grad_accum_steps: int, shared: bool = False) -> Iterator[None]:
    """Translate the device's lack of memory into a UserError that names a smaller --batch-size.

    Args:
        world: This process among all.
        batch_size: Value of --batch-size.
        grad_accum_steps: Value of --grad-accum-steps.
        shared: True if --batch-size is that of all processes together.
    """
    try:
        yield
    except RuntimeError as error:
        if not devices.is_out_of_memory(error):
            raise
        own = batch_size // world.size if shared else batch_size
        factor = next((number for number in range(2, own + 1) if own % number == 0), 0)
        smaller = (f' --batch-size {batch_size // factor} --grad-accum-steps {factor * grad_accum_steps}, which makes '
                   'the same updates, or') if factor else ''
        raise UserError(f'{world.device}: out of memory with --batch-size {batch_size}. Try{smaller} '
                        '--grad-checkpointing.') from error


@contextlib.contextmanager
def translate_small_batch(batch_size: int) -> Iterator[None]:
    """Translate BatchNorm's lack of values to average over, in training, into a UserError that names --batch-size."""
    try:
        yield
    except ValueError as error:
        if 'more than 1 value per channel' not in str(error):
            raise
        raise UserError(f'--batch-size {batch_size}: batch normalisation needs more than one value per channel in '
                        'training: use larger batches or images, or no --split-bn.') from error


@contextlib.contextmanager
def translate_lost_process_errors(world: World, advice: str) -> Iterator[None]:
    """Translate the loss of a loading process or of another rank into a UserError that ends with ``advice``."""
    try:
        yield
    except RuntimeError as error:
        if is_lost_worker(error):
            what = 'a process that loads images was killed, most often for lack of memory: use fewer --workers'
        elif world.distributed and is_lost_peer(error):
            what = f'rank {world.rank} lost the other processes ({first_line(error)})'
        else:
            raise
        raise UserError(f'{what}. {advice}') from error


def describe_train_loss(args: Namespace) -> str:
    """Return the difference of the training loss from plain cross entropy, such as 'label smoothing 0.1'."""
    parts = {
        'binary cross entropy': args.bce_loss,
        'Jensen-Shannon divergence': args.jsd_loss,
        f'label smoothing {args.smoothing:g}': args.smoothing,
        'Mixup': args.mixup,
        'CutMix': args.cutmix or args.cutmix_minmax,
        'distillation': args.kd_model_name,
    }
    return ', '.join(name for name, given in parts.items() if given)


def train_settings(args: Namespace, layout: Layout, batch_size_reference: float) -> TrainSettings:
    """Return the options of a training step.

    Args:
        args: Options of train.py.
        layout: Division of an update among the processes.
        batch_size_reference: Batch size whose loss has weight 1.
    """
    return TrainSettings(
        grad_accum_steps=layout.grad_accum_steps,
        batch_size=layout.batch_size,
        epoch_samples=layout.epoch_samples,
        lanes=layout.lanes,
        clip_grad=args.clip_grad,
        clip_mode=args.clip_mode,
        log_interval=args.log_interval,
        recovery_interval=args.recovery_interval,
        synchronize_step=args.synchronize_step,
        batch_size_reference=batch_size_reference,
        batch_size_power={'none': 0.0, 'sqrt': 0.5, 'linear': 1.0}[args.variable_batch_loss_scale],
    )

"""From the options to the things a run is made of: model, task, optimizer, schedule, output folder."""

import contextlib
import difflib
import importlib
import inspect
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.loss import create_classification_loss
from timm.models import create_model, is_model, list_models
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from timm.utils import ModelEmaV3, distribute_bn, set_jit_fuser
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from .. import device as devices
from ..data.worker import is_lost_worker
from ..distributed import World, is_lost_peer
from ..errors import UserError, first_line
from ..optim import combines_gradients, create_optimizer
from ..precision import Precision, create_precision
from .engine import Position, TrainSettings
from .loaders import mixup_active

__all__ = [
    'build_model',
    'build_optimizer',
    'build_precision',
    'build_scheduler',
    'build_task',
    'compile_and_distribute',
    'distribute_batch_norm',
    'fast_forward',
    'global_options',
    'per_process_batch_size',
    'place_model',
    'setup_ema',
    'start_wandb',
    'train_settings',
    'translate_lost_process_errors',
    'translate_out_of_memory',
]

_logger = logging.getLogger(__name__)


def global_options(args: Namespace) -> None:
    """Switches of whole libraries, and modules that register themselves."""
    for module in args.device_modules or ():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f'--device-modules {module}: {error}') from error
    if args.fuser:
        set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()


def per_process_batch_size(args: Namespace, world: World) -> int:
    """The images of a step that are this process's: --batch-size, which the zoo's launcher divides among all cards.

    Raises:
        UserError: It does not divide evenly.
    """
    if not args.multiprocessing_distributed:
        return args.batch_size
    if args.batch_size % world.size:
        raise UserError(f'--batch-size {args.batch_size} is of all cards together with --multiprocessing-distributed: '
                        f'it must be a multiple of {world.size}.')
    return args.batch_size // world.size


def build_model(args: Namespace) -> nn.Module:
    """The network on its device and in the device's layout; ``args.num_classes`` becomes its number of classes.

    Raises:
        UserError: There is no such model, it does not take an option, or its weights cannot be had.
    """
    if ':' not in args.model and not is_model(args.model.split('.')[0]):
        close = difflib.get_close_matches(args.model, list_models(), n=3)
        hint = f' It has {", ".join(close)}.' if close else ''
        raise UserError(f'--model {args.model}: timm has no such model.{hint}')
    given = {'--initial-checkpoint': args.initial_checkpoint, '--pretrained-path': args.pretrained_path}
    for option, path in given.items():
        if path and not Path(path).is_file():
            raise UserError(f'{option} {path}: no such file.')
    try:
        model = _create(args)
    except (RuntimeError, OSError, TypeError, ValueError, AssertionError) as error:
        if devices.is_out_of_memory(error):
            raise
        raise UserError(f'--model {args.model}: {" ".join(str(error).split())[:300]}') from error
    args.num_classes = args.num_classes or model.num_classes
    _initialise_head(model, args)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = module.momentum if args.bn_momentum is None else args.bn_momentum
            module.eps = module.eps if args.bn_eps is None else args.bn_eps
    if args.grad_checkpointing or args.recompute:
        _recompute(model, args)
    return model


def _recompute(model: nn.Module, args: Namespace) -> None:
    if args.recompute and not hasattr(model, 'recompute'):
        raise UserError(f'--recompute is for inception_resnet_v2_npu, not {args.model}: use --grad-checkpointing.')
    model.set_grad_checkpointing(args.recompute or True)


def _create(args: Namespace) -> nn.Module:
    overlay = {'file': args.pretrained_path, 'num_classes': -1} if args.pretrained_path else None  # -1: adapt the head
    options = {
        'pretrained': args.pretrained or bool(args.pretrained_path),
        'pretrained_cfg_overlay': overlay,
        'in_chans': args.in_chans or (args.input_size or [3])[0],
        'num_classes': args.num_classes,
        'drop_rate': args.drop,
        'drop_path_rate': args.drop_path,
        'drop_block_rate': args.drop_block,
        'global_pool': args.gp,
        'scriptable': args.torchscript,
        'checkpoint_path': args.initial_checkpoint,
    }
    return create_model(args.model, **{**options, **args.model_kwargs})


@torch.no_grad()
def _initialise_head(model: nn.Module, args: Namespace) -> None:
    head = model.get_classifier()
    if args.head_init_scale is not None:
        head.weight.mul_(args.head_init_scale)
        head.bias.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        head.bias.fill_(args.head_init_bias)


def place_model(model: nn.Module, args: Namespace, world: World) -> nn.Module:
    """Convert the BatchNorm layers as asked, move the network to its device, and script it if asked."""
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    layout = devices.memory_format(world.device)
    if args.channels_last and layout != torch.channels_last:
        _logger.info(f'--channels-last: a {world.device.type} chooses its own layouts, so it has no effect there.')
    model = model.to(world.device, memory_format=layout)
    if args.sync_bn and world.distributed:
        if world.device.type == 'cpu':
            raise UserError('--sync-bn needs NPUs or GPUs: torch has no synchronised BatchNorm on a CPU.')
        args.dist_bn = ''  # the statistics are the same everywhere
        model = convert_sync_batchnorm(model)
    return torch.jit.script(model) if args.torchscript else model


def build_precision(args: Namespace, world: World) -> Precision:
    """What --amp, --amp-dtype, --amp-impl, --opt-level, --loss-scale and --model-dtype say."""
    return create_precision(
        world.device,
        amp=args.amp,
        amp_impl=args.amp_impl,
        amp_dtype=getattr(torch, args.amp_dtype) if args.amp_dtype else None,
        opt_level=args.opt_level,
        loss_scale=args.loss_scale,
        model_dtype=getattr(torch, args.model_dtype) if args.model_dtype else None,
    )


def build_task(model: nn.Module, args: Namespace, world: World) -> TrainingTask:
    """timm's task: the training loss, and a teacher if there is one.

    Raises:
        UserError: The model cannot be distilled in the way that was asked for, or there is no such teacher.
    """
    common = {'criterion': _training_loss(args), 'device': world.device, 'verbose': world.is_primary}
    if args.kd_model_name is None:
        return ClassificationTask(model, **common)
    common |= {
        'student_model': model, 'teacher_model': args.kd_model_name,
        'distill_loss_weight': args.distill_loss_weight, 'task_loss_weight': args.task_loss_weight}
    try:
        if args.kd_distill_type == 'feature':
            task = FeatureDistillationTask(
                **common,
                student_feature_dim=args.kd_student_feature_dim,
                teacher_feature_dim=args.kd_teacher_feature_dim,
            )
        elif args.kd_distill_type == 'logit':
            task = LogitDistillationTask(**common, loss_type=args.kd_loss_type, temperature=args.kd_temperature)
        else:
            task = TokenDistillationTask(
                **common, distill_type=args.kd_token_distill_type, temperature=args.kd_temperature)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f'--kd-model-name {args.kd_model_name}: {" ".join(str(error).split())[:300]}') from error
    for parameter in task.teacher.parameters():
        parameter.requires_grad = False
    _settle_teachers_normalization(task)
    return task


def _settle_teachers_normalization(task: TrainingTask) -> None:
    """Decide now whether the teacher wants other images than the student; timm asks the device in every step."""
    teacher, student = task.teacher, (task.student_mean, task.student_std)
    alike = all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(student, (teacher.mean_kd, teacher.std_kd), strict=True))

    def normalize_input(images: torch.Tensor, *_: Any) -> torch.Tensor:
        mean, std = student
        return images if alike else (images * std + mean - teacher.mean_kd) / teacher.std_kd

    teacher.normalize_input = normalize_input


def _training_loss(args: Namespace) -> nn.Module:
    soft = mixup_active(args)
    if args.jsd_loss:
        return create_classification_loss('jsd', smoothing=args.smoothing, jsd_splits=args.aug_splits)
    if args.bce_loss:
        return create_classification_loss(
            'bce', smoothing=args.smoothing, soft_targets=soft, bce_target_thresh=args.bce_target_thresh,
            bce_sum=args.bce_sum, pos_weight=args.bce_pos_weight)
    return create_classification_loss('ce', smoothing=args.smoothing, soft_targets=soft)


def build_optimizer(model: nn.Module, args: Namespace, world: World, batch_size: float) -> torch.optim.Optimizer:
    """timm's optimizer for --opt; ``args.lr`` is worked out from --lr-base if it is not given.

    Args:
        model: The module whose parameters are trained.
        args: The options.
        world: This process among all.
        batch_size: The (mean) batch size of a process.

    Raises:
        UserError: There is no such optimizer, or it does not take an option.
    """
    if not args.lr:
        ratio = batch_size * world.size * args.grad_accum_steps / args.lr_base_size
        adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
        scale = args.lr_base_scale or ('sqrt' if adaptive else 'linear')
        args.lr = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
        _logger.info(f'Learning rate {args.lr:.4g}: {args.lr_base:g} for {args.lr_base_size} images, {scale} scaling.')
    return create_optimizer(model, args, **args.opt_kwargs)


def setup_ema(task: TrainingTask, precision: Precision, args: Namespace) -> None:
    """Give the task the moving average that --model-ema asks for: of the weights that the optimizer updates."""
    if args.model_ema:
        task.trainable_module_ema = ModelEmaV3(
            precision.float32_model(task.get_trainable_module()),
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=torch.device('cpu') if args.model_ema_force_cpu else None,
        )


_COMPRESSIONS = {'fp16': default_hooks.fp16_compress_hook, 'bf16': default_hooks.bf16_compress_hook}


def compile_and_distribute(
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        args: Namespace,
        world: World,
) -> None:
    """torch.compile, then DistributedDataParallel around it, so that DDP stays out of the compiled graph."""
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if world.distributed:
        # torch 2.14 renamed the argument.
        renamed = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel).parameters
        task.prepare_distributed(
            device_ids=None if world.device.type == 'cpu' else [world.device],
            gradient_as_bucket_view=not combines_gradients(optimizer),
            **{'forward_sync_buffers' if renamed else 'broadcast_buffers': not args.no_ddp_bb},
        )
        if args.grad_compress:
            task.trainable_module.register_comm_hook(None, _COMPRESSIONS[args.grad_compress])


def build_scheduler(
        optimizer: torch.optim.Optimizer,
        args: Namespace,
        updates_per_epoch: int,
        decreasing_metric: bool,
) -> tuple[Any, int]:
    """timm's scheduler (None for --sched none), and the number of epochs including warm-up and cool-down.

    Raises:
        UserError: The lengths of its phases do not fit into the run.
    """
    if args.epochs == 0:
        return None, 0
    kwargs = scheduler_kwargs(args, decreasing_metric=decreasing_metric)
    try:
        return create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates_per_epoch)
    except ValueError as error:
        raise UserError(f'--sched {args.sched}: {error}') from error


def fast_forward(scheduler: Any, position: Position) -> None:
    """Set the learning rate that timm's scheduler has at ``position``; plateau's follows from what it remembers."""
    if scheduler is None or hasattr(scheduler, 'lr_scheduler') or not position.updates:
        return
    scheduler.step(position.epoch)
    scheduler.step_update(position.updates)


def distribute_batch_norm(task: TrainingTask, args: Namespace, world: World) -> None:
    """Give all processes the same running statistics of BatchNorm, as --dist-bn says."""
    if not world.distributed or not args.dist_bn:
        return
    reduce = args.dist_bn == 'reduce'
    distribute_bn(task.get_trainable_module(), world.size, reduce)
    if task.has_ema() and not args.model_ema_force_cpu:
        distribute_bn(task.get_trainable_module(ema=True), world.size, reduce)


@contextlib.contextmanager
def translate_out_of_memory(args: Namespace, world: World) -> Iterator[None]:
    """Turn the device's lack of memory into advice."""
    try:
        yield
    except RuntimeError as error:
        if not devices.is_out_of_memory(error):
            raise
        half, steps = max(1, args.batch_size // 2), args.grad_accum_steps
        raise UserError(
            f'{world.device}: out of memory with --batch-size {args.batch_size}. Try --batch-size {half} '
            f'--grad-accum-steps {2 * steps}, which updates alike, or --grad-checkpointing.') from error


@contextlib.contextmanager
def translate_lost_process_errors(world: World, advice: str) -> Iterator[None]:
    """Turn the end of another process into one line: of one that loads images, or of another rank."""
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


def train_settings(args: Namespace, batch_size_reference: float) -> TrainSettings:
    """The options that a training step needs."""
    return TrainSettings(
        grad_accum_steps=args.grad_accum_steps,
        clip_grad=args.clip_grad,
        clip_mode=args.clip_mode,
        log_interval=args.log_interval,
        recovery_interval=args.recovery_interval,
        synchronize_step=args.synchronize_step,
        batch_size_reference=batch_size_reference,
        batch_size_power={'none': 0.0, 'sqrt': 0.5, 'linear': 1.0}[args.variable_batch_loss_scale],
    )


def start_wandb(args: Namespace, name: str) -> Callable[[dict[str, Any]], None]:
    """Begin a run of Weights & Biases; what logs a row of figures to it (nothing without --log-wandb).

    Raises:
        UserError: It is not installed.
    """
    if not args.log_wandb:
        return lambda row: None
    try:
        import wandb  # noqa: PLC0415 - an optional package
    except ImportError as error:
        raise UserError('--log-wandb needs the package wandb: pip install wandb.') from error
    wandb.init(project=args.wandb_project, name=name, config=vars(args), tags=args.wandb_tags,
               id=args.wandb_resume_id or None, resume='must' if args.wandb_resume_id else None)
    return wandb.log

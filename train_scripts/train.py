#!/usr/bin/env python3
"""Train Inception-ResNet-v2, or any timm model, on NPU, CUDA or CPU.

    python train_scripts/train.py --data-dir DIR [options]                          # one device
    torchrun --nproc-per-node 8 train_scripts/train.py --data-dir DIR [options]     # eight
    python train_scripts/train.py --data DIR --multiprocessing-distributed --device-list '0,1' [options]

The options are those of timm's train.py, the parameters of Ascend ModelZoo's script, and what an NPU needs: --help.
"""

import timm_npu_irv2.cli.environment  # noqa: F401 - sets variables that torch reads when it is loaded

# isort: split
import sys

from timm_npu_irv2.cli.flags import TRAIN
from timm_npu_irv2.cli.script import check_command_line

if __name__ == '__main__':
    check_command_line(TRAIN, sys.argv[1:])  # before the imports below, which take seconds

# isort: split
import contextlib
import logging
import math
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import random_seed

from timm_npu_irv2 import device as devices
from timm_npu_irv2 import hub
from timm_npu_irv2.cli.checks import translate_compile_errors
from timm_npu_irv2.cli.flags import OUR_MODEL, device_switches
from timm_npu_irv2.cli.parser import as_yaml
from timm_npu_irv2.cli.script import leave_at_end, run_script, start_log
from timm_npu_irv2.cli.tuned import choose_settings, settings_in, train_workload, with_settings
from timm_npu_irv2.data.pipeline import ImagePipeline
from timm_npu_irv2.distributed import (
    StopRequest,
    World,
    agree,
    device_name,
    gather_objects,
    initialize,
    is_launched,
    launch,
    may_restart,
    on_primary,
    restarted,
)
from timm_npu_irv2.errors import Stopped, UserError
from timm_npu_irv2.serialization import atomic_write
from timm_npu_irv2.training import setup
from timm_npu_irv2.training.checkpoint import RunInfo
from timm_npu_irv2.training.checkpoint import resume as resume_checkpoint
from timm_npu_irv2.training.engine import Position, Trainer
from timm_npu_irv2.training.evaluation import evaluate
from timm_npu_irv2.training.layout import Layout, plan_layout, process_batch_size
from timm_npu_irv2.training.loaders import build_eval_loader, build_train_loader, count_classes
from timm_npu_irv2.training.options import parse_args
from timm_npu_irv2.training.output_dir import default_name, output_dir
from timm_npu_irv2.training.report import Report
from timm_npu_irv2.training.resumption import describe_data
from timm_npu_irv2.training.saver import CheckpointSaver, find_newest
from timm_npu_irv2.training.task import build_task
from timm_npu_irv2.training.tracking import Logs, check_packages

_logger = logging.getLogger('train')


@dataclass
class Run:
    """Everything that the functions below share.

    Attributes:
        args: Options, with those that --tuned chose; ``info`` has them as they were given.
        info: Facts about the run that go into each checkpoint.
        world: This process among all.
        trainer: Everything that a training step needs.
        eval_loader: Batches of the validation set; None for no validation.
        epochs: Number of epochs with warm-up and cool-down.
        image_size: Width of the images in pixels.
        parameters: Number of parameters of the model.
        lr: Learning rate of the schedule.
        metric: Metric that chooses the best checkpoint.
        started: Time on the monotonic clock at which this process began.
        checkpoint: Checkpoint that the run goes on from; None for a new run.
        settings: Settings that --tuned chose.
        is_restart: True if torchrun has started the processes again.
        seconds_before: Duration of the run before it was interrupted.
        bad_images_before: Unreadable images met before it was interrupted, with the reasons.
    """

    args: Namespace
    info: RunInfo
    world: World
    trainer: Trainer
    eval_loader: Any
    epochs: int
    image_size: int
    parameters: int
    lr: float
    metric: str
    started: float
    checkpoint: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    is_restart: bool = False
    seconds_before: float = 0.0
    bad_images_before: dict[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Duration of the run so far, without interruptions."""
        return self.seconds_before + time.monotonic() - self.started

    @property
    def loaders(self) -> list[Any]:
        """Loaders of training and, if there is one, of validation."""
        return [self.trainer.loader, *([self.eval_loader] if self.eval_loader is not None else [])]

    @property
    def batch_size(self) -> int:
        """Images in an update, of all processes together."""
        loader: Any = self.trainer.loader
        return round(loader.average_batch_size * self.world.size * self.trainer.settings.grad_accum_steps)

    def bad_images(self) -> dict[str, str]:
        """Return the unreadable images of all processes, with the reasons, on rank 0. Every process must call this."""
        own = {name: reason for loader in self.loaders for name, reason in loader.bad_images.items()}
        every = [self.bad_images_before, *gather_objects(own, self.world)]
        return {name: reason for met in every for name, reason in met.items()}

    def checkpoint_entries(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides the trainer's state. Every process must call this."""
        return {'seconds': self.seconds, 'bad_images': self.bad_images(),
                'tuned': {'device': self.world.device.type, 'settings': self.settings}}


def main(argv: Sequence[str]) -> int:
    """Read the options, start one process per card if asked to, and train."""
    started = time.monotonic()
    args = parse_args(argv)
    check_packages(args)
    if args.multiprocessing_distributed and not is_launched():
        return launch(
            __file__, argv, device=args.device, device_list=args.device_list, nodes=args.world_size or 1,
            node_rank=args.rank or 0, addr=args.addr, dist_url=args.dist_url)
    if may_restart() and not args.experiment:
        raise UserError('--max-restarts needs --experiment: a restart continues in the folder that it names.')
    setup.set_global_options(args)
    world = initialize(
        device_name(args.device, None if args.multiprocessing_distributed else args.device_list),
        dist_url=args.dist_url, backend=args.dist_backend, addr=args.addr, rank=args.rank,
        world_size=None if args.multiprocessing_distributed else args.world_size)
    with leave_at_end(world, 'train.py'):
        run_in(world, args, started)
    return 0


def run_in(world: World, args: Namespace, started: float) -> None:
    """Run this process's part of the training. At the end nothing of it is left but its files."""
    start_log(world.is_primary)
    devices.configure(world.device, **device_switches(args))
    checkpoint, is_restart = find_checkpoint(args, world)
    settings = tuned_settings(args, world, checkpoint if is_restart or not args.no_resume_opt else None)
    given, args = args, with_settings(args, world.device, settings)
    stop_request = StopRequest(world) if args.epochs else contextlib.nullcontext()  # an evaluation has nothing to save
    out_of_memory = setup.translate_out_of_memory(
        world, args.batch_size, args.grad_accum_steps, shared=args.multiprocessing_distributed)
    lost_process = setup.translate_lost_process_errors(world, '--resume auto continues from the newest checkpoint.')
    compiling, small_batch = translate_compile_errors(args.torchcompile), setup.translate_small_batch(args.batch_size)
    with out_of_memory, lost_process, compiling, small_batch, stop_request as stop:
        run = build_run(args, world, stop, started, checkpoint, given)
        run.settings, run.is_restart = settings, is_restart
        folder = output_root(args) / (args.experiment or default_name(args.model, run.image_size))
        with output_dir(folder, world, resume=args.resume), closing(run.loaders):
            train(run, folder)


def tuned_settings(args: Namespace, world: World, checkpoint: Path | None) -> dict[str, Any]:
    """Return the settings of --tuned, as rank 0 sees them; a run that goes on has those of its checkpoint."""
    workload = train_workload(args, world.device, process_batch_size(args, world))
    return agree(lambda: choose_settings(
        args, world.device, **workload, before=settings_in(checkpoint, world.device)), world)


def output_root(args: Namespace) -> Path:
    """Return the folder of all experiments."""
    return Path(args.output or './output/train')


def build_run(
        args: Namespace,
        world: World,
        stop: StopRequest | None,
        started: float,
        checkpoint: Path | None,
        given: Namespace,
) -> Run:
    """Build everything that training needs, in the only order that works."""
    layout = plan_layout(args, world, checkpoint)
    if (args.pretrained and not args.pretrained_path) or ':' in args.model:
        hub.check_published(args.model)
    random_seed(args.seed)  # the same initial weights in every process
    model = setup.build_model(args, None if args.initial_checkpoint else count_classes(args))
    # Otherwise timm says that the student has no distillation head, which no network would change.
    if args.kd_model_name and (args.kd_distill_type != 'token' or hasattr(model, 'set_distilled_training')):
        hub.check_published(args.kd_model_name)
    parameters, num_classes = sum(p.numel() for p in model.parameters()), model.num_classes
    pipeline = ImagePipeline.for_model(model, vars(args))
    model = setup.place_model(
        model, world, channels_last=args.channels_last, torchscript=args.torchscript, sync_bn=args.sync_bn,
        bn_splits=max(args.aug_splits, 2) if args.split_bn else 0)
    precision = setup.build_precision(args, world)

    train_loader, eval_loader = build_loaders(args, pipeline, world, layout, num_classes, precision.input_dtype)
    layout = layout.with_epoch_of(train_loader)
    metric = args.eval_metric if eval_loader is not None else 'loss'

    task = build_task(model, args, world)
    module = task.get_trainable_module()
    average_batch_size = train_loader.average_batch_size
    lr = setup.learning_rate(args, average_batch_size * world.size * layout.grad_accum_steps)
    optimizer = setup.build_optimizer(module, args, lr)
    task.trainable_module, optimizer = precision.prepare(module, optimizer)
    if args.model_ema:
        setup.setup_ema(task, precision, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup,
                        on_cpu=args.model_ema_force_cpu)
    updates_per_epoch = -(-len(train_loader) // layout.grad_accum_steps)
    scheduler, epochs = setup.build_scheduler(optimizer, args, updates_per_epoch, metric == 'loss')
    random_seed(args.seed, world.rank)  # different dropout in every process

    settings = setup.train_settings(args, layout, average_batch_size)
    trainer = Trainer(task, train_loader, optimizer, precision, world, scheduler, settings, stop)
    loaders = {'training': train_loader, **({'validation': eval_loader} if eval_loader is not None else {})}
    data = {split: describe_data(loader.samples, loader.class_to_idx) for split, loader in loaders.items()}
    info = RunInfo(args.model, num_classes, vars(given), data)
    return Run(args, info, world, trainer, eval_loader, epochs, pipeline.input_size[-1], parameters, lr, metric,
               started, checkpoint)


def build_loaders(
        args: Namespace, pipeline: ImagePipeline, world: World, layout: Layout, num_classes: int, dtype: torch.dtype,
) -> tuple[Any, Any]:
    """Return the loaders of training and of validation; None in the place of the latter for no validation."""
    train_loader = build_train_loader(
        args, pipeline, world, num_classes=num_classes, batch_size=layout.batch_size,
        epoch_samples=layout.epoch_samples, lanes=layout.lanes, dtype=dtype)
    if not args.val_split:
        return train_loader, None
    return train_loader, build_eval_loader(
        args, pipeline, world, split=args.val_split, num_samples=args.val_num_samples, num_classes=num_classes,
        batch_size=args.validation_batch_size or layout.batch_size, train_loader=train_loader, dtype=dtype)


@contextlib.contextmanager
def closing(loaders: Sequence[Any]) -> Iterator[None]:
    """Close the loaders at the end of the block, so that their worker processes end."""
    try:
        yield
    finally:
        for loader in loaders:
            loader.close()


def train(run: Run, folder: Path) -> None:
    """Resume if asked to, train epoch by epoch, write the report."""
    args, world, trainer = run.args, run.world, run.trainer
    if args.push_to_hub:  # an invalid token is an error now, and not after the training
        agree(lambda: hub.prepare(args.push_to_hub), world)
    saver = CheckpointSaver(folder, world, run.info, keep=args.checkpoint_hist, decreasing=run.metric == 'loss')
    resume(run, saver)
    setup.compile_and_distribute(
        trainer.task, trainer.optimizer, world, backend=args.torchcompile, mode=args.torchcompile_mode,
        sync_buffers=not args.no_ddp_bb, grad_compress=args.grad_compress)
    report = Report(folder, trainer.position.epoch, run.metric)
    started: list[Logs] = []
    on_primary(lambda: started.append(Logs(args, folder, trainer, run.epochs, run.eval_loader)), world)
    logs = started[0] if started else None  # on rank 0
    on_primary(lambda: atomic_write(folder / 'args.yaml', as_yaml(Namespace(**run.info.options))), world)
    log_summary(run, folder)
    with contextlib.closing(logs) if logs is not None else contextlib.nullcontext():
        trainer.on_log = logs.step if logs is not None else trainer.on_log
        train_epochs(run, saver, report, logs)
        write_report(run, folder, report, saver, validate(run) if args.epochs == 0 else None)
        if logs is not None:
            logs.finish()


def train_epochs(run: Run, saver: CheckpointSaver, report: Report, logs: Logs | None) -> None:
    """Train from the trainer's position to the last epoch; validate and save where that is due."""
    args, world, trainer = run.args, run.world, run.trainer
    with contextlib.closing(saver):
        trainer.on_recovery = lambda trainer: saver.save_recovery(trainer, run.checkpoint_entries())
        trainer.last_good = saver.last_good
        trainer.images_folder = saver.folder if args.save_images else None
        if args.elastic and run.checkpoint is None:
            trainer.on_recovery(trainer)  # from now on a file holds the number of images in an update
        for epoch in range(trainer.position.epoch, run.epochs):
            trained = trainer.train_one_epoch()
            setup.distribute_batch_norm(
                trainer.task, world, '' if args.sync_bn else args.dist_bn, include_ema=not args.model_ema_force_cpu)
            is_due = (epoch + 1) % args.val_interval == 0 or epoch + 1 == run.epochs
            validated = validate(run) if is_due else None
            log_epoch(world, report, logs, epoch, trained, validated)
            end_epoch(run, saver, epoch, (validated or trained)[run.metric] if is_due else None)
        saver.wait()


def resume(run: Run, saver: CheckpointSaver) -> None:
    """Bring the trainer to the state that --resume and --start-epoch ask for."""
    args, trainer = run.args, run.trainer
    path, is_restart = run.checkpoint, run.is_restart
    # A restart repeats the command line, whose --start-epoch and --no-resume-opt the first start has carried out.
    start_epoch = None if is_restart else args.start_epoch
    if path is not None:
        state = resume_checkpoint(
            trainer, path, run.info, load_optimizer=is_restart or not args.no_resume_opt, start_epoch=start_epoch,
            allow_changed_data=args.allow_changed_data)
        run.seconds_before = state.get('seconds', 0.0)
        run.bad_images_before = state.get('bad_images', {})
        saver.load_state_dict(state.get('saver', {}), path)
    elif start_epoch is not None:
        trainer.position = Position(start_epoch, 0, start_epoch * trainer.updates_per_epoch)
    setup.fast_forward(trainer.scheduler, trainer.position)


def find_checkpoint(args: Namespace, world: World) -> tuple[Path | None, bool]:
    """Return the checkpoint to resume from, or None, and True if the run continues after a restart by torchrun.

    It is the file of --resume; for 'auto' and after a restart, the newest in the folder, as rank 0 sees it.
    """
    named = Path(args.resume) if args.resume and args.resume != 'auto' else None
    if args.resume != 'auto' and not restarted():
        return named, False
    newest = agree(lambda: find_newest(output_root(args) / args.experiment), world)
    _logger.info(f'Resuming automatically: {newest or named or "there is no checkpoint, so this is a new run"}.')
    return newest or named, restarted() and newest is not None


def log_epoch(
        world: World, report: Report, logs: Logs | None, epoch: int, trained: dict[str, float],
        validated: dict[str, float] | None,
) -> None:
    """Add an epoch to summary.csv and to the logs. Every process must call this."""
    def add() -> None:
        row = report.add_epoch(epoch, trained, validated)
        if logs is not None:
            logs.epoch(row)

    on_primary(add, world)


def end_epoch(run: Run, saver: CheckpointSaver, epoch: int, metric: float | None) -> None:
    """Set the next epoch's learning rate, save a checkpoint if one is due, and stop if asked to."""
    trainer = run.trainer
    if trainer.scheduler is not None:
        trainer.scheduler.step(epoch + 1, metric)
    if metric is not None:
        saver.save_epoch(trainer, epoch, metric, run.checkpoint_entries())
    signal_number = trainer.stop.poll() if trainer.stop is not None else 0
    if signal_number and epoch + 1 < run.epochs:
        if metric is None:
            trainer.on_recovery(trainer)
        raise Stopped(signal_number, saver.last_good())


def validate(run: Run) -> dict[str, float] | None:
    """Evaluate the weights, and their moving average if there is one, and return the figures of the latter.

    Raises:
        Diverged: The loss is NaN or infinite.
    """
    if run.eval_loader is None:
        return None
    task, precision, args = run.trainer.task, run.trainer.precision, run.args
    measured: list[dict[str, float]] = []
    for ema in (False, True) if task.has_ema() and not args.model_ema_force_cpu else (False,):
        measured.append(evaluate(
            task.get_eval_model(ema=ema), run.eval_loader, run.world, autocast=precision.autocast, tta=args.tta))
        if not math.isfinite(measured[-1]['loss']):
            raise run.trainer.diverged(f'the validation loss is {measured[-1]["loss"]}')
    if len(measured) > 1:
        _logger.info(f'Validation of the weights: top-1 {measured[0]["top1"]:.2f} %; of their moving average: '
                     f'{measured[1]["top1"]:.2f} %.')
    return measured[-1]


def log_summary(run: Run, folder: Path) -> None:
    """Write one line to the log about the run that begins."""
    trainer, where = run.trainer, f'{run.world.size} × {run.world.device.type}'
    _logger.info(
        f'{run.args.model}: {run.parameters / 1e6:.2f} M parameters, {run.info.num_classes} classes, '
        f'{run.image_size} px; {where}, {trainer.precision.description}; batch {run.batch_size}, '
        f'{type(trainer.optimizer).__name__}, learning rate {run.lr:.4g}; '
        f'epoch {trainer.position.epoch} of {run.epochs}; output in {folder}')


def write_report(
        run: Run,
        folder: Path,
        report: Report,
        saver: CheckpointSaver,
        evaluation: dict[str, float] | None,
) -> None:
    """Write report.json and the curves, log where the weights are, and print the zoo's three last lines."""
    bad_images = run.bad_images()
    if not run.world.is_primary:
        return
    if bad_images:
        _logger.warning(f'{len(bad_images)} image(s) could not be read and were skipped; report.json names them.')
    trainer = run.trainer
    if saver.best_epoch is not None:
        _logger.info(f'Best {run.metric}: {saver.best_metric:.4g} in epoch {saver.best_epoch}. Weights: '
                     f'{folder / "model_best.pth.tar"} (best), {folder / "last.pth.tar"} (last).')
    report.finish(
        model=run.args.model, num_classes=run.info.num_classes, parameters=run.parameters, device=run.world.device,
        world_size=run.world.size, precision=trainer.precision.description, batch_size=run.batch_size,
        seconds=run.seconds, images_per_second=trainer.throughput.images_per_second, evaluation=evaluation,
        train_loss=setup.describe_train_loss(run.args),
        skipped_steps=trainer.precision.skipped_steps, bad_image_count=len(bad_images), bad_images=sorted(bad_images))
    if run.args.push_to_hub:
        publish(run, folder)


def publish(run: Run, folder: Path) -> None:
    """Export the best weights into the run's folder and upload them."""
    best, args = folder / 'model_best.pth.tar', run.args
    exported = hub.export(
        best if best.is_file() else folder / 'last.pth.tar', folder / args.push_to_hub.rpartition('/')[2],
        target='npu' if args.model == OUR_MODEL else 'timm', ema=args.model_ema and not args.model_ema_force_cpu)
    try:
        _logger.info(f'Published: {hub.push(exported, args.push_to_hub)}')
    except UserError as error:
        raise UserError(f'{error} The training is complete; `timm-npu-irv2 hub push {exported} '
                        f'{args.push_to_hub}` publishes it later.') from error


if __name__ == '__main__':
    sys.exit(run_script('train.py', main, sys.argv[1:]))

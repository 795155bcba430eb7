#!/usr/bin/env python3
"""Train Inception-ResNet-v2, or any timm model, on NPU, CUDA or CPU.

    python train_scripts/train.py --data-dir DIR [options]                          # one device
    torchrun --nproc-per-node 8 train_scripts/train.py --data-dir DIR [options]     # eight
    python train_scripts/train.py --data DIR --multiprocessing-distributed --device-list '0,1' [options]

The options are those of timm's train.py, the parameters of Ascend ModelZoo's script, and what an NPU needs: --help.
"""

import contextlib
import logging
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config
from timm.utils import random_seed

from timm_npu_irv2 import device as devices
from timm_npu_irv2 import hub
from timm_npu_irv2.cli.flags import OUR_MODEL
from timm_npu_irv2.cli.parser import as_yaml
from timm_npu_irv2.cli.script import run_script, start_log
from timm_npu_irv2.distributed import (
    StopRequest,
    World,
    device_name,
    from_primary,
    gather_objects,
    initialize,
    launch,
    launches,
    may_restart,
    restarted,
    shutdown,
)
from timm_npu_irv2.errors import Stopped, UserError
from timm_npu_irv2.serialization import atomic_write
from timm_npu_irv2.training import checkpoint, setup
from timm_npu_irv2.training.engine import Position, Trainer, evaluate
from timm_npu_irv2.training.loaders import build_eval_loader, build_train_loader
from timm_npu_irv2.training.options import parse_args
from timm_npu_irv2.training.output_dir import output_dir
from timm_npu_irv2.training.report import Progress, Report
from timm_npu_irv2.training.saver import CheckpointSaver, find_newest

_logger = logging.getLogger('train')


@dataclass
class Run:
    """What the functions below share."""

    args: Namespace
    world: World
    trainer: Trainer
    eval_loader: Any
    epochs: int
    image_size: int
    parameters: int
    metric: str  # what the best checkpoint is chosen by
    started: float
    seconds_before: float = 0.0  # what the run took before it was interrupted
    bad_images_before: dict[str, str] = field(default_factory=dict)  # and met

    @property
    def seconds(self) -> float:
        """Since the beginning of the run, interruptions not counted."""
        return self.seconds_before + time.monotonic() - self.started

    @property
    def loaders(self) -> list[Any]:
        """Of training and, if there is one, of validation."""
        return [self.trainer.loader, *([self.eval_loader] if self.eval_loader is not None else [])]

    def bad_images(self) -> dict[str, str]:
        """The images that could not be read, with the reasons; rank 0 learns of all. Called by every process."""
        own = {name: reason for loader in self.loaders for name, reason in loader.bad_images.items()}
        every = [self.bad_images_before, *gather_objects(own, self.world)]
        return {name: reason for met in every for name, reason in met.items()}

    def to_go_on(self) -> dict[str, Any]:
        """What a checkpoint holds of the run besides the trainer's state. Called by every process."""
        return {'seconds': self.seconds, 'bad_images': self.bad_images()}

    @property
    def batch_size(self) -> int:
        """Images in an update, of all processes together."""
        return round(self.trainer.loader.average_batch_size * self.world.size * self.args.grad_accum_steps)


def main(argv: Sequence[str]) -> int:
    """Read the options, become one process of the run (or start them all), and train."""
    started = time.monotonic()
    args = parse_args(argv)
    if launches(args):
        return launch(args, __file__, argv)
    options = as_yaml(args)  # as given, before anything is worked out from them
    if may_restart() and not args.experiment:
        raise UserError('--max-restarts needs --experiment, which names the folder that a restart goes on in.')
    setup.global_options(args)
    world = initialize(
        device_name(args), dist_url=args.dist_url, backend=args.dist_backend, addr=args.addr, rank=args.rank,
        world_size=None if args.multiprocessing_distributed else args.world_size)
    try:
        run_in(world, args, options, started)
    finally:
        shutdown(world)
    return 0


def run_in(world: World, args: Namespace, options: str, started: float) -> None:
    """The run, or this process's part of it. When this returns, nothing of it is left but its files."""
    start_log(world.is_primary)
    devices.configure(world.device, args.allow_internal_format or None, args.jit_compile)
    stopping = StopRequest(world) if args.epochs else contextlib.nullcontext()  # an evaluation has nothing to save
    advice = '--resume auto goes on from the newest checkpoint.'
    translations = setup.translate_out_of_memory(args, world), setup.translate_lost_process_errors(world, advice)
    with translations[0], translations[1], stopping as stop:
        run = assemble(args, world, stop, started)
        with output_dir(args, run.image_size, world) as folder, closing_all(run.loaders):
            train(run, folder, options)


def assemble(args: Namespace, world: World, stop: StopRequest | None, started: float) -> Run:
    """Make everything that training needs, in the only order that works."""
    args.batch_size = setup.per_process_batch_size(args, world)
    random_seed(args.seed)  # the same initial weights in every process
    model = setup.build_model(args)
    parameters = sum(p.numel() for p in model.parameters())
    data_config = resolve_data_config(vars(args), model=model)
    model = setup.place_model(model, args, world)
    precision = setup.build_precision(args, world)

    common = dict(num_classes=args.num_classes, dtype=precision.input_dtype)
    train_loader = build_train_loader(args, data_config, world, batch_size=args.batch_size, **common)
    eval_loader = None
    if args.val_split:
        eval_loader = build_eval_loader(
            args, data_config, world, split=args.val_split, num_samples=args.val_num_samples,
            batch_size=args.validation_batch_size or args.batch_size, train_loader=train_loader, **common)
    metric = args.eval_metric if eval_loader is not None else 'loss'

    task = setup.build_task(model, args, world)
    module = task.get_trainable_module()
    optimizer = setup.build_optimizer(module, args, world, train_loader.average_batch_size)
    task.trainable_module, optimizer = precision.prepare(module, optimizer)
    setup.setup_ema(task, precision, args)
    updates_per_epoch = -(-len(train_loader) // args.grad_accum_steps)
    scheduler, epochs = setup.build_scheduler(optimizer, args, updates_per_epoch, metric == 'loss')
    random_seed(args.seed, world.rank)  # different dropout in every process

    settings = setup.train_settings(args, train_loader.average_batch_size)
    trainer = Trainer(task, train_loader, optimizer, precision, world, scheduler, settings, stop)
    return Run(args, world, trainer, eval_loader, epochs, data_config['input_size'][-1], parameters, metric, started)


@contextlib.contextmanager
def closing_all(loaders: Sequence[Any]) -> Iterator[None]:
    """End the loaders' workers at the end of the block, whatever its reason."""
    try:
        yield
    finally:
        for loader in loaders:
            loader.close()


def train(run: Run, folder: Path, options: str) -> None:
    """Resume if asked to, train epoch by epoch, report."""
    args, world, trainer = run.args, run.world, run.trainer
    if args.push_to_hub and world.is_primary:
        hub.prepare(args.push_to_hub)  # what is wrong with the token is better known before the training than after it
    saver = CheckpointSaver(folder, args, world, decreasing=run.metric == 'loss')
    resume(run, saver)
    setup.compile_and_distribute(trainer.task, trainer.optimizer, args, world)
    report = Report(folder, trainer.position.epoch, run.metric)
    log_wandb = setup.start_wandb(args, folder.name) if world.is_primary else None
    if world.is_primary:
        atomic_write(folder / 'args.yaml', options)
    describe(run, folder)
    with contextlib.closing(Progress(run.epochs)) as progress, contextlib.closing(saver):
        if world.is_primary:
            trainer.on_log = progress.update
        trainer.on_recovery = lambda trainer: saver.save_recovery(trainer, run.to_go_on())
        trainer.last_good = saver.last_good
        trainer.images_folder = folder if args.save_images else None
        for epoch in range(trainer.position.epoch, run.epochs):
            trained = trainer.train_one_epoch()
            setup.distribute_batch_norm(trainer.task, args, world)
            due = (epoch + 1) % args.val_interval == 0 or epoch + 1 == run.epochs
            validated = validate(run) if due else None
            if world.is_primary:
                row = report.add_epoch(epoch, trained, validated)
                progress.epoch_done(row)
                log_wandb(row)
            end_epoch(run, saver, epoch, (validated or trained)[run.metric] if due else None)
        saver.wait()
    finish(run, folder, report, saver, validate(run) if args.epochs == 0 else None)


def resume(run: Run, saver: CheckpointSaver) -> None:
    """Go to where --resume or --start-epoch says; to the beginning if '--resume auto' finds nothing."""
    args, trainer = run.args, run.trainer
    path = checkpoint_to_resume(run, saver.folder)
    if path is not None:
        state = checkpoint.resume(trainer, path, args)
        run.seconds_before = state.get('seconds', 0.0)
        run.bad_images_before = state.get('bad_images', {})
        saver.load_state_dict(state.get('saver', {}), path)
    if args.start_epoch is not None:
        trainer.position = Position(args.start_epoch, 0, args.start_epoch * trainer.updates_per_epoch)
    setup.fast_forward(trainer.scheduler, trainer.position)


def checkpoint_to_resume(run: Run, folder: Path) -> Path | None:
    """--resume's file, or for 'auto' and after a restart the newest in the folder, as rank 0 sees it."""
    args = run.args
    named = Path(args.resume) if args.resume and args.resume != 'auto' else None
    if args.resume != 'auto' and not restarted():
        return named
    newest = from_primary(find_newest(folder) if run.world.is_primary else None, run.world)
    if restarted() and newest is not None:  # what these options meant is done
        args.start_epoch, args.no_resume_opt = None, False
    _logger.info(f"Resuming by itself: {newest or named or 'there is no checkpoint, so this is a new run'}.")
    return newest or named


def end_epoch(run: Run, saver: CheckpointSaver, epoch: int, metric: float | None) -> None:
    """The next epoch's learning rate, a checkpoint if one is due, and the question whether to stop here."""
    trainer = run.trainer
    if trainer.scheduler is not None:
        trainer.scheduler.step(epoch + 1, metric)
    if metric is not None:
        saver.save_epoch(trainer, epoch, metric, run.to_go_on())
    if (number := trainer.stop.poll()) and epoch + 1 < run.epochs:
        if metric is None:
            trainer.on_recovery(trainer)
        raise Stopped(number, saver.last_good())


def validate(run: Run) -> dict[str, float] | None:
    """Evaluate the weights, and their moving average where there is one, whose figures then count."""
    if run.eval_loader is None:
        return None
    task, precision, args = run.trainer.task, run.trainer.precision, run.args
    measured = None
    for ema in (False, True) if task.has_ema() and not args.model_ema_force_cpu else (False,):
        before, measured = measured, evaluate(
            task.get_eval_model(ema=ema), run.eval_loader, run.world, autocast=precision.autocast, tta=args.tta)
        if before is not None:
            _logger.info(f'Validation of the weights themselves: top-1 {before["top1"]:.2f} %; of their average: '
                         f'{measured["top1"]:.2f} %.')
    return measured


def describe(run: Run, folder: Path) -> None:
    """One line about what is about to happen."""
    trainer, where = run.trainer, f'{run.world.size} × {run.world.device.type}'
    _logger.info(
        f'{run.args.model}: {run.parameters / 1e6:.2f} M parameters, {run.args.num_classes} classes, '
        f'{run.image_size} px; {where}, {trainer.precision.description}; batch {run.batch_size}, '
        f'{type(trainer.optimizer).__name__}, learning rate {run.args.lr:.4g}; '
        f'epoch {trainer.position.epoch} of {run.epochs}; output in {folder}')


def finish(
        run: Run,
        folder: Path,
        report: Report,
        saver: CheckpointSaver,
        evaluation: dict[str, float] | None,
) -> None:
    """report.json, the curves, where the weights are, and the three lines that the zoo's scripts end with."""
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
        model=run.args.model, num_classes=run.args.num_classes, parameters=run.parameters, device=run.world.device,
        world_size=run.world.size, precision=trainer.precision.description, batch_size=run.batch_size,
        seconds=run.seconds, images_per_second=trainer.throughput.images_per_second, evaluation=evaluation,
        skipped_steps=trainer.precision.skipped_steps, bad_image_count=len(bad_images), bad_images=sorted(bad_images))
    if run.args.push_to_hub:
        publish(run, folder)


def publish(run: Run, folder: Path) -> None:
    """Export the best weights into the run's folder, and upload them."""
    best, args = folder / 'model_best.pth.tar', run.args
    exported = hub.export(
        best if best.is_file() else folder / 'last.pth.tar', folder / args.push_to_hub.rpartition('/')[2],
        target='npu' if args.model == OUR_MODEL else 'timm', ema=args.model_ema and not args.model_ema_force_cpu)
    try:
        _logger.info(f'Published: {hub.push(exported, args.push_to_hub)}')
    except UserError as error:
        raise UserError(f'{error} The training is complete; later, `python -m timm_npu_irv2.hub push {exported} '
                        f'{args.push_to_hub}` publishes it.') from error


if __name__ == '__main__':
    sys.exit(run_script('train.py', main, sys.argv[1:]))

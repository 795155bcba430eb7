"""One epoch of training.

Nothing in a training step waits for the device: loss and accuracy are added up in tensors on it, and read when a line
of the log is due. The clock is read there too, after waiting for the device, so that it measures finished work.
"""

import contextlib
import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torchvision.utils
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import device as devices
from ..data.samplers import preserve_rng_state
from ..distributed import StopRequest, World, is_lost_peer
from ..errors import Stopped, UserError, one_line
from ..precision import Precision
from ..recompute import frozen_statistics
from ..serialization import atomic_file
from .hidden_state import HiddenState
from .layout import Layout
from .metrics import Meter, Throughput

__all__ = ['BatchLoader', 'Diverged', 'Position', 'TrainSettings', 'Trainer']


# A dynamic loss scale starts at 65536 and halves at each overflow. After 40 halvings a gradient that is still not
# finite is not the scale's fault.
MAX_SKIPPED_IN_A_ROW = 40


class Diverged(UserError):
    """The loss or the weights became NaN or infinite, or every step has an overflow."""


@dataclass
class Position:
    """The point that a run has reached.

    Attributes:
        epoch: Index of the current epoch.
        batch: Batches of this epoch that have been trained on.
        updates: Optimizer updates since the beginning of the run.
    """

    epoch: int = 0
    batch: int = 0
    updates: int = 0


class BatchLoader(Protocol):
    """The loader that a trainer needs: batches of images and targets on the device, from any batch of an epoch on."""

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the epoch."""

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch of the next iteration and its first batch."""


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a training step.

    Attributes:
        grad_accum_steps: Batches whose gradients make one update.
        batch_size: Images of this process in a batch.
        epoch_samples: Samples in an epoch of all processes together; None where an epoch has no global order.
        lanes: Number of processes at the beginning of the run, for which shards are dealt out.
        clip_grad: Limit of the gradients; None for no clipping.
        clip_mode: 'norm', 'value' or 'agc', as in ``timm.utils.dispatch_clip_grad``.
        log_interval: Updates between two lines of the log.
        recovery_interval: Updates between two recovery checkpoints, 0 for none.
        synchronize_step: Wait for the device after each update.
        batch_size_reference: Batch size whose loss has weight 1.
        batch_size_power: Exponent of the batch size in the weight of its loss: 0 for equal weights, 0.5, or 1.
    """

    grad_accum_steps: int = 1
    batch_size: int = 1
    epoch_samples: int | None = None
    lanes: int | None = None
    clip_grad: float | None = None
    clip_mode: str = 'norm'
    log_interval: int = 50
    recovery_interval: int = 0
    synchronize_step: bool = False
    batch_size_reference: float = 1.0
    batch_size_power: float = 0.0


@dataclass(frozen=True)
class _Share:
    """The part of a batch in an update.

    Attributes:
        batches: Batches whose gradients make the update; fewer at the end of an epoch.
        is_last: True for the batch that ends the update.
    """

    batches: int
    is_last: bool


def _ignore(*_: Any) -> None:
    pass


@dataclass
class Trainer:
    """Everything that a training step needs.

    Attributes:
        task: timm's training task: model, loss, EMA.
        loader: Batches of this process.
        optimizer: Optimizer that ``precision.prepare`` returned.
        precision: Casts, loss scale and step.
        world: This process among all.
        scheduler: timm's scheduler, stepped after each update here, and after each epoch by the caller.
        settings: Further options of a step.
        stop: Signal handler, polled after each update.
        on_log: Function called on every process with the figures of a log line.
        on_recovery: Function called on every process to save a checkpoint in mid-epoch.
        last_good: Function that returns the name of the newest checkpoint, for messages.
        images_folder: Folder for a picture of the batch at each log line; None for none.
        position: Point that the run has reached, kept up to date.
    """

    task: TrainingTask
    loader: BatchLoader
    optimizer: torch.optim.Optimizer
    precision: Precision
    world: World
    scheduler: Any = None
    settings: TrainSettings = field(default_factory=TrainSettings)
    stop: StopRequest | None = None
    on_log: Callable[[dict[str, Any]], None] = _ignore
    on_recovery: Callable[['Trainer'], None] = _ignore
    last_good: Callable[[], str] = lambda: 'none was saved'
    images_folder: Path | None = None
    position: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        self.throughput = Throughput(self.world)
        self.meter = Meter(self.world)
        self.hidden_state = HiddenState(
            {'optimizer': self.optimizer, 'scheduler': self.scheduler, 'ema': self.ema, 'task': self.task},
            self.world.device)
        self._clipping = self._clip_arguments()
        self.resumed_from: Path | None = None  # until the first step from there
        self._logged_update = -1
        self._buckets_arranged = False

    @property
    def module(self) -> nn.Module:
        """Module that is trained."""
        return cast(nn.Module, self.task.get_trainable_module())

    @property
    def ema(self) -> Any:
        """Moving average of the weights (timm's ModelEmaV3), or None."""
        return self.task.get_trainable_module(ema=True)

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates in an epoch; the last may be of fewer batches."""
        return -(-len(self.loader) // self.settings.grad_accum_steps)

    @property
    def layout(self) -> Layout:
        """Division of an update among the processes."""
        settings = self.settings
        return Layout(self.world.size, settings.batch_size, settings.grad_accum_steps, settings.epoch_samples,
                      settings.lanes)

    @property
    def learning_rate(self) -> float:
        """Mean learning rate of the parameter groups."""
        rates = [group['lr'] for group in self.optimizer.param_groups]
        return sum(rates) / len(rates)

    def train_one_epoch(self) -> dict[str, float]:
        """Train from ``position`` to the end of its epoch, and move ``position`` to the next one.

        Returns:
            'loss', 'top1' in percent, 'images_per_second' and 'lr' of the whole epoch, over all processes.

        Raises:
            Diverged: The loss was NaN or infinite when it was last read, or the loss scale skips every step.
            Stopped: The process was asked to stop; a recovery checkpoint is saved.
        """
        self._start_epoch()
        first_batch = self.position.batch
        for images, target in self.loader:
            self._arrange_buckets(images, target)
            self.position.batch += 1
            share = self._accumulation_share()
            with contextlib.nullcontext() if share.is_last else self.task.no_sync():
                with self.precision.autocast():
                    result = self.task(images, target)  # forward, loss
                self.meter.update(result['loss'], result['output'], target)
                self.throughput.count(images.shape[0])
                loss = self._weighted(result['loss'], images.shape[0], share)
                with self._naming_checkpoint() if self.resumed_from else contextlib.nullcontext():
                    self.precision.step(  # backward; at the end of an update also clipping and the optimizer's step
                        loss, self.optimizer, need_update=share.is_last, **self._clipping)
            if share.is_last:
                self.resumed_from = None
                self.optimizer.zero_grad()
                self.position.updates += 1
                self._update_ema()
                if self.settings.synchronize_step:
                    devices.synchronize(self.world.device)
                if self.scheduler is not None:
                    self.scheduler.step_update(self.position.updates)
                self._check_overflow()
                self._log_if_due(images, is_first=self.position.batch - first_batch <= self.settings.grad_accum_steps)
                self._save_and_stop_if_due()
        return self._end_epoch()

    @contextlib.contextmanager
    def _naming_checkpoint(self) -> Iterator[None]:
        """Turn an error of the optimizer in the first step of a resumed run, which its state causes, into one line."""
        try:
            yield
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
            frames = traceback.walk_tb(error.__traceback__)
            in_optimizer = any(isinstance(frame.f_locals.get('self'), Optimizer) for frame, _ in frames)
            if not in_optimizer or devices.is_out_of_memory(error) or is_lost_peer(error):
                raise  # of the backward pass, which may also have to compile it
            raise UserError(f'{self.resumed_from}: the first step with the state of its optimizer failed: '
                            f'{one_line(error)}; --no-resume-opt starts a new optimizer from its weights.') from error

    def _start_epoch(self) -> None:
        self.loader.set_epoch(self.position.epoch, self.position.batch)
        self.module.train()
        self.throughput.start_epoch()
        self.optimizer.zero_grad()

    def _end_epoch(self) -> dict[str, float]:
        if hasattr(self.optimizer, 'sync_lookahead'):
            self.optimizer.sync_lookahead()
        self._log()
        _, averages = self.meter.read()
        self.position = Position(self.position.epoch + 1, 0, self.position.updates)
        self.meter = Meter(self.world)
        return {**averages, 'images_per_second': self.throughput.of_epoch, 'lr': self.learning_rate}

    def _arrange_buckets(self, images: Tensor, target: Tensor) -> None:
        """Put DDP's buckets into the order they had when the run was interrupted, before its first batch.

        DDP rearranges gradients after a process's first backward pass, in the order in which they came, and the
        rounding of a sum over three or more processes depends on the place in a bucket. So this is such a pass, of
        which nothing else remains.
        """
        if self._buckets_arranged:
            return
        self._buckets_arranged = True
        if self.world.size < 3 or self.position.updates == 0:
            return
        with preserve_rng_state(self.world.device), frozen_statistics(self.module):
            with self.precision.autocast():
                loss = self.task(images, target)['loss']
            loss.backward()
        held = {parameter for group in self.optimizer.param_groups for parameter in group['params']}
        for parameter in self.module.parameters():
            if parameter not in held:  # the optimizer has its master instead
                parameter.grad = None
        self.optimizer.zero_grad()

    def _accumulation_share(self) -> _Share:
        steps, done, total = self.settings.grad_accum_steps, self.position.batch, len(self.loader)
        return _Share(min(steps, total - (done - 1) // steps * steps), done % steps == 0 or done == total)

    def _weighted(self, loss: Tensor, batch_size: int, share: _Share) -> Tensor:
        """Return the loss with the weight of its batch size, as its part of the update's mean."""
        relative_size = batch_size / self.settings.batch_size_reference
        weight = relative_size ** self.settings.batch_size_power / share.batches
        return loss * weight if weight != 1 else loss

    def _clip_arguments(self) -> dict[str, Any]:
        """Return the arguments of ``precision.step`` that do not change from step to step."""
        mode = self.settings.clip_mode
        clips = self.settings.clip_grad is not None
        return {
            'parameters': list(self.task.get_clip_parameters(exclude_head=mode == 'agc')) if clips else None,
            'clip_grad': self.settings.clip_grad,
            'clip_mode': mode,
            'create_graph': getattr(self.optimizer, 'is_second_order', False),
        }

    def _update_ema(self) -> None:
        if self.ema is not None:
            self.ema.update(self.precision.float32_model(self.module), step=self.position.updates)

    def _check_overflow(self) -> None:
        skipped = self.precision.skipped_in_a_row
        if skipped >= MAX_SKIPPED_IN_A_ROW:
            raise self.diverged(f'an overflow in each of the last {skipped} steps')

    @property
    def _update_of_epoch(self) -> int:
        """Updates of this epoch so far."""
        return -(-self.position.batch // self.settings.grad_accum_steps)

    def _log_if_due(self, images: Tensor, is_first: bool) -> None:
        if not is_first and self._update_of_epoch % self.settings.log_interval != 0:
            return
        self._log()
        if self.images_folder is not None and self.world.is_primary:
            path = self.images_folder / f'train-batch-{self.position.batch - 1}.jpg'
            channels = 3 if images.shape[1] >= 3 else 1  # JPEG has no transparency
            with atomic_file(path) as file:
                torchvision.utils.save_image(
                    images[:, :channels].float(), file, format='JPEG', padding=0, normalize=True)

    def _log(self) -> None:
        """Read the meter and the clock for a line of the log, unless this was just done."""
        if self._logged_update == self.position.updates:
            return
        self._logged_update = self.position.updates
        images_per_second = self.throughput.lap()
        recent, averages = self.meter.read()
        if not math.isfinite(averages['loss']):
            raise self.diverged(f'the loss is {recent["loss"]}')
        self.on_log({
            **asdict(self.position), 'batches': len(self.loader), **recent, 'loss_avg': averages['loss'],
            'top1_avg': averages['top1'], 'images_per_second': images_per_second, 'lr': self.learning_rate})

    def _save_and_stop_if_due(self) -> None:
        """Save a recovery checkpoint if it is time for one, or if the process is asked to stop."""
        interval = self.settings.recovery_interval
        signal_number = self.stop.poll() if self.stop is not None else 0
        is_due = interval and self._update_of_epoch % interval == 0 and self.position.batch < len(self.loader)
        if signal_number or is_due:
            self._log()
            self.on_recovery(self)
            self.throughput.skip()
        if signal_number:
            raise Stopped(signal_number, self.last_good())

    def diverged(self, reason: str) -> Diverged:
        """Return the error that says what is no longer finite, where, and which checkpoint to continue from."""
        return Diverged(
            f'{reason} in epoch {self.position.epoch}, batch {self.position.batch} or before (update '
            f'{self.position.updates}, learning rate {self.learning_rate:.4g}); last good checkpoint: '
            f'{self.last_good()}. Lower --lr or --loss-scale, or try --amp-dtype bfloat16.')

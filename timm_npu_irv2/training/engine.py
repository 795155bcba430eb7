"""One epoch of training, and one evaluation.

Nothing in a training step waits for the device: loss and accuracy are added up in tensors on it, and read when a line
of the log is due. The clock is read there too, after waiting for the device, so what it measures is what was done.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision.utils
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import device as devices
from ..data.samplers import preserve_rng_state
from ..distributed import StopRequest, World, sum_over_ranks
from ..errors import Stopped, UserError
from ..layers import frozen_statistics
from ..precision import Precision
from ..serialization import atomic_file

__all__ = ['Diverged', 'Meter', 'Position', 'Throughput', 'TrainSettings', 'Trainer', 'evaluate']


# A dynamic loss scale starts at 65536 and halves at each overflow: 40 halvings further, whatever gradient is still not
# finite does not owe it to the scale.
MOST_SKIPPED_IN_A_ROW = 40


class Diverged(UserError):
    """The loss or the weights became NaN or infinite, or every step has an overflow."""


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        epoch: The epoch it is in.
        batch: Batches it has trained on in this epoch.
        updates: Optimizer updates since the beginning.
    """

    epoch: int = 0
    batch: int = 0
    updates: int = 0


class Meter:
    """Mean loss and top-1 accuracy of the training batches of an epoch, kept on the device.

    The sums are read, never reset, so when they are read has no influence on them, not even on the last bit.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._loss = torch.zeros((), device=world.device)
        self._hits = torch.zeros((), device=world.device, dtype=torch.int64)
        self._count = 0
        self._last = torch.zeros(3, dtype=torch.float64)

    def update(self, loss: Tensor, output: Tensor, target: Tensor) -> None:
        """Add a batch: its mean loss, its logits, and its class indices or distributions over classes."""
        classes = target.argmax(dim=1) if target.ndim > 1 else target
        self._loss.add_(loss.detach(), alpha=output.shape[0])
        self._hits.add_((output.detach().argmax(dim=1) == classes).sum())
        self._count += output.shape[0]

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Loss and top-1 in percent of all processes, since the last reading and of the epoch. Waits for the device."""
        own = [self._loss.item(), self._hits.item(), self._count]
        sums = sum_over_ranks(torch.tensor(own, dtype=torch.float64), self._world)
        new, self._last = sums - self._last, sums
        return self._means(new), self._means(sums)

    @staticmethod
    def _means(sums: Tensor) -> dict[str, float]:
        loss, hits, count = sums.tolist()
        return {'loss': loss / max(count, 1), 'top1': 100 * hits / max(count, 1)}

    def state_dict(self) -> dict[str, float]:
        """This process's sums, for a checkpoint in mid-epoch."""
        return {'loss': self._loss.item(), 'hits': self._hits.item(), 'count': self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._loss.fill_(state['loss'])
        self._hits.fill_(state['hits'])
        self._count = state['count']
        self._last = sum_over_ranks(torch.tensor([state['loss'], state['hits'], state['count']], dtype=torch.float64),
                                    self._world)


class Throughput:
    """Images a second of all processes, without the first lap of an epoch, in which loaders start and devices warm up.

    Attributes:
        images, seconds: What the other laps add up to, since the beginning of the run.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.images, self.seconds = 0, 0.0
        self._at_epoch_start = (0, 0.0)
        self._lap_images, self._lap_start = 0, math.nan

    def start_epoch(self) -> None:
        """Begin an epoch with a lap that does not count."""
        self._at_epoch_start = (self.images, self.seconds)
        self._lap_images, self._lap_start = 0, math.nan

    def count(self, images: int) -> None:
        """Images that this process has trained on."""
        self._lap_images += images * self._world.size

    def lap(self) -> float:
        """End a lap; its images a second, 0 for the first. Waits for the device."""
        devices.synchronize(self._world.device)
        now = time.perf_counter()
        images, seconds = self._lap_images, now - self._lap_start
        self._lap_images, self._lap_start = 0, now
        if math.isnan(seconds):
            return 0.0
        self.images += images
        self.seconds += seconds
        return images / seconds

    def skip(self) -> None:
        """Leave out the time since the last lap, in which something else was done."""
        self._lap_start += time.perf_counter() - self._lap_start

    @property
    def of_epoch(self) -> float:
        """Images a second since :meth:`start_epoch`."""
        images, seconds = self._at_epoch_start
        return (self.images - images) / (self.seconds - seconds) if self.seconds > seconds else 0.0

    @property
    def images_per_second(self) -> float:
        """The mean of the whole run."""
        return self.images / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class TrainSettings:
    """What the options say about a step.

    Attributes:
        grad_accum_steps: Batches that make an update.
        clip_grad, clip_mode: timm's; no clipping if None.
        log_interval: Updates between two readings of the meter.
        recovery_interval: Updates between two recovery checkpoints, 0 for none.
        synchronize_step: Wait for the device after each update.
        batch_size_reference: The batch size whose loss has weight 1, and
        batch_size_power: how weight grows with the batch: 0 not at all, 0.5 by the root, 1 linearly.
    """

    grad_accum_steps: int = 1
    clip_grad: float | None = None
    clip_mode: str = 'norm'
    log_interval: int = 50
    recovery_interval: int = 0
    synchronize_step: bool = False
    batch_size_reference: float = 1.0
    batch_size_power: float = 0.0


def _nothing(*_: Any) -> None:
    pass


@dataclass
class Trainer:
    """Everything that a training step touches.

    Attributes:
        task: timm's training task: model, loss, EMA.
        loader: Batches on the device, with ``set_epoch(epoch, start_batch)``; its length is that of a whole epoch.
        optimizer: The optimizer that ``precision.prepare`` returned.
        precision: What casts, scales and steps.
        world: This process among all.
        scheduler: timm's, stepped after each update here; after each epoch by the caller.
        settings: Further options.
        stop: Polled after each update.
        on_log: Called on every process with the figures of a line of the log.
        on_recovery: Called on every process to save a checkpoint in mid-epoch.
        last_good: Names the newest checkpoint, for messages.
        images_folder: Where a batch of images goes with each line of the log, if anywhere.
        position: How far the run has come; kept up to date.
    """

    task: TrainingTask
    loader: Iterable
    optimizer: torch.optim.Optimizer
    precision: Precision
    world: World
    scheduler: Any = None
    settings: TrainSettings = field(default_factory=TrainSettings)
    stop: StopRequest | None = None
    on_log: Callable[[dict[str, Any]], None] = _nothing
    on_recovery: Callable[['Trainer'], None] = _nothing
    last_good: Callable[[], str] = lambda: 'none was saved'
    images_folder: Path | None = None
    position: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        self.throughput = Throughput(self.world)
        self.meter = Meter(self.world)
        self._clipped = self._clip_parameters()
        self._logged = -1
        self._buckets_arranged = False

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates in an epoch; the last may be of fewer batches."""
        return -(-len(self.loader) // self.settings.grad_accum_steps)

    @property
    def learning_rate(self) -> float:
        """The mean over the parameter groups."""
        rates = [group['lr'] for group in self.optimizer.param_groups]
        return sum(rates) / len(rates)

    def train_one_epoch(self) -> dict[str, float]:
        """Train from ``position`` to the end of its epoch, and move ``position`` to the next one.

        Returns:
            Mean loss, top-1 in percent, images a second and learning rate of the whole epoch, over all processes.

        Raises:
            Diverged: The loss was NaN or infinite when it was last read, or the loss scale skips every step.
            Stopped: The process was asked to stop; a recovery checkpoint is saved.
        """
        self.loader.set_epoch(self.position.epoch, self.position.batch)
        self.task.get_trainable_module().train()
        self.throughput.start_epoch()
        self.optimizer.zero_grad()
        begin = self.position.batch
        for images, target in self.loader:
            if not self._buckets_arranged:
                self._arrange_buckets(images, target)
            self.position.batch += 1
            if self._batch(images, target):
                self._after_update(images, first=self.position.batch - begin <= self.settings.grad_accum_steps)
        if hasattr(self.optimizer, 'sync_lookahead'):
            self.optimizer.sync_lookahead()
        self._log()
        _, averages = self.meter.read()
        self.position = Position(self.position.epoch + 1, 0, self.position.updates)
        self.meter = Meter(self.world)
        return {**averages, 'images_per_second': self.throughput.of_epoch, 'lr': self.learning_rate}

    def _arrange_buckets(self, images: Tensor, target: Tensor) -> None:
        """Before the first batch of a resumed run: have DDP's buckets as they were when the run was interrupted.

        DDP arranges gradients anew after a process's first backward pass, in the order in which they came, and how a
        sum over three or more processes is rounded depends on where in a bucket it is. So this is such a pass, of which
        nothing else remains.
        """
        self._buckets_arranged = True
        if self.world.size < 3 or self.position.updates == 0:
            return
        module = self.task.get_trainable_module()
        with preserve_rng_state(self.world.device), frozen_statistics(module):
            with self.precision.autocast():
                loss = self.task(images, target)['loss']
            loss.backward()
        held = {parameter for group in self.optimizer.param_groups for parameter in group['params']}
        for parameter in module.parameters():
            if parameter not in held:  # it has a master there
                parameter.grad = None
        self.optimizer.zero_grad()

    def _batch(self, images: Tensor, target: Tensor) -> bool:
        """Train on one batch; whether it ended an update."""
        steps, done = self.settings.grad_accum_steps, self.position.batch
        accumulated = min(steps, len(self.loader) - (done - 1) // steps * steps)  # fewer at the end of the epoch
        updates = done % steps == 0 or done == len(self.loader)
        with contextlib.nullcontext() if updates else self.task.no_sync():
            self._forward_backward(images, target, accumulated, updates)
        if updates:
            self.optimizer.zero_grad()
            self.position.updates += 1
            self._update_ema()
            if self.settings.synchronize_step:
                devices.synchronize(self.world.device)
        return updates

    def _forward_backward(self, images: Tensor, target: Tensor, accumulated: int, updates: bool) -> None:
        with self.precision.autocast():
            result = self.task(images, target)
        self.meter.update(result['loss'], result['output'], target)
        self.throughput.count(images.shape[0])
        weight = (images.shape[0] / self.settings.batch_size_reference) ** self.settings.batch_size_power / accumulated
        self.precision.step(
            result['loss'] * weight if weight != 1 else result['loss'],
            self.optimizer,
            parameters=self._clipped,
            clip_grad=self.settings.clip_grad,
            clip_mode=self.settings.clip_mode,
            create_graph=getattr(self.optimizer, 'is_second_order', False),
            need_update=updates,
        )

    def _after_update(self, images: Tensor, first: bool) -> None:
        """Learning rate, log, recovery checkpoint, and the question whether to stop."""
        if self.scheduler is not None:
            self.scheduler.step_update(self.position.updates)
        if self.precision.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise self.diverged(f'an overflow in each of the last {self.precision.skipped_in_a_row} steps')
        update = -(-self.position.batch // self.settings.grad_accum_steps)
        if first or update % self.settings.log_interval == 0:
            self._log()
            self._save_images(images)
        interval = self.settings.recovery_interval
        stop = self.stop.poll() if self.stop is not None else 0
        if stop or (interval and update % interval == 0 and self.position.batch < len(self.loader)):
            self._log()
            self.on_recovery(self)
            self.throughput.skip()
        if stop:
            raise Stopped(stop, self.last_good())

    def _log(self) -> None:
        """Read the meter and the clock for a line of the log, unless this was just done."""
        if self._logged == self.position.updates:
            return
        self._logged = self.position.updates
        images_per_second = self.throughput.lap()
        recent, averages = self.meter.read()
        if not math.isfinite(averages['loss']):
            raise self.diverged(f'the loss is {recent["loss"]}')
        self.on_log({
            **asdict(self.position), 'batches': len(self.loader), **recent, 'loss_avg': averages['loss'],
            'top1_avg': averages['top1'], 'images_per_second': images_per_second, 'lr': self.learning_rate})

    def diverged(self, what: str) -> Diverged:
        """The error that says what is no longer finite, where, and what to go on from."""
        return Diverged(
            f'{what} in epoch {self.position.epoch}, batch {self.position.batch} or before (update '
            f'{self.position.updates}, learning rate {self.learning_rate:.4g}); last good checkpoint: '
            f'{self.last_good()}. Lower --lr or --loss-scale, or try --amp-dtype bfloat16.')

    def _save_images(self, images: Tensor) -> None:
        folder = self.images_folder
        if folder is not None and self.world.is_primary:
            path = folder / f'train-batch-{self.position.batch - 1}.jpg'
            with atomic_file(path) as file:
                torchvision.utils.save_image(images.float(), file, format='JPEG', padding=0, normalize=True)

    def _update_ema(self) -> None:
        ema = self.task.get_trainable_module(ema=True)
        if ema is not None:
            ema.update(self.precision.float32_model(self.task.get_trainable_module()), step=self.position.updates)

    def _clip_parameters(self) -> list[nn.Parameter] | None:
        if self.settings.clip_grad is None:
            return None
        return list(self.task.get_clip_parameters(exclude_head=self.settings.clip_mode == 'agc'))


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: Iterable,
        world: World,
        *,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        tta: int = 0,
        on_batch: Callable[[int, Tensor, Tensor], None] = _nothing,
) -> dict[str, float]:
    """Loss and accuracy over every image of the loader, over all processes; each counts once.

    Args:
        model: Logits (N, C) from images (N, 3, H, W). Left in evaluation mode.
        loader: This process's batches of images and class indices, on the device. Processes may have different numbers.
        world: This process among all.
        loss_fn: The mean loss of a batch.
        autocast: The context of the forward pass.
        tta: Average the logits of this many images in a row, which are views of one; 0 or 1 for none.
        on_batch: Called with the batch's index, its logits and its targets.

    Returns:
        'loss', 'top1' and 'top5' in percent, and 'count'. Hits are counted in integers, so top1 and top5 depend neither
        on the number of processes nor on the batch size.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module  # whose forward would wait for processes that have fewer batches
    model.eval()
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    hits: list[Tensor] = []
    losses: list[Tensor] = []
    sizes: list[int] = []
    for index, (images, labels) in enumerate(loader):
        with autocast():
            output = model(images.to(dtype))
        output = output[0] if isinstance(output, tuple | list) else output
        target = labels
        if tta > 1:
            output, target = output.unfold(0, tta, tta).mean(dim=2), labels[::tta]
        losses.append(loss_fn(output.float(), target))
        hits.append(_hits(output, target))
        sizes.append(len(target))
        on_batch(index, output, target)
    return _metrics(losses, hits, sizes, world)


def _hits(output: Tensor, target: Tensor) -> Tensor:
    """How many targets are the first, and among the first five, logits of their row; int64 (2,)."""
    ranked = output.topk(min(5, output.shape[1]), dim=1).indices == target.unsqueeze(1)
    return torch.stack((ranked[:, 0].sum(), ranked.sum()))


def _metrics(losses: list[Tensor], hits: list[Tensor], sizes: list[int], world: World) -> dict[str, float]:
    """Sums over batches and processes, on the host, where float64 and integers are exact everywhere."""
    count = torch.tensor(sizes, dtype=torch.float64)
    loss = torch.stack(losses).cpu().double() @ count if losses else torch.zeros((), dtype=torch.float64)
    ranked = torch.stack(hits).cpu().sum(0) if hits else torch.zeros(2, dtype=torch.int64)
    loss_sum = float(sum_over_ranks(loss, world))
    top1, top5, total = sum_over_ranks(torch.cat((ranked, torch.tensor([sum(sizes)]))), world).tolist()
    return {
        'loss': loss_sum / max(total, 1),
        'top1': 100 * top1 / max(total, 1),
        'top5': 100 * top5 / max(total, 1),
        'count': total,
    }

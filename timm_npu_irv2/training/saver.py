"""The checkpoints in a run's folder: their names, the ones that are kept, and the newest one that is intact."""

import logging
import math
import operator
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..distributed import World, on_primary
from ..errors import CannotWrite, UserError
from ..serialization import EXTENSION, atomic_link, peek_checkpoint, read_checkpoint, stage_checkpoint
from .checkpoint import RunInfo, training_state
from .engine import Trainer

__all__ = ['CheckpointSaver', 'checkpoints_in', 'find_newest']

_logger = logging.getLogger(__name__)
State = dict[str, Any]

DAMAGED = (math.inf, 0, 0)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints that a run can continue from, by name."""
    patterns = ('last', 'recovery-*', 'checkpoint-*')
    return sorted(path for pattern in patterns for path in folder.glob(pattern + EXTENSION))


def find_newest(folder: Path) -> Path | None:
    """Return the newest intact checkpoint in ``folder``, or None. Damaged ones are named in the log."""
    seen: set[int] = set()
    for path in sorted(checkpoints_in(folder), key=lambda path: (_progress(path), path.name), reverse=True):
        try:
            if (number := path.stat().st_ino) in seen:
                continue
            seen.add(number)
            read_checkpoint(path)
            return path
        except OSError as error:
            _logger.warning(f'{path}: {error.strerror}. Falling back to the previous checkpoint.')
        except UserError as error:
            _logger.warning(f'{error} Falling back to the previous checkpoint.')
    return None


def _progress(path: Path) -> tuple[float, int, int]:
    """Return a key that sorts checkpoints by what is stored inside; clocks and copies have no influence.

    It is the number of times that the run had been resumed, then the position. So after a run went back to an earlier
    checkpoint, its new ones count as newer than those it had left behind. A damaged file comes last.
    """
    content = peek_checkpoint(path)
    if content is None:
        return DAMAGED
    position = content.get('training', {}).get('position', {'epoch': content.get('epoch', -1) + 1, 'batch': 0})
    return content.get('saver', {}).get('resumptions', 0), position['epoch'], position['batch']


class CheckpointSaver:
    """A writer of ``last``, ``model_best``, the best ``checkpoint-N`` and two ``recovery-N-M``; the names are timm's.

    Every process calls its methods, rank 0 writes. The training continues while a thread waits for the disk and puts
    the file in its place; :meth:`wait` waits for that, as does every method that needs the file.

    Args:
        folder: Output folder of the run.
        world: This process among all.
        info: Facts about the run that go into each checkpoint.
        keep: Number of best checkpoints to keep.
        decreasing: True if a smaller metric is better.

    Attributes:
        best_metric: Best metric so far; None before there is one.
        best_epoch: Epoch of the best metric; None before there is one.
    """

    def __init__(
            self,
            folder: Path,
            world: World,
            info: RunInfo,
            *,
            keep: int = 10,
            decreasing: bool = False,
    ) -> None:
        self.folder = folder
        self._world = world
        self._info = info
        self._keep = keep
        self._better = operator.lt if decreasing else operator.gt
        self._decreasing = decreasing
        self._history: list[tuple[str, float]] = []  # (file name, metric), the best one first
        self._dropped: list[str] = []  # removed from the history by the latest epoch
        self._newest = ''
        self._resumptions = 0
        self._disk = ThreadPoolExecutor(1, 'checkpoint')
        self._pending: Future[None] | None = None
        self.best_metric: float | None = None
        self.best_epoch: int | None = None

    def last_good(self) -> str:
        """Return the name of the newest checkpoint written or resumed from, for messages."""
        self.wait()
        return self._newest or 'none was saved'

    def save_epoch(self, trainer: Trainer, epoch: int, metric: float, extra: State | None = None) -> None:
        """Save the state after ``epoch``.

        Args:
            trainer: Trainer at the end of the epoch.
            epoch: Index of the epoch.
            metric: Metric that decides whether the checkpoint is among the best.
            extra: Further entries of the checkpoint.

        Raises:
            Diverged: The weights are no longer finite. Nothing is saved.
            CannotWrite: The disk is full, now or when the previous checkpoint was put in its place.
        """
        if not math.isnan(metric) and (self.best_metric is None or self._better(metric, self.best_metric)):
            self.best_metric, self.best_epoch = metric, epoch
        self._add_to_history(f'checkpoint-{epoch}{EXTENSION}', metric)
        saver = {**self.state_dict(), 'epoch': epoch}
        state = training_state(trainer, self._info, {**(extra or {}), 'metric': metric, 'saver': saver})
        last = self.folder / f'last{EXTENSION}'
        on_primary(lambda: self._write(state or {}, last, trainer, lambda: self._publish(last, epoch)), self._world)

    def _add_to_history(self, name: str, metric: float) -> None:
        """Add a file to the history of the best ones, and remove those that are no longer among them."""
        entries = [entry for entry in self._history if entry[0] != name] + [(name, metric)]
        entries.sort(key=lambda entry: self._sort_key(entry[1]))
        self._history, self._dropped = entries[:self._keep], [name for name, _ in entries[self._keep:]]

    def _publish(self, last: Path, epoch: int) -> None:
        """Give an epoch's checkpoint its further names. A resumed run repeats this, as a kill may have come between."""
        name = f'checkpoint-{epoch}{EXTENSION}'
        if any(name == kept for kept, _ in self._history):
            atomic_link(last, self.folder / name)
        if self.best_epoch == epoch:
            atomic_link(last, self.folder / f'model_best{EXTENSION}')
        for dropped in self._dropped:
            _remove(self.folder / dropped)

    def save_recovery(self, trainer: Trainer, extra: State | None = None) -> None:
        """Save the state in mid-epoch. It raises what :meth:`save_epoch` raises."""
        state = training_state(trainer, self._info, {**(extra or {}), 'saver': self.state_dict()})
        path = self.folder / f'recovery-{trainer.position.epoch}-{trainer.position.batch}{EXTENSION}'
        on_primary(lambda: self._write(state or {}, path, trainer, self._drop_recoveries), self._world)

    def _drop_recoveries(self) -> None:
        """Remove all recovery files but the newest two; damaged ones, which have no position, are left alone."""
        progress = {path: _progress(path) for path in self.folder.glob(f'recovery-*{EXTENSION}')}
        intact = sorted((path for path in progress if progress[path] != DAMAGED), key=progress.__getitem__)
        for dropped in intact[:-2]:
            _remove(dropped)

    def _write(self, state: State, path: Path, trainer: Trainer, afterwards: Callable[[], None]) -> None:
        self.wait()
        if not _is_finite(state['state_dict']):
            raise trainer.diverged('the weights are no longer finite, so they are not saved,')
        put_in_place = stage_checkpoint(state, path)

        def complete() -> None:
            put_in_place()
            self._newest = str(path)
            afterwards()

        self._pending = self._disk.submit(complete)

    def wait(self) -> None:
        """Wait until the file that was saved last is in its place; raise CannotWrite if that fails."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait as :meth:`wait` does after another error has ended the run, and log a failure instead of raising it."""
        try:
            self.wait()
        except CannotWrite as error:
            _logger.error(str(error))
        self._disk.shutdown()

    def _sort_key(self, metric: float) -> float:
        """Return a key that sorts the best first and NaN last."""
        if math.isnan(metric):
            return math.inf
        return metric if self._decreasing else -metric

    def state_dict(self) -> State:
        """Return timm's record of the files there are, and the names of those to be removed."""
        return {'checkpoint_files': list(self._history), 'dropped': list(self._dropped),
                'best_epoch': self.best_epoch, 'best_metric': self.best_metric, 'resumptions': self._resumptions}

    def load_state_dict(self, state: State, path: Path) -> None:
        """Continue with the files of an earlier run, resumed from ``path``."""
        self._newest = str(path)
        others = map(peek_checkpoint, checkpoints_in(self.folder) if self._world.is_primary else ())
        states = [state, *(other.get('saver', {}) for other in others if other is not None)]
        self._resumptions = 1 + max(each.get('resumptions', 0) for each in states)
        self.best_metric, self.best_epoch = state.get('best_metric'), state.get('best_epoch')
        self._history = [(Path(name).name, metric) for name, metric in state.get('checkpoint_files', ())
                         if metric is not None]
        self._dropped = [Path(name).name for name in state.get('dropped', ())]
        if 'epoch' in state and path.resolve().parent == self.folder.resolve():
            on_primary(lambda: self._publish(path, state['epoch']), self._world)
        self._history = [(name, metric) for name, metric in self._history if (self.folder / name).exists()]


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _logger.warning(f'{path} is no longer needed, but cannot be removed: {error.strerror}.')


def _is_finite(state_dict: State) -> bool:
    """Return True if all weights and statistics are finite. This waits for the device once."""
    values = [value for value in state_dict.values() if value.is_floating_point()]
    sums = [value.sum(dtype=torch.float32) for value in values]
    # A finite sum has finite terms, and summing takes an eighth of the time of looking at each.
    return not sums or bool(torch.stack(sums).isfinite().all()) or all(value.isfinite().all() for value in values)

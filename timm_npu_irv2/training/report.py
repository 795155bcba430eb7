"""The output of a run: progress on the console, summary.csv, report.json, curves.png, and the zoo's three last lines.

Epochs are counted from 0, as in the names of the checkpoints. Percentages are percentages: 79.14, not 0.7914.
"""

import csv
import io
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from .. import device as devices
from ..errors import UserError, first_line
from ..plots import draw_curves
from ..serialization import atomic_write, open_regular

__all__ = ['Progress', 'Report', 'final_lines']

_logger = logging.getLogger(__name__)

# timm's, then ours
COLUMNS = ('epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr', 'train_top1', 'images_per_second')

Row = dict[str, Any]


class Report:
    """The results of a run in its output folder.

    Args:
        folder: Output folder.
        first_epoch: Epoch that the run starts with; rows of earlier epochs are kept, later ones are dropped.
        metric: Metric that chooses the best epoch: 'top1', 'top5' or 'loss'.

    Attributes:
        rows: Row of each epoch, with the columns of summary.csv; None where an epoch was not evaluated.
    """

    def __init__(self, folder: Path | str, first_epoch: int = 0, metric: str = 'top1'):
        self.folder, self.metric = Path(folder), metric
        self.rows: list[Row] = [row for row in _read_summary(self._path('summary.csv')) if row['epoch'] < first_epoch]

    def add_epoch(self, epoch: int, train: Mapping[str, float], evaluation: Mapping[str, float] | None) -> Row:
        """Add an epoch to summary.csv.

        Args:
            epoch: Index of the epoch, from 0.
            train: 'loss', 'top1', 'lr' and 'images_per_second' (0 if not measured) of the epoch.
            evaluation: 'loss', 'top1' and 'top5' after the epoch; None if it was not evaluated.

        Returns:
            The row of summary.csv.
        """
        values = {f'train_{key}': train.get(key) for key in ('loss', 'top1')}
        values |= {'lr': train.get('lr'), 'images_per_second': train.get('images_per_second') or None}
        values |= {f'eval_{key}': (evaluation or {}).get(key) for key in ('loss', 'top1', 'top5')}
        row = {'epoch': epoch, **{column: values[column] for column in COLUMNS[1:]}}
        self.rows.append(row)
        self._write_summary()
        return row

    @property
    def best(self) -> Row | None:
        """Row of the best epoch, by the validation set, or by the training set where there is none."""
        sign = -1 if self.metric == 'loss' else 1
        for column in (f'eval_{self.metric}', f'train_{self.metric}', 'train_top1'):
            known = [row for row in self.rows if row.get(column) is not None]
            if known:
                return max(known, key=lambda row: sign * row[column])
        return None

    def finish(
            self,
            *,
            model: str,
            num_classes: int,
            parameters: int,
            device: torch.device,
            world_size: int,
            precision: str,
            batch_size: int,
            seconds: float,
            images_per_second: float,
            evaluation: Mapping[str, float] | None = None,
            **further: Any,
    ) -> dict[str, Any]:
        """Write report.json and curves.png, and print the three last lines.

        Args:
            model: Name of the model.
            num_classes: Number of classes of the model.
            parameters: Number of parameters of the model.
            device: Device of the training.
            world_size: Number of processes.
            precision: Description of the precision.
            batch_size: Images in a step of all processes together.
            seconds: Duration of the whole run.
            images_per_second: Mean training throughput of all processes together.
            evaluation: Figures of an evaluation without training; None reports those of the best epoch.
            further: Further entries; 'train_loss' is the difference of the training loss from plain cross entropy.

        Returns:
            The content of report.json.
        """
        best, names = self.best, ('top1', 'top5', 'loss')
        results: Mapping[str, float | None] = evaluation or {key: (best or {}).get(f'eval_{key}') for key in names}
        report = {
            'model': model,
            **{key: results.get(key) for key in names},
            'images_per_second': images_per_second,
            'seconds': seconds,
            'epochs': len(self.rows),
            'best_epoch': best['epoch'] if best else None,
            'last_epoch': self.rows[-1] if self.rows else None,
            'num_classes': num_classes,
            'parameters': parameters,
            'batch_size': batch_size,
            'world_size': world_size,
            'device': devices.describe(device),
            'precision': precision,
            'versions': devices.versions(),
            **further,
        }
        atomic_write(self._path('report.json'), json.dumps(report, indent=2) + '\n')
        self._conclude(report, (best or {}).get('train_top1'))
        return report

    def _conclude(self, report: Mapping[str, Any], train_top1: float | None) -> None:
        """Draw curves.png, and print the three last lines; training accuracy stands in for that of no validation."""
        if self.rows:
            title = f'{report["model"]} · {report["precision"]} · batch {report["batch_size"]}'
            draw_curves(self.rows, self._path('curves.png'), title, report.get('train_loss', ''))
        top1 = report['top1'] if report['top1'] is not None else train_top1
        _logger.info("The last three lines are those of the ModelZoo; its 'Final Train Accuracy' is validation top-1.")
        print(final_lines(report['images_per_second'], top1, report['seconds']), flush=True)

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _write_summary(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(self.rows)
        atomic_write(self._path('summary.csv'), text.getvalue())


def final_lines(images_per_second: float, top1: float | None, seconds: float) -> str:
    """Return the three lines that Ascend ModelZoo's scripts end with, which other people's scripts read."""
    return (
        f'Final Performance images/sec : {images_per_second:.3f}\n'
        f'Final Train Accuracy : {math.nan if top1 is None else top1:.2f}\n'
        f'E2E Training Duration sec : {seconds:.0f}'
    )


def _read_summary(path: Path) -> list[Row]:
    if not path.exists():
        return []
    try:
        with open_regular(path) as file:
            lines = csv.DictReader(io.TextIOWrapper(file, encoding='utf-8', newline=''))
            rows = [{name: _number(row.get(name)) for name in COLUMNS} for row in lines]
        return [{**row, 'epoch': int(row['epoch'])} for row in rows if row['epoch'] is not None]
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        reason = getattr(error, 'strerror', None) or first_line(error)
        raise UserError(f'{path} cannot be read ({reason}): repair it, or remove it to begin a new table.') from error


def _number(cell: str | None) -> float | None:
    return float(cell) if cell else None


# ------------------------------------------------------------------------------------------------------- console


class _Remaining:
    """An estimate of the time that is left, from the batches and validations since this process began.

    Args:
        epochs: Number of epochs of the run.
        clock: Function that returns the time in seconds.
    """

    def __init__(self, epochs: int, clock: Callable[[], float]):
        self._epochs, self._clock = epochs, clock
        self._first: tuple[int, int, float] | None = None  # epoch, batch and time of the first update in the epoch
        self._last = 0.0
        self._per_batch: float | None = None
        self._between = 0.0  # seconds of a validation and a checkpoint

    def update(self, epoch: int, batch: int, batches: int) -> tuple[float, float] | None:
        """Return the seconds that are left of the epoch and of the run; None before they can be estimated."""
        self._last = now = self._clock()
        if self._first is None or self._first[0] != epoch:
            self._first = epoch, batch, now
        elif batch > self._first[1]:
            self._per_batch = (now - self._first[2]) / (batch - self._first[1])
        if self._per_batch is None:
            return None
        epochs_after = max(0, self._epochs - epoch - 1)
        of_epoch = self._per_batch * (batches - batch)
        return of_epoch, of_epoch + epochs_after * self._per_batch * batches + (epochs_after + 1) * self._between

    def epoch_done(self, epoch: int, batches: int) -> float | None:
        """Return the seconds that are left of the run after an epoch and its validation."""
        if self._per_batch is None:
            return None
        self._between = self._clock() - self._last
        return max(0, self._epochs - epoch - 1) * (self._per_batch * batches + self._between)


class Progress:
    """The progress of a run: a bar on a terminal, lines of the log elsewhere.

    Args:
        epochs: Number of epochs of the run.
        stream: Stream of the bar; None for stderr.
        clock: Function that returns the time in seconds.
    """

    def __init__(self, epochs: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self.epochs, self.stream = epochs, stream or sys.stderr
        self.bar: tqdm | None = None
        self._remaining, self._batches = _Remaining(epochs, clock), 0

    def update(self, figures: Mapping[str, Any]) -> None:
        """Show 'epoch', 'batch' of 'batches', and 'loss', 'top1', 'lr' and 'images_per_second' of the last batches."""
        left = self._remaining.update(figures['epoch'], figures['batch'], figures['batches'])
        self._batches = figures['batches']
        text = _step_figures(figures)
        if left is not None and figures['batch'] < figures['batches']:
            text += f'  left {_duration(left[0])} (run {_duration(left[1])})'
        if not self.stream.isatty():
            _logger.info(_step_line(figures, text))
            return
        if self.bar is None:
            self.bar = tqdm(total=figures['batches'], desc=f'Epoch {figures["epoch"]}', unit='batch', leave=False,
                            file=self.stream, dynamic_ncols=True, initial=figures['batch'])
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(figures['batch'] - self.bar.n)
        self.bar.refresh()

    def epoch_done(self, row: Row) -> None:
        """Show the results of an epoch, a row of summary.csv."""
        self.close()
        left = self._remaining.epoch_done(row['epoch'], self._batches)
        _logger.info(f'Epoch {row["epoch"]} ({row["epoch"] + 1} of {self.epochs}): {_epoch_figures(row)}'
                     + (f', {_duration(left)} left' if left else ''))

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _duration(seconds: float) -> str:
    """Return a duration as 1:02:03, or 2:03 below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f'{hours}:{minute:02}:{second:02}' if hours else f'{minute}:{second:02}'


def _step_line(figures: Mapping[str, Any], text: str) -> str:
    batch, batches = figures['batch'], figures['batches']
    width = len(str(batches))
    return f'Train {figures["epoch"]} [{batch:>{width}}/{batches} {100 * batch / batches:3.0f} %]  {text}'


def _step_figures(figures: Mapping[str, Any]) -> str:
    speed = figures['images_per_second']
    parts = [f'loss {figures["loss"]:.4f}', f'top-1 {figures["top1"]:.2f} %', f'lr {figures["lr"]:.3g}']
    return '  '.join([*parts, f'{speed:.1f} images/s'] if speed else parts)


def _epoch_figures(row: Row) -> str:
    parts = [f'loss {row["train_loss"]:.4f}']
    if row['train_top1'] is not None:
        parts.append(f'top-1 {row["train_top1"]:.2f} %')
    if row['eval_loss'] is not None:
        parts.append(f'validation loss {row["eval_loss"]:.4f}, top-1 {row["eval_top1"]:.2f} %, '
                     f'top-5 {row["eval_top5"]:.2f} %')
    if row['images_per_second']:
        parts.append(f'{row["images_per_second"]:.1f} images/s')
    return ', '.join(parts)

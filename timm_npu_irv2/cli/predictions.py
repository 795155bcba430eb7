"""Predictions of inference.py: one row per image, with the columns of timm's script."""

import logging
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..serialization import atomic_write, make_folder
from .shards import Shards
from .table import EXTENSIONS, to_format

__all__ = ['Answers', 'Labels', 'Progress', 'ShardWriter', 'tabulate', 'write_results']

_logger = logging.getLogger('inference')

Labels = Callable[[int], str]


@dataclass
class Answers:
    """Answers to N images, in batches.

    Attributes:
        names: Names of the images.
        indices: Classes (N, K), the most likely first; empty for --topk 0.
        outputs: Probabilities or logits (N, K) of these classes, or (N, classes) of all.
        shown: First images for the picture, uint8 (M, C, H, W).
        shown_top: Probabilities and classes (M, bars) of these images.
    """

    names: list[str] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    shown: list[Tensor] = field(default_factory=list)
    shown_top: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, args: Namespace, names: list[str], logits: Tensor) -> None:
        """Add the answers to some images.

        Args:
            args: Options of inference.py, of which ``topk`` and ``output_type`` count.
            names: Names of the images.
            logits: Logits (N, classes) in float32.
        """
        outputs = logits.softmax(-1) if args.output_type == 'prob' else logits
        if args.topk:
            outputs, classes = outputs.topk(min(args.topk, logits.shape[1]))
            self.indices.append(classes.cpu())
        self.outputs.append(outputs.cpu())
        self.names += names


def tabulate(args: Namespace, answers: Answers, labels: Labels | None) -> list[dict[str, Any]]:
    """Return one row per image, with the columns that the options name.

    Args:
        args: Options of inference.py.
        answers: Answers to the images.
        labels: Function from a class index to its label; None for no labels.
    """
    columns: dict[str, list[list[Any]]] = {}
    if args.topk:
        indices = torch.cat(answers.indices).tolist()
        if args.include_index or labels is None:
            columns[args.index_col] = indices
        if labels is not None:
            columns[args.label_col] = [[labels(index) for index in row] for row in indices]
    if not args.exclude_output:
        columns[args.output_col or args.output_type] = torch.cat(answers.outputs).tolist()
    table: list[dict[str, Any]] = [{args.filename_col: name} for name in answers.names]
    for name, cells in columns.items():
        for row, values in zip(table, cells, strict=True):
            if len(values) == 1:
                row[name] = values[0]
            elif args.results_separate_col:
                row |= {f'{name}_{place}': value for place, value in enumerate(values)}
            else:
                row[name] = values
    return table


def write_results(args: Namespace, table: list[dict[str, Any]], size: int) -> None:
    """Write one file per format, if a file or a folder is named.

    Raises:
        CannotWrite: The disk is full, or the folder refuses the file.
    """
    if not args.results_file and not args.results_dir:
        return
    stem = Path(args.results_file or f'{args.model.replace(":", "_").replace("/", "_")}-{size}')
    stem = stem.with_suffix('') if stem.suffix in EXTENSIONS.values() else stem
    for format in args.results_format:
        path = Path(args.results_dir) / f'{stem}{EXTENSIONS[format]}'
        make_folder(path.parent)
        atomic_write(path, to_format(table, format, args.filename_col))
        _logger.info(f'Results: {path}')


class ShardWriter:
    """A writer of the shards of one process, each when the first answer of a later one comes.

    Args:
        args: Options.
        shards: All shards.
        numbers: Numbers of this process's shards, ascending.
        labels: Function from a class index to its label; None for no labels.
        num_classes: Number of classes of the network.
    """

    def __init__(
            self,
            args: Namespace,
            shards: Shards,
            numbers: Sequence[int],
            labels: Labels | None,
            num_classes: int,
    ):
        self.args, self.shards, self.numbers, self.labels = args, shards, numbers, labels
        self._next, self._answers = 0, Answers()
        example = Answers()
        example.add(args, [''], torch.zeros(1, num_classes))
        self._example = tabulate(args, example, labels)[0]  # a row with the columns and types of all others

    @property
    def waiting(self) -> int:
        """Number of answers that are not written yet."""
        return len(self._answers.names)

    def add(self, names: list[tuple[int, str]], logits: Tensor) -> None:
        """Add the answers (N, classes) to N images, given by their shard and their name."""
        start = 0
        while start < len(names):
            shard = names[start][0]
            while self.numbers[self._next] < shard:
                self._write()
            end = next((index for index in range(start, len(names)) if names[index][0] != shard), len(names))
            self._answers.add(self.args, [name for _, name in names[start:end]], logits[start:end])
            start = end

    def finish(self) -> None:
        """Write what is left."""
        while self._next < len(self.numbers):
            self._write()

    def _write(self) -> None:
        rows = tabulate(self.args, self._answers, self.labels) if self._answers.names else []
        self.shards.write(self.numbers[self._next], rows, self._example)
        self._next, self._answers = self._next + 1, Answers()


class Progress:
    """Images a second, and the time that is left.

    Args:
        total: Number of images.
        before: Number of images that an earlier run has done.
    """

    def __init__(self, total: int, before: int = 0):
        self.total, self.before, self.done, self._started = total, before, before, time.perf_counter()

    @property
    def rate(self) -> float:
        """Images a second of this run."""
        return (self.done - self.before) / max(time.perf_counter() - self._started, 1e-9)

    def log(self, done: int) -> None:
        """Log the progress after ``done`` images."""
        self.done = done
        left = f', {timedelta(seconds=round((self.total - done) / self.rate))} left' if self.rate else ''
        _logger.info(f'Predict [{done:>{len(str(self.total))}}/{self.total}]  {self.rate:.1f} images/s{left}')

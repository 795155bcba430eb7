"""Answers to single images in an evaluation, and what is computed and drawn from them."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data import RealLabelsImagenet
from torch import Tensor

from ..data.loader import DeviceLoader
from ..errors import UserError, one_line
from ..plots import Prediction, draw_prediction_grid, select_predictions
from ..serialization import open_regular

__all__ = ['ProcessAnswers', 'Tally', 'averaged_metrics', 'check_index', 'draw_answers', 'read_real_labels',
           'real_accuracy']

_logger = logging.getLogger(__name__)

# Indices of the images of a process in the data set (None for a stream), their five most likely classes, their targets.
ProcessAnswers = tuple[list[int] | None, list[list[int]], list[int]]


@dataclass
class Tally:
    """The five most likely classes of each image of this process; it also logs the progress.

    Attributes:
        batches: Number of batches.
        log_freq: Batches between two lines of the log.
        keep: True to keep the classes and the targets, which takes 50 bytes an image.
    """

    batches: int
    log_freq: int
    keep: bool = True
    started: float = field(default_factory=time.perf_counter)
    answered: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)

    def __call__(self, index: int, output: Tensor, target: Tensor) -> None:
        """Record a batch: its index, logits and targets."""
        if self.keep:
            self.answered.append(output.topk(min(5, output.shape[1]), dim=1).indices)
            self.targets.append(target)
        if index % self.log_freq == 0:
            _logger.info(f'Validate [{index + 1:>{len(str(self.batches))}}/{self.batches}]')

    def answers(self, loader: Any) -> ProcessAnswers:
        """Return the indices of the images in the data set, their five most likely classes, and their targets."""
        if not self.targets:
            return [], [], []
        return loader.indices, torch.cat(self.answered).tolist(), torch.cat(self.targets).tolist()


def check_index(option: str, loader: Any) -> None:
    """Raise UserError if an option needs images by their numbers, which a stream does not have."""
    if not isinstance(loader, DeviceLoader):
        raise UserError(f'{option} needs a data set with an index: a stream has none.')


def read_real_labels(path: str, loader: Any) -> Mapping[str, Sequence[int]]:
    """Return the reassessed labels of ImageNet by the stems of the file names: shards have other endings.

    Raises:
        UserError: The file cannot be read, or the data set is not that of the labels.
    """
    check_index('--real-labels', loader)
    try:
        samples: Any = loader.samples
        names = samples.filenames(basename=True)
        open_regular(path).close()  # a pipe would have to be waited for
        every = RealLabelsImagenet(names, path).real_labels
    except Exception as error:  # timm takes what the file holds for lists of classes
        reason = getattr(error, 'strerror', None) or (
            one_line(error) if error.args else 'the data set is not the 50000 images of ImageNet')
        raise UserError(f'--real-labels {path}: {reason}') from error
    labels = {_stem(name): classes for name, classes in every.items()}
    if unknown := next((name for name in names if _stem(name) not in labels), None):
        raise UserError(f'--real-labels {path}: {unknown} is no validation image of ImageNet.')
    return labels


def _stem(name: str) -> str:
    return name.partition('.')[0]


def real_accuracy(
        labels: Mapping[str, Sequence[int]],
        loader: Any,
        answers: Sequence[ProcessAnswers],
) -> dict[str, float]:
    """Return top-1 and top-5 in percent by the reassessed labels, over the images that have any."""
    samples: Any = loader.samples
    hits: dict[str, list[bool]] = {'top1': [], 'top5': []}
    for indices, answered, _ in answers:
        for index, guesses in zip(indices or (), answered, strict=True):
            right = labels[_stem(samples.filename(index, basename=True))]
            if right:
                hits['top1'].append(guesses[0] in right)
                hits['top5'].append(any(guess in right for guess in guesses))
    return {key: 100 * sum(values) / max(len(values), 1) for key, values in hits.items()}


def draw_answers(path: Path, loader: Any, answers: Sequence[ProcessAnswers]) -> None:
    """Draw some images with their predictions, the wrong ones first."""
    names = {index: name for name, index in (loader.class_to_idx or {}).items()}
    every = sorted((index, answered[0], target) for indices, ranked, targets in answers
                   for index, answered, target in zip(indices or (), ranked, targets, strict=True))
    right = sum(answer == target for _, answer, target in every)
    draw_prediction_grid(path, [
        Prediction(loader.samples[index][0].convert('RGB'), [str(names.get(answer, answer))],
                   target=str(names.get(target, target)))
        for index, answer, target in select_predictions(every)
    ], title=f'{right} of {len(every)} right ({100 * right / max(len(every), 1):.2f} %)')


def averaged_metrics(average: str, answers: Sequence[ProcessAnswers]) -> dict[str, float]:
    """Return precision, recall and F1 in percent."""
    try:
        from sklearn.metrics import precision_recall_fscore_support  # noqa: PLC0415 (an optional dependency)
    except ImportError as error:
        raise UserError('--metrics-avg needs scikit-learn: pip install scikit-learn.') from error
    guesses = [answer[0] for _, answered, _ in answers for answer in answered]
    targets = [target for _, _, own in answers for target in own]
    scores = precision_recall_fscore_support(targets, guesses, average=average, zero_division=0)
    names = 'precision', 'recall', 'f1_score'
    return {f'{average}_{name}': round(100 * float(score), 4) for name, score in zip(names, scores[:3], strict=True)}

"""The figures of a run for programs that draw them: TensorBoard and Weights & Biases."""

import contextlib
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..cli.checks import check_installed, name_option
from ..data.decode import to_pil_mode
from ..errors import one_line
from .engine import Trainer
from .report import Progress

__all__ = ['Logs', 'TensorBoard', 'check_packages', 'start_wandb']

_logger = logging.getLogger(__name__)

PICTURES = 16  # of the validation set


def check_packages(args: Namespace) -> None:
    """Raise UserError if --log-tensorboard or --log-wandb names a package that is not installed."""
    for package in 'wandb', 'tensorboard':
        if getattr(args, f'log_{package}'):
            check_installed(f'--log-{package}', package)


class Logs:
    """The figures of a run on the console, in TensorBoard and at Weights & Biases.

    Args:
        args: Options of train.py.
        folder: Output folder of the run.
        trainer: Trainer at the position where the run begins.
        epochs: Number of epochs of the run.
        eval_loader: Loader of the validation set; None for none.

    Raises:
        UserError: A package is missing, or the run at Weights & Biases cannot be started.
    """

    def __init__(self, args: Namespace, folder: Path, trainer: Trainer, epochs: int, eval_loader: Any = None) -> None:
        self._trainer, self._folder, self._progress = trainer, folder, Progress(epochs)
        self._wandb = start_wandb(args, folder.name) if args.log_wandb else None
        self._board = TensorBoard(folder, trainer.position.updates) if args.log_tensorboard else None
        if self._board is not None and eval_loader is not None:
            self._board.log_images(eval_loader)

    def step(self, figures: dict[str, Any]) -> None:
        """Log the figures of the last batches."""
        self._progress.update(figures)
        if self._board is not None:
            self._board.log_step(figures)

    def epoch(self, row: dict[str, Any]) -> None:
        """Log a row of summary.csv."""
        self._progress.epoch_done(row)
        if self._wandb is not None:
            try:
                self._wandb(row)
            except Exception as error:  # the service, or the disk that it writes to, may fail in many ways
                self._wandb = None
                _logger.warning(f'Weights & Biases: the run goes on without it: {one_line(error)}')
        if self._board is not None:
            self._board.log_epoch(row, self._trainer.position.updates)

    def finish(self) -> None:
        """Log the curves of the whole run."""
        if self._board is not None:
            self._board.log_curves(self._folder / 'curves.png', self._trainer.position.updates)

    def close(self) -> None:
        """Remove the bar, and end the event file."""
        self._progress.close()
        if self._board is not None:
            self._board.close()


class TensorBoard:
    """The event file of a run in the folder ``tensorboard``; all figures are over the number of updates.

    Args:
        folder: Output folder of the run.
        first_update: Updates that the run begins with; later figures of an earlier attempt are hidden.
    """

    def __init__(self, folder: Path, first_update: int = 0) -> None:
        with name_option('--log-tensorboard'):
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an optional package

            purge_step = first_update + 1 if first_update else None
            self._writer: Any = SummaryWriter(folder / 'tensorboard', purge_step=purge_step)
        self._failed = False

    def log_step(self, figures: Mapping[str, Any]) -> None:
        """Write the figures of a line of the log, by the names of :class:`.Trainer`."""
        with self._warn_once():
            for name in 'loss', 'top1', 'lr', 'images_per_second':
                self._writer.add_scalar(f'step/{name}', figures[name], figures['updates'])

    def log_epoch(self, row: Mapping[str, Any], update: int) -> None:
        """Write a row of summary.csv, measured after ``update`` updates."""
        with self._warn_once():
            for name, value in row.items():
                if value is not None:
                    self._writer.add_scalar(f'epoch/{name}', value, update)
            self._writer.flush()

    def log_images(self, loader: Any) -> None:
        """Write the first images of a validation set as the network sees them; nothing for a stream."""
        pictures = [_as_rgb(image, loader.pipeline) for image in _first_images(loader.samples)]
        if pictures:
            with self._warn_once():
                self._writer.add_images('validation', np.stack(pictures), 0, dataformats='NHWC')

    def log_curves(self, path: Path, update: int) -> None:
        """Write the picture of the curves, if it was drawn."""
        with self._warn_once():
            if path.is_file():
                with Image.open(path) as picture:
                    self._writer.add_image('curves', np.asarray(picture.convert('RGB')), update, dataformats='HWC')

    def close(self) -> None:
        """End the file."""
        with self._warn_once():
            self._writer.close()

    @contextlib.contextmanager
    def _warn_once(self) -> Iterator[None]:
        """Continue the run if the event file cannot be written."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                _logger.warning(f'TensorBoard: cannot write to {self._writer.log_dir}: {error.strerror or error}.')
            self._failed = True


def _first_images(samples: Any) -> Iterator[Image.Image]:
    for index in range(min(PICTURES, len(samples)) if hasattr(samples, '__getitem__') else 0):
        with contextlib.suppress(Exception):  # the validation says what cannot be read
            yield samples[index][0]


def _as_rgb(image: Image.Image, pipeline: Any) -> np.ndarray:
    """Return an image as the network sees it, (H, W, 3) in uint8."""
    pixels = np.asarray(pipeline.transform()(to_pil_mode(image, pipeline.input_img_mode)))
    height, width = pixels.shape[1:]
    content = np.ascontiguousarray(pixels.transpose(1, 2, 0)).tobytes()
    return np.asarray(Image.frombytes(pipeline.input_img_mode, (width, height), content).convert('RGB'))


def start_wandb(args: Namespace, name: str) -> Callable[[Mapping[str, Any]], None]:
    """Start a run of Weights & Biases and return the function that logs a row of figures to it.

    Raises:
        UserError: It cannot be started.
    """
    with name_option('--log-wandb'):
        import wandb  # noqa: PLC0415 - an optional package

        wandb.init(project=args.wandb_project, name=name, config=vars(args), tags=args.wandb_tags,
                   id=args.wandb_resume_id or None, resume='must' if args.wandb_resume_id else None)
    return wandb.log

"""Worker processes: read the images of a batch, augment them, and collate them into uint8 tensors.

An image that cannot be read, or whose pixels have no known meaning, is never replaced silently: it stops the run, or
it is skipped, logged and counted.
"""

import contextlib
import multiprocessing.queues
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from ..errors import UserError, first_line
from ..program import NOTICES
from .decode import to_pil_mode
from .samplers import Batch, SampleKey, derive_seed, preserve_rng_state, reseed
from .wds import LeftOut

__all__ = ['BatchDataset', 'LoadedBatch', 'WorkerDataLoader', 'WorkerLost', 'is_lost_worker', 'send_errors',
           'start_method', 'start_worker', 'translate_worker_errors']

GRACE = 30  # seconds; torchrun, too, waits as long between SIGTERM and SIGKILL
POLL = 1  # seconds between two looks of a worker at its main process
RESOURCES = ('use fewer --workers or a smaller --batch-size, or raise the limits of open files (`ulimit -n`) and of '
             'shared memory (/dev/shm; `docker run --shm-size`)')


class LoadedBatch(NamedTuple):
    """A batch on its way from a worker to the device.

    Attributes:
        images: Images (N, C, H, W), uint8, or float without the prefetcher; None if no image of the batch was read.
        targets: Class indices (N,).
        seed: Seed of what is drawn on the device.
        mixes: True if the batch may be mixed.
        skipped: (index in the data set, name, reason) of each image that could not be read; the reason is '' for one
            that is left out on purpose.
    """

    images: Tensor | None
    targets: Tensor | None
    seed: int
    mixes: bool
    skipped: list[tuple[int, str, str]]


class BatchDataset(Dataset[LoadedBatch]):
    """A map-style data set whose keys are whole batches.

    Args:
        samples: Data set of (PIL image or array, class index) that raises for an image that cannot be read.
        transforms: One transform for each image size of a batch.
        image_mode: PIL mode that every image is converted to.
        collate: Function from a list of (image, class index) to two tensors.
        seed: Seed of the run; None for transforms without randomness.
        on_bad_image: 'stop' with a UserError at an image that cannot be read, or 'skip' it. In training the next image
            of the data set takes its place, so that batches keep their size; in evaluation its place is left out.
    """

    def __init__(
            self,
            samples: Dataset,
            transforms: Sequence[Callable],
            image_mode: str,
            collate: Callable,
            seed: int | None = None,
            on_bad_image: str = 'stop',
    ):
        self.samples, self.transforms, self.image_mode, self.collate = samples, transforms, image_mode, collate
        self.seed, self.on_bad_image = seed, on_bad_image

    def __getitem__(self, batch: Batch) -> LoadedBatch:
        skipped: dict[int, tuple[str, str]] = {}
        with preserve_rng_state():
            samples = [sample for key in batch.samples for sample in self._sample(batch, key, skipped)]
            images, targets = self.collate(samples) if samples else (None, None)
        reasons = [(index, name, reason) for index, (name, reason) in skipped.items()]
        return LoadedBatch(images, targets, batch.seed, batch.mixup, reasons)

    def _sample(self, batch: Batch, key: SampleKey, skipped: dict[int, tuple[str, str]]) -> Iterator[tuple[Any, Any]]:
        """Yield the image and target of ``key``; nothing if it is skipped and no other image takes its place."""
        size = len(self.samples)  # type: ignore[arg-type]  # torch's Dataset declares no __len__
        candidates = range(key.index, key.index + (size if self.seed is not None else 1))
        for index in (candidate % size for candidate in candidates):
            try:
                image, target = self.samples[index]
                if isinstance(image, Image.Image):
                    image = to_pil_mode(image, self.image_mode)  # torchvision's have the mode of their file
            except LeftOut:
                skipped[index] = self._name(index), ''
                continue
            except UserError:  # not the image is at fault
                raise
            except Exception as error:  # decoders fail in as many ways as files can be damaged
                skipped[index] = self._name(index), first_line(error)
                if self.on_bad_image == 'stop':
                    raise UserError('image {} cannot be read: {}'.format(*skipped[index])) from error
                continue
            if self.seed is not None:
                reseed(derive_seed(self.seed, batch.epoch, key.index, key.repeat))
            yield self.transforms[batch.size](image), target
            return
        if self.seed is not None:
            name, reason = skipped[index]
            raise UserError(f'none of {size} images can be read; the last one, {name}: {reason or "its class is -1"}')

    def _name(self, index: int) -> str:
        """Return the image's file name, or its index where it has none."""
        if hasattr(self.samples, 'filename'):
            return self.samples.filename(index, absolute=True)
        return f'{index} of the data set'


class WorkerDataLoader(DataLoader):
    """A DataLoader that ends the workers it has started, with an error of one line, where not all can start."""

    def _get_iterator(self) -> _BaseDataLoaderIter:
        return _WorkerIterator(self) if self.num_workers else super()._get_iterator()


class _WorkerIterator(_MultiProcessingDataLoaderIter):
    def __init__(self, loader: DataLoader) -> None:
        # torch sets these in the course of its constructor, and its destructor needs them wherever that fails.
        self._shutdown, self._worker_pids_set = False, False
        self._workers, self._index_queues, self._workers_status = [], [], [True] * loader.num_workers
        self._workers_done_event = threading.Event()  # type: ignore[assignment]  # it only has to have a `set`
        try:
            super().__init__(loader)
        except OSError as error:
            self._shutdown_workers()
            raise UserError(f'--workers {loader.num_workers} cannot be started: {first_line(error)}: {RESOURCES}, or '
                            'load in the main process with --workers 0.') from error


def start_method(num_workers: int) -> str | None:
    """Return 'fork' for workers on Linux, None for Python's own way elsewhere, or if the program has chosen 'spawn'.

    Python 3.14's default, a server that forks, would have to pickle the transforms, and is the parent of the workers.
    """
    forks = sys.platform == 'linux' and multiprocessing.get_start_method(allow_none=True) != 'spawn'
    return 'fork' if num_workers and forks else None


def start_worker(worker_id: int, main_process: int) -> None:
    """Keep a worker alive through a signal that stops the run, so that the main process can finish its last step.

    Ctrl-C, SIGTERM and :data:`.NOTICES` reach the whole process group. The main process ends its workers in time; a
    worker that it cannot end exits ``GRACE`` seconds after such a signal.

    A worker has copies of the sockets over which its rank talks to the others, so these do not notice the loss of that
    rank while the worker lives. torch's watchdog misses a main process that was killed before the worker had started.

    Args:
        worker_id: Index of the worker.
        main_process: Process id of the main process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in signal.SIGTERM, *NOTICES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: signal.alarm(GRACE))
    threading.Thread(target=_end_with, args=(main_process,), name='watchdog', daemon=True).start()
    sys.excepthook = _report_error
    send_errors()


def send_errors() -> None:
    """Let a worker send an error in the place of a batch that it cannot send, which Python would drop.

    The main process would wait for that batch for ever.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]  # a hook of Python's


def _send_error(queue: multiprocessing.queues.Queue, error: Exception, message: tuple[int, Any]) -> None:
    if isinstance(error, ConnectionError):  # the main process is gone
        return
    reason = UserError(f'a worker cannot send a batch: {first_line(error)}: {RESOURCES}.')
    queue.put((message[0], ExceptionWrapper((UserError, reason, None), 'in a worker')))


def _end_with(main_process: int) -> None:
    while os.getppid() == main_process:
        time.sleep(POLL)
    os._exit(1)


def _report_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback, unless it tells only that the main process was killed while a batch was on its way."""
    if issubclass(kind, (ConnectionError, EOFError)):
        time.sleep(2 * POLL)  # the watchdog ends this process meanwhile if the main process is gone
    sys.__excepthook__(kind, error, trace)


class WorkerLost(RuntimeError):
    """A worker was killed while it sent a batch."""


@contextlib.contextmanager
def translate_worker_errors() -> Iterator[None]:
    """Translate the errors of a worker that reach the main process.

    Raises:
        UserError: As the worker raised it; torch adds a traceback to its text. Or too few files can be open for a
            batch to be received.
        WorkerLost: The worker died while it sent a batch.
    """
    try:
        yield
    except UserError as error:
        raise UserError(str(error).rpartition('UserError: ')[2].strip()) from error  # names may have several lines
    except (EOFError, ConnectionError) as error:
        raise WorkerLost from error
    except RuntimeError as error:
        if 'open files' in str(error) or 'ancdata' in str(error):
            raise UserError(f'a batch of a worker cannot be received: {first_line(error)}: {RESOURCES}.') from error
        raise


def is_lost_worker(error: BaseException) -> bool:
    """Return True for torch's error about a killed worker, which can come up anywhere in the main process."""
    return isinstance(error, WorkerLost) or (isinstance(error, RuntimeError) and 'DataLoader worker (pid' in str(error))

"""The processes of ``benchmark.py growth``: each gets one job in JSON and prints its figures."""

import contextlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

from ..data.dataset import class_to_idx, open_dataset
from ..data.loader import create_train_loader, create_train_sampler
from ..data.pipeline import ImagePipeline
from ..distributed import StopRequest, World, barrier, gather_objects, initialize, shutdown, sum_over_ranks
from ..precision import create_precision
from ..training import setup
from ..training.checkpoint import RunInfo
from ..training.engine import Trainer, TrainSettings
from ..training.evaluation import evaluate
from ..training.resumption import describe_data
from ..training.saver import CheckpointSaver

__all__ = ['measure_images', 'measure_processes']

MODEL, SIDE = 'test_resnet', 32  # a small network of timm's, pixels
Batch = tuple[Tensor, Tensor]


# ---------------------------------------------------------------------------------------------------- listed images


def measure_images(root: str, batch_size: int, batches: int) -> dict[str, float]:
    """Return the seconds from an unopened folder to the first batch, and the memory of the processes in bytes.

    Args:
        root: Folder with train/ in it.
        batch_size: Images in a batch.
        batches: Batches that the worker loads before its memory is read.
    """
    clock, cpu = [time.perf_counter()], time.process_time()
    before = _memory('self')['Rss']
    dataset = open_dataset('', root, 'train')
    clock.append(time.perf_counter())
    describe_data(dataset, class_to_idx(dataset))
    clock.append(time.perf_counter())
    count = len(dataset)  # type: ignore[arg-type]  # torch's Dataset declares no __len__
    loader = create_train_loader(
        dataset, create_train_sampler(count, World(), [batch_size]),
        ImagePipeline((3, SIDE, SIDE), (0.5,) * 3, (0.5,) * 3), torch.device('cpu'), num_workers=1)
    loaded = iter(loader)
    next(loaded)
    clock.append(time.perf_counter())
    cpu = time.process_time() - cpu
    for _ in range(min(batches, len(loader)) - 1):
        next(loaded)
    worker = _memory(str(multiprocessing.active_children()[0].pid))
    peak = int(re.findall(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[0]) * 1024
    loader.close()
    return {
        'images': count, 'search': clock[1] - clock[0], 'fingerprint': clock[2] - clock[1],
        'first batch': clock[3] - clock[2], 'total': clock[3] - clock[0], 'CPU': cpu,
        'imports': before, 'main peak': peak, 'worker': worker['Rss'], 'worker shared out': worker['Pss'],
        'worker alone': worker['Private_Clean'] + worker['Private_Dirty'],
    }


def _memory(process: str) -> dict[str, int]:
    """Return the bytes that a process has in memory, by kind."""
    found = re.findall(r'^(\w+):\s*(\d+) kB', Path(f'/proc/{process}/smaps_rollup').read_text(), re.MULTILINE)
    return {kind: int(size) * 1024 for kind, size in found}


# -------------------------------------------------------------------------------------------------------- processes


def measure_processes(
        device: str, classes: int, steps: int, batch_size: int, images: int, started: float) -> dict[str, Any] | None:
    """Return the figures of a small network's training among the processes of the environment, on rank 0.

    Args:
        device: Type of the devices.
        classes: Number of classes.
        steps: Steps that are measured.
        batch_size: Images of a process in a batch.
        images: Images that all processes together evaluate.
        started: Time on the monotonic clock when the processes were started.
    """
    torch.set_num_threads(1)
    world = initialize(device)
    joined = time.monotonic() - started
    with StopRequest(world) as stop, tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(world, classes, batch_size, stop)
        trainer.train_one_epoch()  # DDP arranges its buckets
        first_epoch = time.monotonic() - started
        trainer.loader = _Batches(_batch(world, batch_size, classes), steps)
        own = _timed(trainer.train_one_epoch, world)
        own = {name: seconds / steps for name, seconds in own.items()}
        small = _timed(lambda: [sum_over_ranks(torch.zeros(1), world) for _ in range(steps)], world)
        saver = CheckpointSaver(Path(folder), world, RunInfo(MODEL, classes, {}))
        saved = _timed(lambda: _save(saver, trainer), world)
        size = sum(path.stat().st_size for path in Path(folder).glob('last*'))
        share = _Batches(_batch(world, batch_size, classes), images // world.size // batch_size)
        evaluated = _timed(lambda: evaluate(trainer.module, share, world), world)
        calls = _collectives(trainer, _Batches(_batch(world, batch_size, classes), 4))
        saver.close()
        every = gather_objects({
            'joined': joined, 'first epoch': first_epoch, 'step': own['wall'], 'step CPU': own['CPU'],
            'small sum': small['wall'] / steps, 'checkpoint': saved['wall'], 'evaluation': evaluated['wall']}, world)
    shutdown(world)
    if not world.is_primary:
        return None
    return {**{name: max(each[name] for each in every) for name in every[0]}, **calls, 'checkpoint bytes': size}


def _save(saver: CheckpointSaver, trainer: Trainer) -> None:
    saver.save_epoch(trainer, 0, 0.0)
    saver.wait()


class _Batches(list[Batch]):
    """A loader that yields one batch several times."""

    def __init__(self, batch: Batch, count: int):
        super().__init__([batch] * count)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Do nothing: all epochs are the same."""


def _batch(world: World, size: int, classes: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, SIDE, SIDE, generator=generator)
    targets = torch.randint(classes, (size,), generator=generator)
    return images.to(world.device), targets.to(world.device)


def _trainer(world: World, classes: int, batch_size: int, stop: StopRequest) -> Trainer:
    torch.manual_seed(0)
    model: nn.Module = setup.place_model(timm.create_model(MODEL, num_classes=classes), world)
    task, precision = ClassificationTask(model, verbose=False), create_precision(world.device)
    module, optimizer = precision.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))
    task.trainable_module = module
    trainer = Trainer(task, _Batches(_batch(world, batch_size, classes), 3), optimizer, precision, world,
                      settings=TrainSettings(batch_size=batch_size, log_interval=10**9), stop=stop)
    setup.compile_and_distribute(task, optimizer, world)
    return trainer


def _timed(work: Callable[[], Any], world: World) -> dict[str, float]:
    """Return the seconds of ``work`` on the clock, and of this process on all cores."""
    barrier(world)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {'wall': time.perf_counter() - wall, 'CPU': time.process_time() - cpu}


def _collectives(trainer: Trainer, batches: _Batches) -> dict[str, float]:
    """Return the collectives of a training step, and the numbers that a process passes to them, by torch's count.

    torch counts those of gloo only.
    """
    if trainer.world.device.type != 'cpu':
        return {}
    trainer.loader = batches
    with _quiet(), torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        trainer.train_one_epoch()
    events: list[Any] = [event for event in profile.events() or () if event.name.startswith('gloo:')]
    elements = sum(shape[0] if shape else 1 for event in events for shape in event.input_shapes)
    return {'collectives': len(events) / len(batches), 'elements': elements / len(batches)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the profiler's library writes to stderr out of the report."""
    kept = os.dup(2)
    with Path(os.devnull).open('w') as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def main(argv: list[str]) -> None:
    """Do the job ``argv`` = [name, arguments in JSON] and print its figures in one line."""
    name, arguments = argv
    measure = {'images': measure_images, 'processes': measure_processes}[name]
    figures = measure(**json.loads(arguments))  # type: ignore[operator]  # each has arguments of its own
    if figures is not None:
        print(json.dumps(figures), flush=True)


if __name__ == '__main__':
    main(sys.argv[1:])

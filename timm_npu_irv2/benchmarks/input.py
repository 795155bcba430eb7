"""``benchmark.py input``: images/s of training input on one core, by stage, beside timm's and torchvision's loaders.

CPU time is taken, which a busy machine disturbs little: of each stage in this process, and of whole loaders from the
file to the batch in uint8 in the main process, with all their processes. The device normalises.
"""

import argparse
import functools
import io
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import timm.data
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .. import device as devices
from ..data import fast
from ..data.augmentation import Augmentation
from ..data.dataset import ImageDataset
from ..data.decode import read_image
from ..data.folder import ImageFile, find_images
from ..data.loader import create_train_sampler
from ..data.pipeline import ImagePipeline
from ..data.worker import BatchDataset, start_method
from ..distributed import World
from ..errors import UserError
from . import report
from .timing import ratio

__all__ = ['run']

OURS, FAST, TIMM, TORCHVISION = 'pillow', 'fast', 'timm', 'torchvision'
STAGES = ('read', 'decode', 'augment', 'collate')
COLUMNS = (*(f'{stage} µs' for stage in STAGES), 'images/s', "of timm's", 'loader images/s', "of timm's loader")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and return all figures.

    Raises:
        UserError: No images.
    """
    if not args.data_dir:
        raise UserError('name a folder of photographs with --data-dir.')
    files = find_images(args.data_dir)
    files = [files[index % len(files)] for index in range(args.images)]
    found = _candidates(ImagePipeline((3, args.img_size, args.img_size), (0.5,) * 3, (0.5,) * 3))
    stages: dict[str, list[list[float]]] = {name: [] for name in found}
    rates: dict[str, list[float]] = {name: [] for name in found}
    for index in range(args.rounds):
        for name in list(found)[::-1 if index % 2 else 1]:
            torch.manual_seed(index)
            stages[name].append(_stages(found[name], files))
            rates[name].append(_rate(functools.partial(found[name].loader, _Files(files), args)))
    rows = {name: _row(name, stages, rates) for name in found}
    title = f'Training input at {args.img_size} px, {len(set(files))} files, images/s a core'
    report.print_table(title, COLUMNS, rows)
    for name in (FAST, OURS):
        figures = ratio(rates[name], rates[TIMM])
        print(f"  {name}: {figures.median:.2f} of timm's loader ({figures.least:.2f} to {figures.greatest:.2f})")
    decoder = 'simplejpeg' if fast.has_jpeg_decoder() else 'Pillow'
    print(f'  fast decodes JPEG with {decoder}')
    return {'title': title, 'columns': COLUMNS, 'rows': rows, 'stages': stages, 'rates': rates, 'decoder': decoder,
            'device': devices.describe(torch.device('cpu')), 'versions': devices.versions()}


# ------------------------------------------------------------------------------------------------------- candidates


class _Files:
    """Images as a reader of timm's: (file, class index)."""

    def __init__(self, files: Sequence[ImageFile]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return self.files[index].open(), 0

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.files[index].path


@dataclass(frozen=True)
class _Candidate:
    """A way from files to batches: its stages, and the loader that runs them in workers."""

    decode: Callable[[bytes], Any]
    transform: Callable[[Any], Any]
    collate: Callable[[list[Any]], Any]
    loader: Callable[[_Files, argparse.Namespace], DataLoader]


def _candidates(pipeline: ImagePipeline) -> dict[str, _Candidate]:
    augmentation, size = Augmentation(), pipeline.input_size[1:]
    stock = augmentation.transform(pipeline, size)

    def decode(content: bytes) -> Image.Image:
        return read_image(io.BytesIO(content), 'RGB')

    def ours(backend: str, reader: _Files, args: argparse.Namespace) -> DataLoader:
        ways = found[backend]
        sampler = create_train_sampler(len(reader), World(0, 0, 1, torch.device('cpu')), [args.batch_size])
        dataset = ImageDataset(reader, fast=backend == FAST)
        batches = BatchDataset(dataset, [ways.transform], 'RGB', ways.collate, sampler.seed)
        return DataLoader(batches, batch_size=None, sampler=sampler, num_workers=args.workers,
                          multiprocessing_context=start_method(args.workers))

    found = {
        TIMM: _Candidate(decode, stock, timm.data.loader.fast_collate, functools.partial(_timm_loader, pipeline)),
        OURS: _Candidate(decode, stock, timm.data.loader.fast_collate, functools.partial(ours, OURS)),
        FAST: _Candidate(lambda content: fast.read_array(io.BytesIO(content)),
                         augmentation.transform(pipeline, size, fast=True), fast.collate,
                         functools.partial(ours, FAST)),
    }
    return found | _torchvision(size)


def _timm_loader(pipeline: ImagePipeline, reader: _Files, args: argparse.Namespace) -> DataLoader:
    dataset = timm.data.ImageDataset('', reader=reader)
    loader: Any = timm.data.create_loader(
        dataset, pipeline.input_size, args.batch_size, num_workers=args.workers, device=torch.device('cpu'),
        pin_memory=False, **Augmentation().transform_options(pipeline))
    return loader.loader  # without its normalisation


class _TorchvisionFiles(Dataset):
    def __init__(self, reader: _Files, decode: Callable[[bytes], Any], transform: Callable[[Any], Tensor]):
        self.reader, self.decode, self.transform = reader, decode, transform

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, target = self.reader[index]
        with file:
            return self.transform(self.decode(file.read())), target


def _torchvision(size: tuple[int, ...]) -> dict[str, _Candidate]:
    """Return torchvision's decoder and second version of transforms; nothing where its compiled part does not load."""
    from torchvision import io as images  # noqa: PLC0415 - warns where its compiled part does not load
    from torchvision.transforms import v2  # noqa: PLC0415

    def decode(content: bytes) -> Tensor:
        return images.decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), images.ImageReadMode.RGB)

    def loader(reader: _Files, args: argparse.Namespace) -> DataLoader:
        return DataLoader(_TorchvisionFiles(reader, decode, transform), args.batch_size, shuffle=True, drop_last=True,
                          num_workers=args.workers)

    transform = v2.Compose([
        v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4)])
    with io.BytesIO() as file:
        Image.new('RGB', (8, 8)).save(file, 'JPEG')
        try:
            decode(file.getvalue())
        except (RuntimeError, AttributeError):
            print("torchvision's compiled part does not load beside this torch: it is left out.")
            return {}
    return {TORCHVISION: _Candidate(decode, transform, default_collate, loader)}


# ------------------------------------------------------------------------------------------------------ measurements


def _stages(candidate: _Candidate, files: Sequence[ImageFile]) -> list[float]:
    """Return the CPU time of each stage, in seconds an image."""
    seconds: list[float] = []
    contents = _timed(seconds, [functools.partial(_read, file) for file in files])
    images = _timed(seconds, [functools.partial(candidate.decode, content) for content in contents])
    samples = _timed(seconds, [functools.partial(candidate.transform, image) for image in images])
    _timed(seconds, [functools.partial(candidate.collate, [(sample, 0) for sample in samples])])
    return [each / len(files) for each in seconds]


def _read(file: ImageFile) -> bytes:
    with file.open() as opened:
        return opened.read()


def _timed(seconds: list[float], works: Sequence[Callable[[], Any]]) -> list[Any]:
    start = time.process_time()
    results = [work() for work in works]
    seconds.append(time.process_time() - start)
    return results


def _rate(create: Callable[[], DataLoader]) -> float:
    """Return the images per CPU second of a loader and its workers, from their start to their end."""
    start = _cpu_seconds()
    count = sum(len(batch[0]) for batch in create())
    return count / (_cpu_seconds() - start)


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _row(name: str, stages: dict[str, list[list[float]]], rates: dict[str, list[float]]) -> list[Any]:
    totals = {each: [sum(turn) for turn in turns] for each, turns in stages.items()}
    micro = [statistics.median(turn[i] for turn in stages[name]) * 1e6 for i in range(len(STAGES))]
    return [*micro, 1 / statistics.median(totals[name]), ratio(totals[TIMM], totals[name]).median,
            statistics.median(rates[name]), ratio(rates[name], rates[TIMM]).median]

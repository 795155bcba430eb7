"""Samplers: which samples make which batch, and the seeds of what happens to them. Pure functions, without an image.

The order of an epoch depends on (seed, epoch), the augmentation of a sample on (seed, epoch, sample index), mixing and
erasing in a batch on (seed, epoch, batch index). So neither the number of workers nor a restart in the middle of an
epoch changes anything.
"""

import contextlib
import hashlib
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import Sampler

from .. import device as devices

__all__ = ['Batch', 'BatchSampler', 'EvalBatchSampler', 'RankSampler', 'SampleKey', 'ScheduledBatches',
           'TrainBatchSampler', 'UniformBatches', 'derive_seed', 'order_shards', 'preserve_rng_state', 'reseed']

SHUFFLE_WINDOW = 8192  # samples, as timm shuffles shards by default


def derive_seed(*key: int) -> int:
    """Return a 63-bit seed that depends on every integer of ``key`` and on nothing else."""
    digest = hashlib.blake2b(b'/'.join(b'%d' % part for part in key), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def reseed(seed: int, device: torch.device | None = None) -> None:
    """Seed the global generators of Python, NumPy, torch and ``device`` with 63 bits."""
    random.seed(seed)
    np.random.seed((seed & 0xFFFFFFFF, seed >> 32))
    torch.default_generator.manual_seed(seed)
    if device is not None and devices.get_rng_state(device) is not None:
        devices.set_rng_state(device, torch.Generator(device).manual_seed(seed).get_state())


@contextlib.contextmanager
def preserve_rng_state(device: torch.device | None = None) -> Iterator[None]:
    """Restore the global generators at the end of the block."""
    saved = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    saved_device = devices.get_rng_state(device) if device is not None else None
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.default_generator.set_state(saved[2])
        if device is not None:
            devices.set_rng_state(device, saved_device)


def order_shards(lengths: Sequence[int], lanes: int = 1, seed: int | None = None) -> np.ndarray:
    """Return a global order of the samples in shards, which reads each shard from its beginning to its end.

    The shards are laid in a row, which is cut into ``lanes`` of equal length; the lanes take turns, sample by sample.
    So as many processes, of which each takes every ``lanes``-th sample, read different shards, but for those that are
    cut.

    Args:
        lengths: Number of samples in each shard.
        lanes: Number of processes that the order is for. Any number of them can walk it.
        seed: Seed of a shuffle of the shards, and of the samples in a lane: none moves by more than
            ``SHUFFLE_WINDOW`` places. None for no shuffle.

    Returns:
        Indices (N,), int64, where the samples of all shards are numbered in a row.
    """
    counts = torch.as_tensor(lengths, dtype=torch.int64)
    starts = counts.cumsum(0) - counts
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    shards = torch.arange(len(counts)) if generator is None else torch.randperm(len(counts), generator=generator)
    row = torch.cat([torch.arange(int(starts[shard]), int(starts[shard] + counts[shard])) for shard in shards])
    order = torch.empty_like(row)
    for lane, samples in enumerate(row.tensor_split(lanes)):
        if generator is not None:
            delays = SHUFFLE_WINDOW * torch.rand(len(samples), generator=generator, dtype=torch.float64)
            samples = samples[(torch.arange(len(samples)) + delays).argsort(stable=True)]  # noqa: PLW2901 - in another order
        order[lane::lanes] = samples
    return order.numpy()


@dataclass(frozen=True, slots=True)
class SampleKey:
    """One sample of an epoch: its index in the data set, and the number of times that the epoch drew it before."""

    index: int
    repeat: int


@dataclass(frozen=True)
class Batch:
    """One batch as a worker gets it.

    Attributes:
        samples: The samples of the batch.
        epoch: Number of the epoch.
        seed: Seed of what is drawn on the device.
        mixup: True if the batch may be mixed.
        size: Index of the image size among those of the loader.
    """

    samples: Sequence[SampleKey]
    epoch: int = 0
    seed: int = 0
    mixup: bool = False
    size: int = 0


class BatchSampler(Sampler[Batch]):
    """Base class of samplers that yield the batches of an epoch, from any batch on.

    Attributes:
        epoch: Epoch of the next iteration.
        start_batch: First batch of the next iteration.
        mixup_enabled: False switches Mixup off.
        endless: True if an iteration goes on with the next epoch.
        average_batch_size: Expected number of samples in a batch.
        indices: Indices in the data set, in their order, where all epochs are the same; None otherwise.
    """

    endless: bool = False
    average_batch_size: float
    indices: Sequence[int] | None = None

    def __init__(self) -> None:
        self.epoch = self.start_batch = 0
        self.mixup_enabled = True

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose where the next iteration starts."""
        self.epoch, self.start_batch = epoch, start_batch

    def mixes(self, epoch: int) -> bool:
        """Return True if the batches of ``epoch`` may be mixed."""
        return False

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        raise NotImplementedError


class RankSampler(Sampler[SampleKey]):
    """A sampler that yields the share of one process in an epoch, as an endless stream; an epoch takes ``len()`` of it.

    All processes walk one stream of permutations, and each takes every ``world_size``-th place. So the k-th batches of
    all processes together are the k-th batch of a single process with a batch as large as theirs together.

    Args:
        size: Number of samples in the data set.
        rank: Index of this process.
        world_size: Number of processes.
        seed: Seed of the run.
        epoch_repeats: Passes over the data set per epoch, possibly fractional; 0 means one.
        aug_repeats: Number of times each sample comes in a row, so that several processes see one image augmented
            differently, as with timm's ``RepeatAugSampler``. The epoch keeps its length and sees fewer images.
        lengths: Number of samples in each shard, for an order by :func:`order_shards`; empty for any order.
        lanes: Number of processes among which shards are dealt out.
    """

    def __init__(
            self,
            size: int,
            rank: int,
            world_size: int,
            seed: int,
            epoch_repeats: float,
            aug_repeats: float,
            lengths: Sequence[int] = (),
            lanes: int = 1,
    ):
        self.lengths, self.lanes = lengths, lanes
        self.size, self.rank, self.world_size, self.seed = size, rank, world_size, seed
        self.aug_repeats = max(1.0, aug_repeats)
        total = int(size * (epoch_repeats or 1))
        if aug_repeats and total >= 256:  # DeiT's rounding, kept by timm
            self.length = total // 256 * 256 // world_size
        else:
            self.length = math.ceil(total / world_size)
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch of the next iteration, without the first ``start`` samples of this process."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[SampleKey]:
        epoch, turn, order = self.epoch, -1, np.empty(0, np.int64)
        for position in itertools.count(self.rank + self.start * self.world_size, self.world_size):
            item = int(position // self.aug_repeats)
            if item // self.size != turn:
                turn = item // self.size
                order = self._permutation(epoch, turn)
            repeat = position - math.ceil(item * self.aug_repeats)
            yield SampleKey(int(order[item % self.size]), turn * math.ceil(self.aug_repeats) + repeat)

    def _permutation(self, epoch: int, turn: int) -> np.ndarray:
        seed = derive_seed(self.seed, epoch, turn)
        if self.lengths:
            order = order_shards(self.lengths, self.lanes, seed)
        else:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed)).numpy()
        return order.astype(np.uint32) if self.size <= 1 << 32 else order  # half the memory


class UniformBatches:
    """Batches of one image size, as timm's ``ScheduledBatchSampler`` yields them, from any batch on.

    timm draws the size of each batch, and yields the batches before the first one too: of ten million images a resumed
    run would skip the samples one by one.

    Args:
        sampler: Sampler of this process.
        batch_size: Samples in a batch.
        num_batches: Batches in an epoch; None for the whole batches that the sampler has.
    """

    def __init__(self, sampler: RankSampler, batch_size: int, num_batches: int | None = None):
        self.sampler, self.batch_size = sampler, batch_size
        self.num_batches = num_batches or len(sampler) // batch_size
        self.average_batch_size = float(batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def iterate(self, epoch: int, start: int) -> Iterator[list[tuple[SampleKey, int]]]:
        """Yield the batches of an epoch from ``start`` on: lists of (sample, index of its image size)."""
        self.sampler.set_epoch(epoch, start * self.batch_size)
        samples = iter(self.sampler)
        for _ in range(start, self.num_batches):
            yield [(sample, 0) for sample in itertools.islice(samples, self.batch_size)]


class ScheduledBatches(ScheduledBatchSampler):
    """timm's batches of several image sizes, from any batch on."""

    def iterate(self, epoch: int, start: int) -> Iterator[list[tuple[SampleKey, int]]]:
        """Yield the batches of an epoch from ``start`` on: lists of (sample, index of its image size)."""
        self.set_epoch(epoch)
        return itertools.islice(self, start, None)


class TrainBatchSampler(BatchSampler):
    """A sampler of training batches.

    Args:
        schedule: Batches of (sample, size) over a :class:`RankSampler`.
        seed: Seed of the run.
        rank: Index of this process; each one mixes and erases differently.
        mixup_off_epoch: First epoch without Mixup; 0 keeps it on.
        endless: Go on with the next epoch, so that workers do not stand still between epochs.
    """

    def __init__(
            self,
            schedule: UniformBatches | ScheduledBatches,
            seed: int,
            rank: int = 0,
            mixup_off_epoch: int = 0,
            endless: bool = False,
    ):
        super().__init__()
        self.schedule, self.seed, self.rank = schedule, seed, rank
        self.mixup_off_epoch, self.endless = mixup_off_epoch, endless
        self.average_batch_size = schedule.average_batch_size

    def mixes(self, epoch: int) -> bool:
        """Return True if the batches of ``epoch`` may be mixed."""
        return self.mixup_enabled and not 0 < self.mixup_off_epoch <= epoch

    def __len__(self) -> int:
        return len(self.schedule)

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = self.epoch, self.start_batch
        while True:
            yield from self._batches(epoch, start)
            if not self.endless:
                return
            epoch, start = epoch + 1, 0

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        for number, batch in enumerate(self.schedule.iterate(epoch, start), start):
            seed = derive_seed(self.seed, epoch, number, self.rank)
            yield Batch([sample for sample, _ in batch], epoch, seed, self.mixes(epoch), size=batch[0][1])


class EvalBatchSampler(BatchSampler):
    """A sampler of evaluation batches: rank r yields samples r, r + world_size, …, each of them once.

    Args:
        size: Number of samples in the data set.
        rank: Index of this process.
        world_size: Number of processes.
        batch_size: Samples in a batch; the last one may have fewer.
        order: Indices (N,) of all samples in the order in which they are dealt out; None for that of their numbers.
    """

    def __init__(self, size: int, rank: int, world_size: int, batch_size: int, order: np.ndarray | None = None):
        super().__init__()
        every = range(size) if order is None else order.tolist()
        self.indices: Sequence[int] = every[rank::world_size]
        self.batch_size = batch_size
        self.average_batch_size = len(self.indices) / max(len(self), 1)

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(self.start_batch * self.batch_size, len(self.indices), self.batch_size):
            yield Batch([SampleKey(index, 0) for index in self.indices[start:start + self.batch_size]], self.epoch)

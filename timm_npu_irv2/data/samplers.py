"""Which samples make which batch, and the seeds of what happens to them; all pure functions, without an image.

An epoch's order depends on (seed, epoch), a sample's augmentation on (seed, epoch, sample index), what a batch mixes
and erases on (seed, epoch, batch index). So neither the number of workers nor a restart in mid-epoch changes anything.
"""

import contextlib
import hashlib
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import Sampler

from .. import device as devices

__all__ = ['Batch', 'RankSampler', 'SampleKey', 'TrainBatchSampler', 'derive_seed', 'preserve_rng_state', 'reseed']



def derive_seed(*key: int) -> int:
    """A 63-bit seed that depends on every integer of ``key`` and on nothing else."""
    digest = hashlib.blake2b(b'/'.join(b'%d' % part for part in key), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def reseed(seed: int, device: torch.device | None = None) -> None:
    """Seed Python's, NumPy's and torch's global generators, and ``device``'s, with 63 bits."""
    random.seed(seed)
    np.random.seed((seed & 0xFFFFFFFF, seed >> 32))
    torch.default_generator.manual_seed(seed)
    if device is not None and devices.get_rng_state(device) is not None:
        devices.set_rng_state(device, torch.Generator(device).manual_seed(seed).get_state())


@contextlib.contextmanager
def preserve_rng_state(device: torch.device | None = None) -> Iterator[None]:
    """Run a block that may reseed the global generators, and put them back afterwards."""
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


class SampleKey(NamedTuple):
    """One sample of an epoch: its index in the data set, and how many times the epoch has drawn it before."""

    index: int
    repeat: int


@dataclass(frozen=True)
class Batch:
    """What a worker must know to make one batch, and the device to finish it."""

    draws: Sequence[SampleKey]
    epoch: int = 0
    seed: int = 0
    mixup: bool = False
    size: int = 0


class RankSampler(Sampler[SampleKey]):
    """The samples one of several processes sees in an epoch, as an endless stream of which an epoch takes ``len()``.

    All processes walk one stream of permutations, each taking every ``world_size``-th place, so the k-th batches of
    the processes together are the k-th batch of one process with a batch as large as theirs together.

    Args:
        size: Samples in the data set.
        rank: This process among ``world_size``.
        seed: The run's seed.
        epoch_repeats: How often an epoch goes through the data set (0 is once); fractions are fine.
        aug_repeats: How often each sample comes in a row, so that several processes see the same image augmented
            differently, as timm's ``RepeatAugSampler``: an epoch is as long as before and sees fewer images.
    """

    def __init__(self, size: int, rank: int, world_size: int, seed: int, epoch_repeats: float, aug_repeats: float):
        self.size, self.rank, self.world_size, self.seed = size, rank, world_size, seed
        self.aug_repeats = max(1.0, aug_repeats)
        total = int(size * (epoch_repeats or 1))
        if aug_repeats and total >= 256:  # DeiT's rounding, kept by timm
            self.length = total // 256 * 256 // world_size
        else:
            self.length = math.ceil(total / world_size)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[SampleKey]:
        epoch, turn, order = self.epoch, -1, []
        for position in itertools.count(self.rank, self.world_size):
            item = int(position // self.aug_repeats)
            if item // self.size != turn:
                turn = item // self.size
                order = self._permutation(epoch, turn)
            repeat = position - math.ceil(item * self.aug_repeats)
            yield SampleKey(order[item % self.size], turn * math.ceil(self.aug_repeats) + repeat)

    def _permutation(self, epoch: int, turn: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, turn))
        return torch.randperm(self.size, generator=generator).tolist()


class TrainBatchSampler(Sampler[Batch]):
    """The batches of an epoch, from any batch on.

    Args:
        schedule: timm's sampler of (draw, size) batches over an :class:`RankSampler`.
        seed: The run's seed.
        rank: This process: each mixes and erases differently.
        mixup_off_epoch: The first epoch without Mixup; 0 keeps it on.
        endless: Go on with the next epoch by itself, so that workers do not stand still between epochs.
    """

    def __init__(self, schedule: ScheduledBatchSampler, seed: int, rank: int, mixup_off_epoch: int, endless: bool):
        self.schedule, self.seed, self.rank = schedule, seed, rank
        self.mixup_off_epoch, self.endless = mixup_off_epoch, endless
        self.epoch = self.start_batch = 0
        self.mixup_enabled = True

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose where the next iteration starts."""
        self.epoch, self.start_batch = epoch, start_batch

    def mixes(self, epoch: int) -> bool:
        """Whether the batches of an epoch may be mixed."""
        return self.mixup_enabled and not 0 < self.mixup_off_epoch <= epoch

    def __len__(self) -> int:
        return len(self.schedule)

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = self.epoch, self.start_batch
        while True:
            yield from itertools.islice(self._epoch(epoch), start, None)
            if not self.endless:
                return
            epoch, start = epoch + 1, 0

    def _epoch(self, epoch: int) -> Iterator[Batch]:
        self.schedule.set_epoch(epoch)
        for number, batch in enumerate(self.schedule):
            seed = derive_seed(self.seed, epoch, number, self.rank)
            yield Batch([draw for draw, _ in batch], epoch, seed, self.mixes(epoch), size=batch[0][1])

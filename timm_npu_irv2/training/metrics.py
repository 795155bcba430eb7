"""Loss, accuracy and throughput of a training: measured on the device, read when a line of the log is due."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from .. import device as devices
from ..distributed import World, sum_over_ranks

__all__ = ['Meter', 'Throughput']


class Meter:
    """The mean loss and the top-1 accuracy of an epoch's training batches, kept on the device.

    The sums are read, never reset, so when they are read changes nothing, not even the last bit.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._loss = torch.zeros((), device=world.device)
        self._hits = torch.zeros((), device=world.device, dtype=torch.int64)
        self._count = 0
        self._last = torch.zeros(3, dtype=torch.float64)

    def update(self, loss: Tensor, output: Tensor, target: Tensor) -> None:
        """Add a batch: its mean loss, logits (N, C), and class indices (N,) or distributions over classes (N, C)."""
        classes = target.argmax(dim=1) if target.ndim > 1 else target
        self._loss.add_(loss.detach(), alpha=output.shape[0])
        self._hits.add_((output.detach().argmax(dim=1) == classes).sum())
        self._count += output.shape[0]

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return 'loss' and 'top1' (percent) over all processes: since the last reading, and of the epoch.

        This waits for the device.
        """
        own = [self._loss.item(), self._hits.item(), self._count]
        sums = sum_over_ranks(torch.tensor(own, dtype=torch.float64), self._world)
        new, self._last = sums - self._last, sums
        return self._means(new), self._means(sums)

    @staticmethod
    def _means(sums: Tensor) -> dict[str, float]:
        loss, hits, count = sums.tolist()
        return {'loss': loss / max(count, 1), 'top1': 100 * hits / max(count, 1)}

    def state_dict(self) -> dict[str, float]:
        """Return this process's sums, for a checkpoint in mid-epoch."""
        return {'loss': self._loss.item(), 'hits': self._hits.item(), 'count': self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the sums of :meth:`state_dict`."""
        self._loss.fill_(state['loss'])
        self._hits.fill_(state['hits'])
        self._count = state['count']
        own = torch.tensor([state['loss'], state['hits'], state['count']], dtype=torch.float64)
        self._last = sum_over_ranks(own, self._world)


class Throughput:
    """Images a second of all processes, without the first lap of an epoch, in which loaders start and devices warm up.

    Attributes:
        images: Images of the laps that count, since the beginning of the run.
        seconds: Duration of these laps in seconds.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.images, self.seconds = 0, 0.0
        self._at_epoch_start = (0, 0.0)
        self._lap_images, self._lap_start = 0, math.nan

    def start_epoch(self) -> None:
        """Begin an epoch with a lap that does not count."""
        self._at_epoch_start = (self.images, self.seconds)
        self._lap_images, self._lap_start = 0, math.nan

    def count(self, images: int) -> None:
        """Add images that this process has trained on."""
        self._lap_images += images * self._world.size

    def lap(self) -> float:
        """End a lap and return its images a second, 0 for the first lap. This waits for the device."""
        devices.synchronize(self._world.device)
        now = time.perf_counter()
        images, seconds = self._lap_images, now - self._lap_start
        self._lap_images, self._lap_start = 0, now
        if math.isnan(seconds):
            return 0.0
        self.images += images
        self.seconds += seconds
        return images / seconds

    def skip(self) -> None:
        """Leave out the time since the last lap, which was not spent on training."""
        self._lap_start += time.perf_counter() - self._lap_start

    @property
    def of_epoch(self) -> float:
        """Images a second since :meth:`start_epoch`; 0 if nothing was measured."""
        images, seconds = self._at_epoch_start
        return (self.images - images) / (self.seconds - seconds) if self.seconds > seconds else 0.0

    @property
    def images_per_second(self) -> float:
        """Mean images a second of the whole run; 0 if nothing was measured."""
        return self.images / self.seconds if self.seconds else 0.0

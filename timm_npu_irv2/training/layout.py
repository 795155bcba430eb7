"""The division of an update among processes, and its change when a run goes on with another number of them.

An update consists of ``processes × batch size × accumulation`` images, the global batch. All processes together walk
one global order of samples (`data/samplers.py`), and the k-th update takes the k-th part, however it is divided.
So while the global batch stays the same, a run can go on with any other division: the position is a number of samples.
"""

import logging
import math
import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..data.loader import DeviceLoader
from ..distributed import World, agree
from ..errors import UserError
from ..rules import Mismatch
from ..schema import LAYOUT
from ..serialization import peek_checkpoint
from .loaders import mixup_active

__all__ = ['Layout', 'check_layout', 'plan_layout', 'process_batch_size', 'stored_layout']

_logger = logging.getLogger(__name__)

MOST_GROWTH = 8  # of --batch-size, in a proposal


@dataclass(frozen=True)
class Layout:
    """The division of an update among processes.

    Attributes:
        processes: Number of processes.
        batch_size: Images of a process in a batch.
        grad_accum_steps: Batches whose gradients make one update.
        epoch_samples: Samples in an epoch of all processes together; None where an epoch has no global order (streams,
            several image sizes).
        lanes: Number of processes at the beginning of the run, for which shards are dealt out; None in older
            checkpoints.
    """

    processes: int = 1
    batch_size: int = 1
    grad_accum_steps: int = 1
    epoch_samples: int | None = None
    lanes: int | None = None

    @property
    def images_per_batch(self) -> int:
        """Images of all processes in a batch."""
        return self.processes * self.batch_size

    @property
    def global_batch_size(self) -> int:
        """Images of all processes in an update."""
        return self.images_per_batch * self.grad_accum_steps

    def divides_like(self, other: 'Layout') -> bool:
        """Return True if processes, batch size and accumulation are those of ``other``."""
        return replace(self, epoch_samples=None, lanes=None) == replace(other, epoch_samples=None, lanes=None)

    def batches_done(self, samples: int) -> int:
        """Return the batches of an epoch that cover its first ``samples`` samples; whole updates before its end."""
        if self.epoch_samples is not None and samples >= self.epoch_samples:
            return self.batches_per_epoch
        return samples // self.global_batch_size * self.grad_accum_steps

    def with_epoch_of(self, loader: Any) -> 'Layout':
        """Return the layout with the number of samples in the loader's epoch, unless it has one or there is none."""
        if self.epoch_samples is not None or not isinstance(loader, DeviceLoader) or loader.several_sizes:
            return self
        return replace(self, epoch_samples=len(loader) * self.images_per_batch)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of each process in an epoch. The last may need some samples of the next pass over the data."""
        assert self.epoch_samples is not None
        return -(-self.epoch_samples // self.images_per_batch)

    def state_dict(self) -> dict[str, int | None]:
        """Return the entry of a checkpoint."""
        return asdict(self)

    def __str__(self) -> str:
        return (f'{self.processes} process(es) × {self.batch_size} × {self.grad_accum_steps} accumulated = '
                f'{self.global_batch_size}')


def stored_layout(training: Mapping[str, Any], options: Mapping[str, Any]) -> Layout:
    """Return the layout of the run that wrote a checkpoint.

    Args:
        training: Its entry ``training``.
        options: Options of that run. Older checkpoints tell the layout by them, but for the samples in an epoch.

    Raises:
        Mismatch: The entry is malformed.
    """
    if 'layout' in training:
        LAYOUT(training['layout'], 'training.layout')
        return Layout(**{each.name: training['layout'].get(each.name) for each in fields(Layout)})
    processes = len(training['processes'])
    batch_size = options.get('batch_size', 1)
    if options.get('multiprocessing_distributed'):  # of all devices together
        batch_size //= processes
    found = {'processes': processes, 'batch_size': batch_size,
             'grad_accum_steps': max(1, options.get('grad_accum_steps') or 1)}
    LAYOUT(found, 'args')
    return Layout(**found)


def plan_layout(args: Namespace, world: World, checkpoint: Path | None) -> Layout:
    """Return the layout of this run: that of the options, or with --elastic one with the checkpoint's global batch.

    Args:
        args: Options of train.py.
        world: This process among all.
        checkpoint: Checkpoint that the run goes on from, as rank 0 sees it; None for a new run.

    Raises:
        UserError: The images of an update cannot be divided evenly among the processes.
    """
    own = Layout(world.size, process_batch_size(args, world), args.grad_accum_steps, lanes=world.size)
    before = agree(lambda: _peek_layout(checkpoint) if checkpoint else None, world)
    if before is None or args.no_resume_opt:
        if args.elastic:
            _check_numbers_of_machines(own)
        return own
    if args.elastic and own.global_batch_size != before.global_batch_size:
        divided = _divide(before.global_batch_size, world.size, own.batch_size, 2 if mixup_active(args) else 1)
        own = replace(divided, lanes=own.lanes)
        _logger.info(f'Elastic: {own} images in an update, as before.')
    if args.allow_changed_data:
        return own
    return replace(own, epoch_samples=before.epoch_samples, lanes=before.lanes or before.processes)


def process_batch_size(args: Namespace, world: World) -> int:
    """Return the images of a process in a batch: --batch-size, which the zoo's script shares out among the cards."""
    if not args.multiprocessing_distributed:
        return args.batch_size
    if args.batch_size % world.size:
        raise UserError(f'--batch-size {args.batch_size} is of all cards together with --multiprocessing-distributed: '
                        f'it must be a multiple of {world.size}.')
    return args.batch_size // world.size


def _peek_layout(path: Path) -> Layout | None:
    """Return the layout in a checkpoint, without reading its tensors; None where there is none."""
    content = peek_checkpoint(path) or {}
    training, options = content.get('training'), content.get('args')
    if not isinstance(training, dict) or not isinstance(options, dict):
        return None
    try:
        return stored_layout(training, options)
    except (Mismatch, TypeError, KeyError):  # the reader of the whole file will name what is wrong
        return None


def _divide(global_batch_size: int, processes: int, most: int, multiple: int) -> Layout:
    """Return the layout with the largest batches of a process up to ``most`` images, ``multiple`` or more at a time."""
    if global_batch_size % processes:
        fitting = [number for number in range(1, 2 * processes) if global_batch_size % number == 0]
        raise UserError(f'{processes} processes cannot share the {global_batch_size} images of an update evenly: use '
                        f'{" or ".join(map(str, fitting[-2:]))}.')
    share = global_batch_size // processes
    sizes = [size for size in range(1, min(share, most) + 1) if share % size == 0]
    batch_size = max(sizes, key=lambda size: (size % multiple == 0, size))  # Mixup pairs the images of a batch
    return Layout(processes, batch_size, share // batch_size)


def _check_numbers_of_machines(layout: Layout) -> None:
    """Raise UserError if a number of machines that NNODES allows could not share the images of an update evenly."""
    fewest, _, most = os.environ.get('NNODES', '').partition(':')
    local = int(os.environ.get('LOCAL_WORLD_SIZE', '1'))
    if not (fewest.isdecimal() and most.isdecimal()):
        return
    numbers = [nodes * local for nodes in range(int(fewest), int(most) + 1)]
    uneven = [number for number in numbers if layout.global_batch_size % number]
    if not uneven:
        return
    common = math.lcm(*numbers)
    unit = common // math.gcd(common, layout.processes * layout.grad_accum_steps)
    better = -(-layout.batch_size // unit) * unit
    advice = f'--batch-size {better} can be shared by every number of machines.'
    if better > MOST_GROWTH * layout.batch_size:
        advice = 'Let NNODES name fewer numbers of machines.'
    raise UserError(f'NNODES={fewest}:{most}: {uneven[0]} processes cannot share the {layout.global_batch_size} images '
                    f'of an update evenly. {advice}')


def check_layout(path: Any, before: Layout, own: Layout, *, several_sizes: bool = False) -> None:
    """Raise UserError if a run cannot go on from a checkpoint with the layout that it has.

    Args:
        path: Checkpoint, for the message.
        before: Layout of the checkpoint.
        own: Layout of this run.
        several_sizes: True for batches of several image sizes, which are drawn batch by batch.
    """
    if several_sizes and not before.divides_like(own):
        raise UserError(f'{path} belongs to a run with --train-img-sizes and {before} images in an update, not {own}: '
                        'such a run goes on with the same numbers only.')
    if before.global_batch_size == own.global_batch_size:
        return
    raise UserError(
        f'{path} belongs to a run with {before} images in an update, and this one has {own}: choose --batch-size and '
        '--grad-accum-steps so that the images of an update stay the same, let --elastic choose them, or use '
        '--no-resume-opt, which starts a new optimizer from its weights.')

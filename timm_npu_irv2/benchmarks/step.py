"""``benchmark.py step``: the cost of one training step: calls, bytes and memory, counted, and the time of the host."""

import argparse
import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import device as devices
from ..errors import UserError
from . import report
from .candidates import Candidate, Workload, candidates
from .counting import Journal, cost_of
from .timing import ratio, times_in_turn
from .tuned import add_tuned_argument, train_precision, tuned_settings

__all__ = ['COLUMNS', 'add_arguments', 'run']

COLUMNS = ('calls', 'MB an image', 'MB a step', 'peak MB an image', 'synchronizations', 'host ms', 'chip kernels',
           'chip MB an image', 'chip MB a step')
CHIPS = ('910b', '910a', '950')


@dataclass(frozen=True)
class _Counts:
    calls: int
    bytes_per_image: float
    bytes_per_step: float
    synchronizations: int | None
    chip: tuple[int, float, float] | None  # kernels, bytes of an image, bytes of a step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    parser.add_argument('--batch-sizes', type=int, nargs=2, default=(2, 8), metavar='N',
                        help='two batch sizes, to separate bytes per image from bytes per step (default: 2 8)')
    parser.add_argument('--memory-batch-sizes', type=int, nargs=2, default=(16, 24), metavar='N',
                        help='two batch sizes for the peak of memory; not on the CPU (default: 16 24)')
    parser.add_argument('--float32', action='store_true', help='train in float32 instead of 16 bits')
    parser.add_argument('--recompute', action='store_true', help='add this network with --recompute cheap')
    parser.add_argument('--zoo', action='store_true',
                        help="add the recipe of the model zoo's script; only in 16 bits, and with Ascend's apex")
    parser.add_argument('--variants', nargs='+', choices=('default', 'best'), default=['default'],
                        help='default: the network as it comes; best: also with the variants that move the fewest '
                             'bytes on an NPU by count (default: default)')
    parser.add_argument('--chip', choices=CHIPS, default='910b',
                        help="chip whose kernels are counted, on the stand-in for CANN (default: 910b)")
    parser.add_argument('--host-rounds', type=int, default=0, metavar='N',
                        help="also time the host, N times alternately; only where operators take no time: on the "
                             'stand-in with --skip-operators')
    add_tuned_argument(parser, default='off')  # else the counts would depend on a file that nobody sees


def run(args: argparse.Namespace, journal: Journal | None = None) -> dict[str, Any]:
    """Count, print and return all figures.

    Args:
        args: The options.
        journal: Recorder of a device's operators; without it ATen's are counted.
    """
    device = devices.resolve_device(args.device)
    devices.configure(device)
    if args.zoo:
        if args.float32:
            raise UserError("--zoo: the model zoo's recipe is one of 16 bits, so leave --float32 out.")
        devices.apex_amp()  # fails now, not after the others have been counted
    settings = tuned_settings(args.tuned, device, task='train', batch_size=max(args.batch_sizes),
                              img_size=args.img_size, precision=train_precision(device, not args.float32))
    found = candidates(not args.float32, args.recompute, args.zoo, best='best' in args.variants, settings=settings)
    host = _host_time(found, device, args) if args.host_rounds else {}
    rows: dict[str, list[Any]] = {}
    for name, candidate in found.items():
        counts = _count(candidate, device, args, journal)
        rows[candidate.name] = [
            counts.calls, counts.bytes_per_image / 1e6, counts.bytes_per_step / 1e6,
            _peak_per_image(candidate, device, args), counts.synchronizations, host.get(name, {}).get('median_ms'),
            *_chip_columns(counts),
        ]
    unit = f"calls of the NPU's operators and as kernels of {args.chip}" if journal else "ATen's operators"
    precision = 'float32' if args.float32 else '16 bits'
    title = f'A training step at {args.img_size} px, {precision}, {device.type}, counted in {unit}'
    report.print_table(title, COLUMNS, rows)
    for name, figures in host.items():
        if name != 'timm':
            print(f"  host time of {found[name].name}: {figures['ratio']:.3f} of timm's "
                  f"({figures['ratio_min']:.3f} to {figures['ratio_max']:.3f} in {args.host_rounds} rounds)")
    return {'title': title, 'columns': COLUMNS, 'rows': rows, 'host': host, 'device': devices.describe(device),
            'versions': devices.versions()}


def _chip_columns(counts: _Counts) -> tuple[Any, ...]:
    if counts.chip is None:
        return None, None, None
    kernels, image, step = counts.chip
    return kernels, image / 1e6, step / 1e6


def _count(
        candidate: Candidate,
        device: torch.device,
        args: argparse.Namespace,
        journal: Journal | None,
) -> _Counts:
    """Count calls and bytes of a step at two batch sizes: bytes = a * batch + b."""
    small, large = sorted(args.batch_sizes)
    costs = []
    for batch_size in (small, large):
        step = candidate.create(Workload(device, batch_size, args.img_size))
        for _ in range(2):  # the first ones allocate states
            step()
        costs.append(cost_of(step, journal, args.chip, candidate.lazy_fusion))
        del step
        gc.collect()
    chip = None
    if costs[0].chip_kernels is not None:
        chip = (costs[0].chip_kernels.total(), *_split([cost.chip_bytes for cost in costs], small, large))
    image, fixed = _split([cost.bytes for cost in costs], small, large)
    return _Counts(costs[0].calls.total(), image, fixed, costs[0].synchronizations, chip)


def _split(totals: Sequence[int], small: int, large: int) -> tuple[float, float]:
    """Return (bytes an image, bytes a step) from the totals of two batch sizes."""
    image = (totals[1] - totals[0]) / (large - small)
    return image, totals[0] - small * image


def _peak_per_image(candidate: Candidate, device: torch.device, args: argparse.Namespace) -> float | None:
    """Return the growth of the peak of memory with an image, in MB; None on the CPU."""
    peaks = []
    small, large = sorted(args.memory_batch_sizes)
    for batch_size in (small, large):
        if device.type == 'cpu':
            return None
        step = candidate.create(Workload(device, batch_size, args.img_size))
        for _ in range(2):
            step()
        devices.reset_peak_memory(device)
        step()
        peaks.append(devices.peak_memory(device))
        del step
        gc.collect()
    return (peaks[1] - peaks[0]) / (large - small) / 1e6


def _host_time(
        found: dict[str, Candidate],
        device: torch.device,
        args: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Return milliseconds of a step and ratios to timm's, from one step of each in turn."""
    steps = {name: each.create(Workload(device, args.batch_sizes[0], args.img_size)) for name, each in found.items()}
    times = times_in_turn(steps, device, args.host_rounds, warmup=3)
    ratios = {name: ratio(own, times['timm']) for name, own in times.items()}
    return {name: {'median_ms': statistics.median(own) * 1e3, 'ratio': ratios[name].median,
                   'ratio_min': ratios[name].least, 'ratio_max': ratios[name].greatest}
            for name, own in times.items()}

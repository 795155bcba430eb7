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
from .tuned import train_precision, tuned_settings

__all__ = ['COLUMNS', 'run']

COLUMNS = ('calls', 'MB an image', 'MB a step', 'peak MB an image', 'synchronizations', 'host ms', 'chip kernels',
           'chip MB an image', 'chip MB a step')


@dataclass(frozen=True)
class _Counts:
    calls: int
    bytes_per_image: float
    bytes_per_step: float
    synchronizations: int | None
    chip: tuple[int, float, float] | None  # kernels, bytes of an image, bytes of a step


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

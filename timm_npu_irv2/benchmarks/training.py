"""``benchmark.py train``: images a second of training steps, this network's and timm's in turn."""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .. import device as devices
from . import report
from .candidates import Workload, candidates
from .timing import in_turn, ratio
from .tuned import train_precision, tuned_settings

__all__ = ['run']


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and return all figures.

    A round's ratio is ours over timm's; the median over the rounds is the figure to quote.
    """
    device = devices.resolve_device(args.device)
    devices.configure(device)
    settings = tuned_settings(args.tuned, device, task='train', batch_size=args.batch_size, img_size=args.img_size,
                              precision=train_precision(device, args.amp))
    found = candidates(args.amp, compiled=args.compiled, settings=settings)
    workload = Workload(device, args.batch_size, args.img_size)
    steps = {}
    for name, each in found.items():
        print(f'{name} …', file=sys.stderr, flush=True)
        steps[name] = each.create(workload)
        _several(steps[name], max(args.warmup, 1))  # the first step compiles
    rates: dict[str, list[float]] = {name: [] for name in steps}
    turns = {name: functools.partial(_several, step, args.steps) for name, step in steps.items()}
    for index, seconds in enumerate(in_turn(turns, device, args.rounds, warmup=0)):
        for name, own in seconds.items():
            rates[name].append(args.steps * args.batch_size / own)
        print(f'round {index + 1}/{args.rounds}: ' + ', '.join(f'{name} {rates[name][-1]:.2f}' for name in steps)
              + f" images/s, ratio {rates['ours'][-1] / rates['timm'][-1]:.3f}", flush=True)
    return _summary(args, device, rates, {name: each.name for name, each in found.items()})


def _several(step: Callable[[], None], count: int) -> None:
    for _ in range(count):
        step()


def _summary(
        args: argparse.Namespace,
        device: torch.device,
        rates: Mapping[str, list[float]],
        names: Mapping[str, str],
) -> dict[str, Any]:
    half = str(devices.half_dtype(device)).removeprefix('torch.')
    about = devices.describe(device)
    title = (f"Training, {half if args.amp else 'float32'}, batch {args.batch_size}, {args.img_size} px, "
             f"{about['type']} ({about['name']})")
    columns = ('images/s', 'least', 'greatest')
    rows = {names[name]: [statistics.median(own), min(own), max(own)] for name, own in rates.items()}
    report.print_table(title, columns, rows)
    pairs = [('ours', 'timm')]
    if args.compiled:
        pairs += [('ours, compiled', 'timm, compiled'), ('ours', 'timm, compiled')]
    ratios = {f'{own} / {other}': ratio(rates[own], rates[other]) for own, other in pairs}
    for label, each in ratios.items():
        print(f'  ratio {each.median:.3f} (from {each.least:.3f} to {each.greatest:.3f} in {args.rounds} rounds), '
              f'{label}')
    first = ratios['ours / timm']
    return {'title': title, 'columns': columns, 'rows': rows, 'ratio': first.median, 'ratio_min': first.least,
            'ratio_max': first.greatest, 'ratios': {label: each._asdict() for label, each in ratios.items()},
            'rounds': {names[name]: own for name, own in rates.items()}, 'device': about,
            'versions': devices.versions()}

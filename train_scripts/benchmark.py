#!/usr/bin/env python3
"""Measure this network against timm's, alternately in one run, and print ratios.

    python train_scripts/benchmark.py train --amp          # a training step
    python train_scripts/benchmark.py infer --img-size 299 # a forward pass

The two networks take turns, so that whatever slows the machine slows both. A round times both; the ratio of a round is
ours over timm's, and the median over the rounds is the figure to quote, with the lowest and the highest beside it.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from torch import nn

from timm_npu_irv2 import UserError
from timm_npu_irv2 import device as device_seam

OURS, REFERENCE = 'inception_resnet_v2_npu', 'inception_resnet_v2'


@dataclass(frozen=True)
class Result:
    """Images per second of the rounds, and what the rounds say about the ratio."""

    command: str
    device: dict
    precision: str
    batch_size: int
    img_size: int
    images_per_second: dict[str, list[float]]
    ratio: float
    ratio_min: float
    ratio_max: float
    versions: dict[str, str]


def create_step(name: str, args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """One training step or one forward pass of network ``name`` on random images, as a function."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=1000).to(device, memory_format=device_seam.memory_format(device))
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    x = x.contiguous(memory_format=device_seam.memory_format(device))
    y = torch.randint(1000, (args.batch_size,), device=device)
    dtype = device_seam.half_dtype(device) if args.amp else None
    if args.command == 'infer':
        model.eval()

        def infer() -> None:
            with torch.inference_mode(), device_seam.autocast(device, dtype):
                model(x)
        return infer

    model.train()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def train() -> None:
        with device_seam.autocast(device, dtype):
            loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return train


def images_per_second(step: Callable[[], None], args: argparse.Namespace, device: torch.device) -> float:
    """The mean over ``args.steps`` steps, the device's queue emptied before and after."""
    device_seam.synchronize(device)
    start = time.perf_counter()
    for _ in range(args.steps):
        step()
    device_seam.synchronize(device)
    return args.steps * args.batch_size / (time.perf_counter() - start)


def measure(args: argparse.Namespace) -> Result:
    """Warm both networks up, then let them take turns; who begins changes from round to round."""
    device = device_seam.resolve_device(args.device)
    device_seam.configure(device)
    steps = {name: create_step(name, args, device) for name in (OURS, REFERENCE)}
    for step in steps.values():
        for _ in range(args.warmup):
            step()
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(args.rounds):
        for name in sorted(steps, reverse=index % 2 == 0):
            rates[name].append(images_per_second(steps[name], args, device))
        print(f'round {index + 1}/{args.rounds}: ' + ', '.join(f'{name} {rates[name][-1]:.2f}' for name in steps)
              + f' images/s, ratio {rates[OURS][-1] / rates[REFERENCE][-1]:.3f}', flush=True)
    ratios = [ours / reference for ours, reference in zip(rates[OURS], rates[REFERENCE], strict=True)]
    return Result(
        args.command, device_seam.describe(device),
        f'autocast {device_seam.half_dtype(device)}'.replace('torch.', '') if args.amp else 'float32',
        args.batch_size, args.img_size, rates, statistics.median(ratios), min(ratios), max(ratios),
        device_seam.versions(),
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=['train', 'infer'], help='what to measure')
    parser.add_argument('--device', default=None, help='npu, cuda or cpu (default: the best there is)')
    parser.add_argument('--amp', action='store_true', help='autocast in the 16-bit type of the device')
    parser.add_argument('-b', '--batch-size', type=int, default=8, help='images in a batch (default: 8)')
    parser.add_argument('--img-size', type=int, default=299, help='height and width of an image (default: 299)')
    parser.add_argument('--rounds', type=int, default=7, help='turns of each network (default: 7)')
    parser.add_argument('--steps', type=int, default=3, help='steps in a turn (default: 3)')
    parser.add_argument('--warmup', type=int, default=2, help='steps before the first turn (default: 2)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all figures there')
    args = parser.parse_args(argv)
    if min(args.batch_size, args.rounds, args.steps) < 1 or args.warmup < 0 or args.img_size < 75:
        parser.error('batch size, rounds and steps must be at least 1, images at least 75 px')
    return args


def main() -> int:
    """Measure, print, write; the exit code."""
    args = parse_args()
    try:
        result = measure(args)
    except UserError as error:
        print(f'benchmark.py: error: {error}', file=sys.stderr)
        return 2
    print(f'\n{result.command}, {result.precision}, batch {result.batch_size}, {result.img_size} px, '
          f'{result.device["type"]} ({result.device["name"]})')
    for name, rates in result.images_per_second.items():
        print(f'  {name:26s} {statistics.median(rates):8.2f} images/s (median of {len(rates)} rounds)')
    print(f'  ratio {result.ratio:.3f} (from {result.ratio_min:.3f} to {result.ratio_max:.3f})')
    if args.json:
        args.json.write_text(json.dumps(asdict(result), indent=2) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())

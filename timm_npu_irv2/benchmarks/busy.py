"""``benchmark.py busy``: images a second of train.py and of the launcher in turn, beside busy loops."""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import device as devices
from ..cli.main import scripts_dir
from ..errors import UserError
from . import report
from .timing import ratio

__all__ = ['run']


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and return the figures; the ratio is the time of train.py over that of the launcher."""
    scripts = scripts_dir()
    ways = {'python train.py': [sys.executable, str(scripts / 'train.py')],
            'dist_train_npu.sh 1': ['bash', str(scripts / 'dist_train_npu.sh'), '1']}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder, _busy_loops(args.loops):
        _write_images(Path(folder) / 'images', args.batch_size * args.steps)
        for index in range(args.rounds):
            for name in list(ways)[::-1 if index % 2 else 1]:
                rates[name].append(_train(ways[name], Path(folder), f'{index}-{len(name)}', args))
            print(f'round {index + 1}/{args.rounds}: '
                  + ', '.join(f'{name} {own[-1]:.2f}' for name, own in rates.items()) + ' images/s', flush=True)
    title = (f'Training beside {args.loops} busy loops, batch {args.batch_size}, {args.img_size} px, '
             f'{os.cpu_count()} cores')
    columns = ('images/s', 'least', 'greatest')
    rows = {name: [statistics.median(own), min(own), max(own)] for name, own in rates.items()}
    report.print_table(title, columns, rows)
    found = ratio(rates['dist_train_npu.sh 1'], rates['python train.py'])
    print(f'  ratio of the times {found.median:.3f} (from {found.least:.3f} to {found.greatest:.3f})')
    return {'title': title, 'columns': columns, 'rows': rows, 'ratio': found.median, 'ratio_min': found.least,
            'ratio_max': found.greatest, 'rounds': rates, 'versions': devices.versions()}


@contextlib.contextmanager
def _busy_loops(count: int) -> Iterator[None]:
    """Keep ``count`` processes computing during the block."""
    loops = [subprocess.Popen([sys.executable, '-S', '-c', 'while True: pass']) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def _write_images(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    for index in range(count):
        path = folder / 'train' / f'class{index % 2}' / f'{index}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)


def _train(start: list[str], folder: Path, name: str, args: argparse.Namespace) -> float:
    """Return the images a second of a run, whose variables for threads are those that the way of starting sets."""
    words = ['--data-dir', str(folder / 'images'), '--output', str(folder), '--experiment', name, '--epochs', '1',
             '--val-split', '', '--img-size', str(args.img_size), '-b', str(args.batch_size), '-j', '1', '--device',
             args.device or 'cpu']
    own = {key: value for key, value in os.environ.items() if key not in ('GOMP_SPINCOUNT', 'OMP_NUM_THREADS')}
    done = subprocess.run([*start, *words], capture_output=True, text=True, check=False,
                          env={**own, 'PYTHON': sys.executable})
    if done.returncode != 0:
        raise UserError(f'{" ".join(start)} failed: {(done.stderr.strip().splitlines() or ["no message"])[-1]}')
    figures = json.loads((folder / name / 'report.json').read_text())
    for path in (folder / name).glob('*.pth.tar'):  # half a gigabyte each
        path.unlink()
    return figures['images_per_second']

"""``benchmark.py growth``: time and memory by the numbers of listed images, of processes and of classes.

The processes train on the CPU unless --device names other devices, of which each has one. The images are links to a few
small files, so ten million of them take directory entries only. Each row is measured in processes of its own.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import device as devices
from ..errors import UserError
from ..rendezvous import serve_on_loopback
from . import report

__all__ = ['make_images', 'run']

LINKS = 30_000  # to one file; file systems allow 65000 or more
IMAGE_COLUMNS = ('search s', 'hash s', 'first batch s', 'total s', 'CPU s', 'main MB', 'worker MB', 'shared out MB',
                 'alone MB')
PROCESS_COLUMNS = ('joined s', 'trained s', 'step ms', 'step CPU ms', 'small sum ms', 'checkpoint ms', 'evaluation ms',
                   'collectives', 'numbers')


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and return all figures.

    Raises:
        UserError: The images cannot be made, or a process failed.
    """
    images = {str(count): _images_row(args, count) for count in args.images}
    processes = {f'{count} × {classes} classes': _processes_row(args, count, classes)
                 for count, classes in _pairs(args.processes, args.classes)}
    found = {'title': 'Listed images', 'columns': IMAGE_COLUMNS, 'rows': images}
    if images:
        report.print_table('Listed images: seconds and MB (one worker)', IMAGE_COLUMNS, images)
    if processes:
        report.print_table('Processes', PROCESS_COLUMNS, processes)
    return {**found, 'processes': {'columns': PROCESS_COLUMNS, 'rows': processes}, 'cores': os.cpu_count(),
            'versions': devices.versions()}


def _pairs(processes: Sequence[int], classes: Sequence[int]) -> list[tuple[int, int]]:
    return [(count, classes[0]) for count in processes] + [(2, count) for count in classes[1:] if processes]


def _images_row(args: argparse.Namespace, count: int) -> list[float]:
    try:
        with tempfile.TemporaryDirectory(dir=args.folder, prefix='growth-') as root:
            make_images(Path(root), count)
            turns = [_answer([_job('images', root=root, batch_size=args.batch_size, batches=args.steps)])
                     for _ in range(args.rounds)]
    except OSError as error:
        raise UserError(f'--images {count}: {error.strerror}: name a folder with room for {count} files with '
                        '--folder.') from error
    best = min(turns, key=lambda turn: turn['total'])
    print(f'{count} images: {best["total"]:.2f} s to the first batch', flush=True)
    memory = ('main peak', 'worker', 'worker shared out', 'worker alone')
    return [*(best[name] for name in ('search', 'fingerprint', 'first batch', 'total', 'CPU')),
            *(best[name] / 1e6 for name in memory)]


def _processes_row(args: argparse.Namespace, count: int, classes: int) -> list[float | None]:
    turns = []
    for _ in range(args.rounds):
        job = _job('processes', device=args.device or 'cpu', classes=classes, steps=args.steps,
                   batch_size=args.batch_size, images=64 * args.batch_size, started=time.monotonic())
        turns.append(_answer([job] * count))
    print(f'{count} processes, {classes} classes: done', flush=True)
    best = {name: min(turn[name] for turn in turns) for name in turns[0]}
    milliseconds = ('step', 'step CPU', 'small sum', 'checkpoint', 'evaluation')
    return [best['joined'], best['first epoch'], *(best[name] * 1e3 for name in milliseconds),
            best.get('collectives'), best.get('elements')]


def make_images(root: Path, count: int) -> None:
    """Make train/<class>/<image> in ``root``, in up to 1000 classes.

    Args:
        root: Folder.
        count: Number of images, which are links to files of 32 × 32 pixels.
    """
    classes = min(1000, max(1, count // 10))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    source = ''
    for number in range(count):
        name = f'n{number % classes:08}'
        folder = f'{root}/train/{name}'
        if number < classes:
            os.makedirs(folder)  # noqa: PTH103 - a Path for each of a million files is slow
        path = f'{folder}/{name}_{number // classes}.png'
        if number % LINKS:
            os.link(source, path)
        else:
            Image.fromarray(pixels).save(path)
            source = path


def _job(name: str, **arguments: Any) -> list[str]:
    return [sys.executable, '-m', f'{__package__}.growth_worker', name, json.dumps(arguments)]


def _answer(commands: Sequence[list[str]]) -> dict[str, Any]:
    """Return what the first of several processes prints, which meet in a store of this process."""
    store, port = serve_on_loopback(0, timedelta(minutes=5))
    world = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'TORCHELASTIC_USE_AGENT_STORE': 'True',
             'WORLD_SIZE': str(len(commands)), 'OMP_NUM_THREADS': '1'}
    with contextlib.ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile('w+')) for _ in commands]
        every = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors[rank], text=True, env={
                **os.environ, **world, 'RANK': str(rank), 'LOCAL_RANK': str(rank)})
            for rank, command in enumerate(commands)
        ]
        try:
            outputs = [process.communicate()[0] for process in every]
        finally:
            for process in every:
                process.kill()
                process.wait()
        for process, file in zip(every, errors, strict=True):
            if process.returncode:
                file.seek(0)
                raise UserError(f'a process failed: {(file.read().strip().splitlines() or ["no message"])[-1]}')
    del store  # until now the processes have used it
    return json.loads(outputs[0].splitlines()[-1])

"""Training jobs that are killed at random moments and started again, and how their outcomes differ."""

import contextlib
import csv
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from timm_npu_irv2.serialization import read_checkpoint

from .ascend.environment import environment, running_on
from .conftest import reserved_port

SCRIPT = Path(__file__).parents[1] / 'train_scripts' / 'train.py'
USUAL = (
    '--img-size 64 --num-classes 3 --batch-size 4 --epochs 3 --warmup-epochs 1 --lr 0.02 --log-interval 3 '
    '--recovery-interval 2 --checkpoint-hist 2 --on-bad-image skip').split()
# Between them: every kind of state that a checkpoint must hold.
RECIPES = {
    'half weights': '--model test_resnet --opt-level O2 --model-ema --mixup 0.2 --cutmix 0.5 --drop 0.2 --reprob 0.3',
    'dynamic scale': '--model test_resnet --amp --amp-dtype float16 --loss-scale dynamic --opt adamw '
                     '--aa rand-m5-mstd1 --sched-on-updates',
    'plateau': '--model test_resnet --sched plateau --patience-epochs 0 --grad-accum-steps 2 --opt lookahead_sgd '
               '--use-multi-epochs-loader --model-ema --model-ema-warmup',
    'this network': '--model inception_resnet_v2_npu --img-size 75 --opt npufusedsgd --train-batches-per-epoch 5',
}


def random_recipe(seed: int) -> tuple[str, int]:
    """Return options drawn at random, and a number of processes."""
    draw = random.Random(seed)
    processes = draw.choice((1, 1, 2, 2, 3))
    precision = draw.choice((
        '', '--amp', '--opt-level O2', '--opt-level O2 --loss-scale 128', '--amp --amp-dtype float16',
        '--model-dtype bfloat16'))
    second_order = ['adahessian'] if not precision and processes == 1 else []
    opt = draw.choice([
        'sgd', 'npufusedsgd', 'npufusedadamw', 'lookahead_sgd', 'lookahead_adamw', 'adamw', 'lamb', 'rmsproptf', 'lion',
        'nadamw', 'adafactorbv', 'radam', 'madgrad', *second_order])
    schedule = draw.choice((
        'cosine', 'cosine --sched-on-updates', 'cosine --lr-noise 0.2 0.9', 'step --decay-epochs 1', 'tanh', 'poly',
        'plateau --patience-epochs 0', 'plateau --patience-epochs 0 --lr-noise 0.2', 'none'))
    words = [
        '--model test_resnet', precision, f'--opt {opt}', f'--sched {schedule}',
        '--lr 0.02' if opt.endswith('sgd') else '--lr 0.0005',
        draw.choice(('', '', '--model-ema', '--model-ema --model-ema-warmup', '--model-ema --model-ema-force-cpu')),
        draw.choice(('', '', '--grad-accum-steps 2', '--grad-accum-steps 3')),
        draw.choice(('', '--mixup 0.2', '--cutmix 0.5', '--mixup 0.2 --cutmix 0.5 --mixup-mode elem')),
        draw.choice(('', '--drop 0.2', '--reprob 0.3 --aa rand-m5-mstd1', '--smoothing 0 --bce-loss')),
        draw.choice(('', '--clip-grad 1', '--clip-grad 0.1 --clip-mode agc')) if opt != 'adahessian' else '',
        draw.choice(('', '--use-multi-epochs-loader')),
        draw.choice(('', '--no-ddp-bb', '--no-ddp-bb --dist-bn broadcast')) if processes > 1 else '',
    ]
    return ' '.join(word for word in words if word), processes


def write_images(root: Path) -> Path:
    """Three classes, 26 images to train with and 11 to validate with, one broken among each; ``root``."""
    generator = np.random.default_rng(0)
    for split, count in (('train', 26), ('val', 11)):
        for number in range(count):
            path = root / split / f'class{number % 3}' / f'{number}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(path)
        (root / split / 'class1' / 'broken.jpg').write_bytes(b'\xff\xd8 this is no image')
    return root


def write_shards(images: Path, root: Path) -> Path:
    """The images of :func:`write_images` in shards of 1 to 7 samples with _info.json: train-0.tar, …, val-0.tar, …"""
    root.mkdir()
    splits: dict[str, Any] = {}
    for split in 'train', 'val':
        paths = sorted((images / split).rglob('*.*'), key=lambda path: int(path.stem) if path.stem.isdecimal() else 5)
        for shard, lengths in enumerate(itertools.cycle((7, 1, 4))):
            with tarfile.open(root / f'{split}-{shard}.tar', 'w') as archive:
                for path in paths[:lengths]:
                    label = path.parent.name.removeprefix('class').encode()
                    for name, content in ((path.name, path.read_bytes()), (f'{path.stem}.cls', label)):
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
            split_info = splits.setdefault(split, {'filenames': [], 'shard_lengths': []})
            split_info['filenames'].append(f'{split}-{shard}.tar')
            split_info['shard_lengths'].append(len(paths[:lengths]))
            paths = paths[lengths:]
            if not paths:
                break
    (root / '_info.json').write_text(json.dumps({'splits': splits}))
    return root


SHARDS = '--dataset wds/x --train-split train-{0..6}.tar --val-split val-{0..2}.tar'


class Job:
    """A training job of one or more processes in an output folder, started as often as need be."""

    def __init__(self, images: Path | str, folder: Path, words: str, processes: int, device: str) -> None:
        self.folder, self.processes = folder, processes
        self.options = [*USUAL, *words.split(), '--device', device, '--data-dir', str(images), '--output',
                        str(folder.parent), '--experiment', folder.name, '--resume', 'auto']
        self.log = folder.with_suffix('.log')
        self._ports = contextlib.ExitStack()  # they are held as long as this object lives

    def start(self, workers: int) -> list[subprocess.Popen]:
        port = self._ports.enter_context(reserved_port())
        usual = {**os.environ, 'OMP_NUM_THREADS': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port),
                 'WORLD_SIZE': str(self.processes)}
        if running_on() is not None:
            usual = environment(running_on(), base=usual)  # without the journals of this process
        command = [sys.executable, str(SCRIPT), *self.options, '--workers', str(workers)]
        with self.log.open('a') as log:
            return [
                subprocess.Popen(command, stdout=log, stderr=log, env={
                    **usual, **({'RANK': str(rank), 'LOCAL_RANK': str(rank)} if self.processes > 1 else {})})
                for rank in range(self.processes)
            ]

    def finish(self, workers: int) -> None:
        for process in self.start(workers):
            assert process.wait(timeout=9000) == 0, self.log.read_text()

    def kill(self, workers: int, delay: float, choose: random.Random) -> bool:
        """Start, and kill one process ``delay`` seconds after training has begun; whether it was still running."""
        begun = time.time()
        job = self.start(workers)
        mark = self.folder / 'args.yaml'
        while not (mark.exists() and mark.stat().st_mtime >= begun - 0.01):
            assert all(process.poll() is None for process in job), self.log.read_text()
            time.sleep(0.02)
        time.sleep(delay)
        victim = choose.choice(job)
        victim.send_signal(signal.SIGKILL)
        for process in job:
            code = process.wait(timeout=3000)  # the others notice that one is gone
            assert code in ((0, -signal.SIGKILL) if process is victim else (0, 2)), self.log.read_text()
        return victim.returncode == -signal.SIGKILL


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for the times."""
    report = json.loads((folder / 'report.json').read_text())
    for key in ('seconds', 'images_per_second'):
        del report[key]
    del report['last_epoch']['images_per_second']
    with (folder / 'summary.csv').open(newline='') as file:
        summary = [row for row in csv.DictReader(file) if row.pop('images_per_second') is not None]
    states = {path.name: state_of(path) for path in folder.glob('*.pth.tar') if not path.name.startswith('recovery-')}
    return {'report': report, 'summary': summary, 'states': states}


def state_of(path: Path) -> dict[str, Any]:
    state = read_checkpoint(path)
    for key in ('args', 'seconds'):
        del state[key]
    del state['training']['throughput'], state['saver']['resumptions']
    return state


def differences(one: Any, other: Any, where: str = '') -> list[str]:
    """Where two nests of containers and tensors differ in a bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f'{where}/{key}')]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for index, (a, b) in pairs for found in differences(a, b, f'{where}/{index}')]
    return [] if one == other else [f'{where}: {one!r} is not {other!r}'[:300]]


def check(
        images: Path | str,
        folder: Path,
        recipe: str,
        *,
        processes: int = 1,
        runs: int = 1,
        kills: int = 1,
        seed: int = 7,
        device: str = 'cpu',
) -> int:
    """Disturb ``runs`` runs by ``kills`` kills each; how many kills met a running process.

    ``recipe`` is one of ``RECIPES``, or options of train.py.
    """
    choose = random.Random(seed)
    words = RECIPES.get(recipe, recipe)
    undisturbed = Job(images, folder / 'undisturbed', words, processes, device)
    undisturbed.finish(workers=0)
    expected = outcome(undisturbed.folder)
    seconds = json.loads((undisturbed.folder / 'report.json').read_text())['seconds'] - 1  # without the preparations
    met = 0
    for number in range(runs):
        job = Job(images, folder / f'run{number}', words, processes, device)
        for _ in range(kills):
            met += job.kill(choose.choice((0, 1, 2)), choose.uniform(0, max(1.0, seconds) / (kills + 1)), choose)
        job.finish(choose.choice((0, 1, 2)))
        assert not differences(outcome(job.folder), expected), (number, differences(outcome(job.folder), expected)[:5])
        assert not list(job.folder.glob('.*.part'))
        log = job.log.read_text()
        assert 'Traceback' not in log, log[log.index('Traceback'):]
    print(f'{recipe}, {processes} process(es): {runs} runs, {met} of {runs * kills} kills met a running process')
    return met



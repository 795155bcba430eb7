"""Fixtures and helpers of the hub's tests: a run, its exports, and a server that stands for the hub."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image

from tests.conftest import OURS, REFERENCE, fill
from tests.hub.server import TOKEN, HubServer
from timm_npu_irv2 import hub, weights

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ['ant', 'bee', 'cat', 'dog']
FILES = {'model.safetensors', 'config.json', 'README.md', 'curves.png'}
ARGS = {
    'model': OURS, 'num_classes': 4, 'img_size': 96, 'mean': [0.4, 0.5, 0.6], 'std': [0.2, 0.2, 0.2], 'crop_pct': 0.9,
    'interpolation': 'bilinear', 'opt': 'adamw', 'lr': 0.001, 'hflip': 0.0, 'data_dir': '/secret/place', 'gp': None,
    'output': '/secret/place', 'amp': False, 'amp_impl': 'native', 'val_split': 'validation', 'model_kwargs': {},
}
REPORT = {
    'top1': 91.25, 'top5': 99.5, 'loss': 0.3, 'best_epoch': 3, 'epochs': 6, 'seconds': 7200.0, 'world_size': 8,
    'last_epoch': {'epoch': 5, 'eval_top1': 90.5, 'eval_top5': 99.0, 'eval_loss': 0.31},
    'device': {'type': 'npu', 'name': 'Ascend910B'}, 'precision': 'O2', 'versions': {'torch': '2.9.0'},
}

@pytest.fixture(scope='session')
def state_dict() -> dict[str, torch.Tensor]:
    """Weights of timm's network with four classes."""
    torch.manual_seed(0)
    return fill(timm.create_model(REFERENCE, num_classes=4)).state_dict()


@pytest.fixture(scope='session')
def run(state_dict, tmp_path_factory) -> Path:
    """The output folder of a training run: a checkpoint as train.py writes it, and its report."""
    folder = tmp_path_factory.mktemp('run')
    save_checkpoint(folder / 'last.pth.tar', state_dict, epoch=5)
    (folder / 'report.json').write_text(json.dumps(REPORT))
    Image.new('RGB', (8, 8)).save(folder / 'curves.png')
    return folder


def training_entry(**more) -> dict:
    """What train.py's checkpoints hold under 'training'."""
    version, values, following = random.getstate()
    process = {'meter': {'loss': 0.5, 'hits': 3, 'count': 8}, 'random': {
        'torch': torch.get_rng_state(), 'device': None, 'python': (version, values, following),
        'numpy': ('MT19937', torch.zeros(624, dtype=torch.int64), 3, 0, 0.0)}}
    return {
        'position': {'epoch': 6, 'batch': 0, 'updates': 12}, 'num_classes': 4, 'scheduler': None,
        'class_to_idx': {name: index for index, name in enumerate(CLASSES)}, 'throughput': (96, 1.5),
        'skipped': (0, 0), 'processes': [process], **more}


def save_checkpoint(path: Path, state_dict, epoch: int, **more) -> Path:
    torch.save({
        'epoch': epoch, 'version': 2, 'arch': OURS, 'args': ARGS, 'state_dict': weights.convert(state_dict, to='npu'),
        'training': training_entry(), **more}, path)
    return path


@pytest.fixture(scope='session')
def published(run, tmp_path_factory) -> Path:
    """An export in this package's dialect."""
    return hub.export(run / 'last.pth.tar', tmp_path_factory.mktemp('export') / 'insects', datasets=['owner/insects'])


@pytest.fixture(scope='session')
def for_timm(run, tmp_path_factory) -> Path:
    """An export for stock timm."""
    return hub.export(run / 'last.pth.tar', tmp_path_factory.mktemp('export') / 'insects-timm', target='timm')


@pytest.fixture
def server():
    started = HubServer()
    yield started
    started.stop()


@pytest.fixture
def online(server, tmp_path, monkeypatch) -> HubServer:
    """This process talks to the server, with a token and an empty cache."""
    monkeypatch.setattr(constants, 'ENDPOINT', server.url)
    template = server.url + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setattr(huggingface_hub.hf_api.api, 'endpoint', server.url)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    return server


def environment(server: HubServer, cache: Path, **more: str) -> dict[str, str]:
    """As a user would set it."""
    return {**os.environ, 'HF_ENDPOINT': server.url, 'HF_HOME': str(cache), 'HF_TOKEN': TOKEN,
            'HF_HUB_DISABLE_XET': '1', 'OMP_NUM_THREADS': '1',
            'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}', **more}


def python(code: str, *args: object, env=None, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True,
                          check=False, env=env, cwd=cwd)


def command(*args: object, env=None, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-m', 'timm_npu_irv2.hub', *map(str, args)], capture_output=True, text=True,
                          check=False, env=env, cwd=cwd)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def images() -> torch.Tensor:
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model.eval()(images())

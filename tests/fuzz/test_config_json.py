"""A config.json with changed contents: a line that says what is wrong, or a network that works."""

import json
import os
from pathlib import Path

import pytest
import timm
import torch

from timm_npu_irv2 import deploy, hub
from timm_npu_irv2.deploy.store import load, save
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.serialization import save_weights

from .mutations import fuzz, mutated
from .test_checkpoint_contents import one_line

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='session')
def published(tmp_path_factory) -> Path:
    """An export, in half precision, with all that a config.json may say."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('published')
    model = timm.create_model('inception_resnet_v2_npu', num_classes=2)
    save_weights(model.state_dict(), folder / 'a.pth')
    return hub.export(folder / 'a.pth', folder / 'export', dtype='float16')


@pytest.fixture(scope='session')
def deployed(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    network = deploy.to_inference(timm.create_model('inception_resnet_v2_npu', num_classes=2), dtype=torch.bfloat16)
    network.pretrained_cfg['label_names'] = ['a', 'b']
    return save(network, tmp_path_factory.mktemp('deployed'))


def beside(folder: Path, tmp_path_factory, config: dict) -> Path:
    """A folder with the same weights and another config.json."""
    other = tmp_path_factory.mktemp('fuzz')
    os.link(folder / 'model.safetensors', other / 'model.safetensors')
    (other / 'config.json').write_text(json.dumps(config))
    return other


def remove(folder: Path) -> None:
    for each in folder.iterdir():
        each.unlink()
    folder.rmdir()


def check_publication(data, tmp_path_factory, published) -> None:
    config = json.loads((published / 'config.json').read_text())
    config |= {'label_names': ['a', 'b'], 'label_descriptions': {'a': 'A', 'b': 'B'}}
    folder = beside(published, tmp_path_factory, mutated(config, data, tensors=False))
    try:
        for reader in (hub.from_pretrained, lambda path: hub.create_model(f'local-dir:{path}', pretrained=True)):
            try:
                reader(folder)
            except UserError as error:
                one_line(error)
    finally:
        remove(folder)


test_publication, test_publication_for_long = fuzz(8, 0.05)(check_publication)


def check_deployment(data, tmp_path_factory, deployed) -> None:
    config = mutated(json.loads((deployed / 'config.json').read_text()), data, tensors=False)
    folder = beside(deployed, tmp_path_factory, config)
    try:
        network = load(folder, device='cpu')
    except UserError as error:
        return one_line(error)
    finally:
        remove(folder)
    assert network.num_classes == 2 and len(network.pretrained_cfg.get('label_names') or 'ab') == 2
    return None


test_deployment, test_deployment_for_long = fuzz(8, 0.05)(check_deployment)

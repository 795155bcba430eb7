"""Networks from published weights and from checkpoints."""

import json
import shutil

import huggingface_hub
import pytest
import timm
import torch

from tests.conftest import OURS
from timm_npu_irv2 import hub, serialization
from timm_npu_irv2.errors import UserError

from .conftest import CLASSES

pytestmark = pytest.mark.filterwarnings('ignore')


def test_weights_are_adapted_to_another_head_and_stem(published, state_dict):
    model = hub.from_pretrained(published, num_classes=7, in_chans=1)
    assert model.classif.out_features == 7 and model.conv2d_1a.conv.in_channels == 1
    expected = state_dict['conv2d_1a.conv.weight'].sum(1, keepdim=True)
    assert torch.allclose(model.conv2d_1a.conv.weight, expected, atol=1e-6)


def test_a_checkpoint_brings_its_preprocessing_and_its_labels(run, state_dict):
    model = hub.create(run / 'last.pth.tar')
    cfg = model.pretrained_cfg
    assert cfg['label_names'] == CLASSES and cfg['input_size'] == (3, 96, 96) and 'state_dict' not in cfg
    assert cfg['mean'] == [0.4, 0.5, 0.6] and cfg['crop_pct'] == 0.9
    assert torch.equal(model.classif.weight, state_dict['classif.weight'])
    assert hub.create(run / 'last.pth.tar', num_classes=2).num_classes == 2


def test_published_weights_of_timms_are_read_without_a_pickle(online, reference_state_dict, tmp_path, monkeypatch):
    serialization.save_weights(reference_state_dict, tmp_path / 'model.safetensors')
    files = {'model.safetensors': (tmp_path / 'model.safetensors').read_bytes(), 'pytorch_model.bin': b'a pickle'}
    online.add('timm/inception_resnet_v2.tf_in1k', files)
    online.add('timm/inception_resnet_v2.tf_ens_adv_in1k', {'pytorch_model.bin': b'a pickle'})
    model = hub.create(True)
    assert torch.equal(model.classif.bias, reference_state_dict['classif.bias'])
    with pytest.raises(UserError, match=r'no model\.safetensors'):
        hub.create('tf_ens_adv_in1k')
    with pytest.raises(huggingface_hub.errors.EntryNotFoundError):
        timm.create_model(f'{OURS}.tf_ens_adv_in1k', pretrained=True)
    assert not any('pytorch_model' in path for _, _, path, _ in online.log)


def test_another_network_is_refused(tmp_path, published):
    folder = shutil.copytree(published, tmp_path / 'other')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'architecture': 'resnet18'}))
    with pytest.raises(UserError, match='is a resnet18'):
        hub.from_pretrained(folder)
    with pytest.raises(UserError, match='not an exported model'):
        hub.from_pretrained(tmp_path)

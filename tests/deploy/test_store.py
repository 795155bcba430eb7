"""A folder of a network for inference that was changed is refused in a line."""

import json
import os

import pytest
import safetensors.torch
import timm
import torch

from timm_npu_irv2.deploy import to_inference
from timm_npu_irv2.deploy.store import load, save
from timm_npu_irv2.errors import UserError

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
    torch.manual_seed(0)
    network = to_inference(timm.create_model('inception_resnet_v2_npu', num_classes=3), dtype=torch.bfloat16)
    network.pretrained_cfg['label_names'] = ['ant', 'bee', 'cat']
    return save(network, tmp_path_factory.mktemp('stored') / 'network')


@pytest.mark.parametrize(('place', 'value', 'message'), [
    ('pretrained_cfg.label_names', ['ant', 'bee'], '2 label names for 3 classes'),
    ('pretrained_cfg.label_names', [1, 2, 3], 'label_names'),
    ('arguments.global_pool', 'everything', "arguments.global_pool is 'everything', expected one of"),
    ('arguments.num_classes', -1, 'arguments.num_classes is -1'),
    ('arguments.device', 'cuda', "unknown entry 'device'"),
    ('dtype', 'load', "dtype is 'load', expected one of 'float32'"),
    ('dtype', 'float32', 'expected a tensor of torch.float32'),
    ('pretrained_cfg.mean', [0.5, 0.5], 'mean has 2 values for 3 channels'),
    ('pretrained_cfg.input_size', [1, 299, 299], 'images have 1 channels, its network 3'),
    ('pretrained_cfg.url', 'http://127.0.0.1:1/x', 'pretrained_cfg.url'),
    ('format', 'another', 'of another kind'),
])
def test_a_config_that_was_changed_is_refused(stored, tmp_path, place, value, message):
    config = json.loads((stored / 'config.json').read_text())
    *outer, last = place.split('.')
    entry = config
    for name in outer:
        entry = entry[name]
    entry[last] = value
    (tmp_path / 'config.json').write_text(json.dumps(config))
    os.link(stored / 'model.safetensors', tmp_path / 'model.safetensors')
    with pytest.raises(UserError) as caught:
        load(tmp_path, device='cpu')
    assert message in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('kind', ['type', 'shape', 'missing', 'more'])
def test_weights_that_were_changed_are_refused(stored, tmp_path, kind):
    weights = safetensors.torch.load_file(stored / 'model.safetensors')
    name = 'conv2d_7b.bias'
    if kind == 'missing':
        del weights[name]
    else:
        weights['x' if kind == 'more' else name] = {
            'type': weights[name].to(torch.int32), 'shape': weights[name][:-1].clone(), 'more': torch.zeros(1)}[kind]
    safetensors.torch.save_file(weights, tmp_path / 'model.safetensors')  # without a checksum
    os.link(stored / 'config.json', tmp_path / 'config.json')
    with pytest.raises(UserError, match=r'model\.safetensors is refused') as caught:
        load(tmp_path, device='cpu')
    assert '\n' not in str(caught.value)

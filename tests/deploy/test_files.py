"""Deployed networks are opened by their files: ONNX of any kind, and .om files with the ONNX file beside them."""

import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.conftest import create_pair, relative_error
from timm_npu_irv2 import UserError
from timm_npu_irv2.deploy import is_deployed, load, onnx, open_deployed, save, to_inference

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytestmark = pytest.mark.filterwarnings('ignore')

SIZE, CLASSES = 75, 4


@pytest.fixture(scope='module')
def network():
    _, model = create_pair(num_classes=CLASSES)
    network = to_inference(model.eval(), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    network.pretrained_cfg |= {'input_size': (3, SIZE, SIZE), 'mean': (0.4, 0.5, 0.6), 'std': (0.2, 0.3, 0.4),
                               'label_names': ['a', 'b', 'c', 'd']}
    return network


@pytest.fixture(scope='module')
def files(network, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('deployed')
    onnx.export(network, folder / 'bytes.onnx')
    onnx.export(network, folder / 'floats.onnx', uint8=False, batch_size=2)
    save(network, folder / 'folder')
    return folder


@pytest.mark.parametrize(('name', 'format'), [
    ('bytes.onnx', 'onnx float32'), ('floats.onnx', 'onnx float32'), ('folder', 'folded float32'),
])
def test_bytes_and_normalised_images_have_the_networks_answers(files, network, name, format):
    opened = open_deployed(files / name, 'cpu')
    images = torch.randint(0, 256, (5, 3, SIZE, SIZE), dtype=torch.uint8)
    mean, std = (torch.tensor(opened.network.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    with torch.inference_mode():
        expected = network(images)
        for x in images, (images / 255 - mean) / std:
            assert relative_error(opened.network(x), expected) < 1e-4
        assert opened.network(images[:0]).shape == (0, CLASSES)
    assert is_deployed(files / name) and opened.format == format and opened.size > 200e6
    assert opened.network.pretrained_cfg['label_names'] == ['a', 'b', 'c', 'd']


def test_an_om_file_is_run_with_the_preprocessing_of_the_onnx_file_beside_it(files, network, tmp_path, monkeypatch):
    """With a double of ais_bench's documented interface, in which ONNX Runtime computes."""
    class InferSession:
        def __init__(self, device_id, model_path):
            self.runner = onnx.session(files / 'bytes.onnx')

        def infer(self, feeds, mode):
            return [self.runner.run(None, {onnx.INPUT: feeds[0]})[0].reshape(-1)]

    modules = {name: types.ModuleType(name) for name in ('ais_bench', 'ais_bench.infer', 'ais_bench.infer.interface')}
    modules['ais_bench.infer.interface'].InferSession = InferSession
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    compiled = tmp_path / 'bytes_Ascend310P3.om'
    compiled.write_bytes(b'compiled')
    with pytest.raises(UserError, match='the ONNX file that it was compiled from is not beside it'):
        open_deployed(compiled)
    shutil.copy(files / 'bytes.onnx', tmp_path)
    opened = open_deployed(compiled)
    images = torch.randint(0, 256, (9, 3, SIZE, SIZE), dtype=torch.uint8)
    with torch.inference_mode():
        assert relative_error(opened.network(images), network(images)) < 1e-4
    assert (opened.format, opened.size, opened.network.num_classes) == ('om', 8, CLASSES)


def test_another_folder_is_no_deployed_network(files, tmp_path):
    assert not is_deployed(tmp_path) and not is_deployed(files) and not is_deployed(tmp_path / 'weights.pth')
    assert load(files / 'folder', 'cpu').num_classes == CLASSES

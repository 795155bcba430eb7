"""Deployed networks are opened by their files: ONNX of any kind, and .om files with the ONNX file beside them."""

import json
import os
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


CONFIG = {'input_size': [3, SIZE, SIZE], 'mean': [0.5] * 3, 'std': [0.5] * 3, 'uint8': False}


def write_file(path: Path, metadata: str | None, *nodes, inputs=(('images', ('n', 3, SIZE, SIZE)),),
               outputs=(('logits', ('n', CLASSES)),), constants=()) -> Path:
    """Write an ONNX file of somebody else, with what this package reads in its metadata."""
    helper, kind = pytest.importorskip('onnx').helper, 1  # float32
    infos = [[helper.make_tensor_value_info(name, kind, shape) for name, shape in group] for group in (inputs, outputs)]
    model = helper.make_model(helper.make_graph(list(nodes), 'graph', *infos, initializer=list(constants)),
                              opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    if metadata is not None:
        helper.set_model_props(model, {onnx.PREPROCESSING: metadata})
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(('metadata', 'message'), [
    (None, 'does not contain its preprocessing'), ('{', 'cannot be read'), ('[' * 100_000, 'cannot be read'),
    ('[]', 'refused'), ('7', 'refused'), ('{}', 'mean is missing'), ('"mean"', 'refused'),
    (json.dumps({**CONFIG, 'mean': [float('nan')] * 3}), 'mean'), (json.dumps({**CONFIG, 'std': [0, 0, 0]}), 'std'),
    (json.dumps({**CONFIG, 'uint8': 'no'}), 'uint8'), (json.dumps({**CONFIG, 'label_names': ['a']}), '1 label names'),
    (json.dumps({**CONFIG, 'input_size': [1, SIZE, SIZE]}), 'channels'),
], ids=range(12))
def test_what_the_metadata_of_an_onnx_file_may_say(tmp_path, metadata, message):
    path = write_file(tmp_path / 'a.onnx', metadata)
    with pytest.raises(UserError, match=message) as caught:
        open_deployed(path)
    assert '\n' not in str(caught.value) and str(path) in str(caught.value)


IMAGES, LOGITS = ('images', ('n', 3, SIZE, SIZE)), ('logits', ('n', CLASSES))


@pytest.mark.parametrize('places', [
    {'inputs': ()}, {'outputs': ()}, {'inputs': (('x', IMAGES[1]),)}, {'outputs': (('x', LOGITS[1]),)},
    {'inputs': (('images', (3, SIZE)),)}, {'outputs': (('logits', ()),)}, {'outputs': (('logits', ('n', 'k')),)},
    {'inputs': (('images', ('n', 'c', SIZE, SIZE)),)},
], ids=str)
def test_an_onnx_file_with_other_inputs_and_outputs_is_refused(tmp_path, places):
    path = write_file(tmp_path / 'a.onnx', json.dumps(CONFIG), **places)
    with pytest.raises(UserError, match=r'is not an exported network|is refused') as caught:
        open_deployed(path)
    assert '\n' not in str(caught.value)


def test_an_onnx_file_that_fails_as_it_runs_is_one_line(tmp_path):
    """Its output is declared as logits; what the graph makes of an image cannot have that shape."""
    helper = pytest.importorskip('onnx').helper
    shape = helper.make_tensor('shape', 7, (2,), (5, CLASSES))
    node = helper.make_node('Reshape', ['images', 'shape'], ['logits'])
    path = write_file(tmp_path / 'a.onnx', json.dumps(CONFIG), node, constants=[shape])
    network = open_deployed(path).network
    with pytest.raises(UserError, match=r'ONNX Runtime cannot run .*a\.onnx') as caught:
        network(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', ['a.onnx', 'a.om'])
def test_pipes_and_folders_of_these_names_are_one_line(tmp_path, name):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / name).mkdir()
    os.mkfifo(tmp_path / name)
    for path in tmp_path / name, tmp_path / 'folder' / name:
        with pytest.raises(UserError) as caught:
            open_deployed(path)
        assert '\n' not in str(caught.value)


def test_weights_outside_of_its_folder_are_not_read(tmp_path):
    helper = pytest.importorskip('onnx').helper
    secret, folder = tmp_path / 'secret', tmp_path / 'folder'
    secret.write_bytes(bytes(4 * 3 * CLASSES))
    folder.mkdir()
    weights = helper.make_tensor('weights', 1, (3, CLASSES), bytes(4 * 3 * CLASSES), raw=True)
    weights.ClearField('raw_data')
    weights.data_location = 1  # external
    for key, value in ('location', '../secret'), ('length', str(4 * 3 * CLASSES)):
        entry = weights.external_data.add()
        entry.key, entry.value = key, value
    nodes = (helper.make_node('ReduceMean', ['images'], ['means'], axes=[2, 3], keepdims=0),
             helper.make_node('MatMul', ['means', 'weights'], ['logits']))
    path = write_file(folder / 'a.onnx', json.dumps(CONFIG), *nodes, constants=[weights])
    with pytest.raises(UserError, match='cannot be read as an ONNX model'):
        open_deployed(path)

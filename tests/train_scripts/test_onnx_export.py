"""onnx_export.py and onnx_quantize.py as a user meets them: a file that any ONNX runtime takes, checked; ATC; int8."""

import json
import os
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import create_pair, relative_error
from timm_npu_irv2.cli.script import run_script
from timm_npu_irv2.deploy import onnx as graph
from timm_npu_irv2.deploy.quantization import ModelInputs
from timm_npu_irv2.serialization import save_weights
from train_scripts import onnx_export as export_script
from train_scripts import onnx_quantize as quantize_script

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

CLASSES, SIZE = 3, 75
# of timm 1.0.31's onnx_export.py
TIMM_OPTIONS = '''
--model -m --opset --keep-init --aten-fallback --dynamic-size --check-forward -b --batch-size --img-size --input-size
--mean --std --num-classes --checkpoint --reparam --training --verbose --dynamo
'''.split()

pytestmark = pytest.mark.filterwarnings('ignore')


def export(*argv):
    return run_script('onnx_export.py', export_script.main, list(map(str, argv)))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """timm's weights in a file, and timm's network."""
    path = tmp_path_factory.mktemp('weights') / 'weights.safetensors'
    reference, _ = create_pair(num_classes=CLASSES)
    save_weights(reference.state_dict(), path)
    return path, reference.eval()


@pytest.fixture(scope='module')
def exported(checkpoint, tmp_path_factory):
    """A file with uint8 input and a batch of any size, and what was printed."""
    path = tmp_path_factory.mktemp('exported') / 'model.onnx'
    assert export(path, '--checkpoint', checkpoint[0], '--img-size', SIZE, '--uint8') == 0
    return path


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """Twelve images in three classes."""
    root, random = tmp_path_factory.mktemp('photographs'), np.random.default_rng(0)
    for index in range(12):
        folder = root / f'class {index % CLASSES}'
        folder.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 255, (90, 100, 3), dtype=np.uint8)).save(folder / f'{index}.png')
    return root


def outputs(path, images):
    runner = graph.session(path, threads=1)
    return torch.from_numpy(runner.run(None, {runner.get_inputs()[0].name: images.numpy()})[0])


@pytest.mark.parametrize('batch_size', [1, 5])
def test_a_file_of_any_batch_size_is_the_network(exported, checkpoint, batch_size):
    images = torch.randint(0, 256, (batch_size, 3, SIZE, SIZE), dtype=torch.uint8)
    with torch.inference_mode():
        expected = checkpoint[1]((images / 255 - 0.5) / 0.5)
    assert relative_error(outputs(exported, images), expected) < 1e-5


def test_it_has_convolutions_and_no_norms_in_the_opset_asked_for(exported):
    model = onnx.load(exported)
    onnx.checker.check_model(model)
    kinds = {node.op_type for node in model.graph.node}
    assert {opset.version for opset in model.opset_import} == {13}
    assert sum(node.op_type == 'Conv' for node in model.graph.node) == 190
    assert not kinds & {'BatchNormalization', 'Mul', 'Sub', 'Div', 'Transpose'}
    assert graph.preprocessing(exported)['input_size'] == [3, SIZE, SIZE]
    assert all('/' not in node.doc_string for node in model.graph.node)  # no paths of the machine it was made on


def test_float_images_a_fixed_batch_and_another_opset(checkpoint, tmp_path):
    path = tmp_path / 'model.onnx'
    assert export(path, '--checkpoint', checkpoint[0], '--input-size', 3, SIZE, 80, '-b', 1, '--opset', 11) == 0
    images = torch.randn(1, 3, SIZE, 80)
    with torch.inference_mode():
        assert relative_error(outputs(path, images), checkpoint[1](images)) < 1e-5
    assert graph.session(path).get_inputs()[0].shape == [1, 3, SIZE, 80]
    assert {opset.version for opset in onnx.load(path).opset_import} == {11}


@pytest.mark.long
def test_the_newer_exporter(checkpoint, tmp_path):
    path = tmp_path / 'model.onnx'
    assert export(path, '--checkpoint', checkpoint[0], '--img-size', SIZE, '--dynamo', '--opset', 18) == 0
    images = torch.randn(3, 3, SIZE, SIZE)
    with torch.inference_mode():
        assert relative_error(outputs(path, images), checkpoint[1](images)) < 1e-5


def test_a_file_that_is_wrong_does_not_stay(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_script, 'TOLERANCE', 1e-12)
    assert export(tmp_path / 'model.onnx', '--checkpoint', checkpoint[0], '--img-size', SIZE) == 2
    assert 'relative error of ONNX Runtime against PyTorch' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_it_has_timms_options(capsys):
    with pytest.raises(SystemExit):
        export_script.parse(['--help'])
    text = capsys.readouterr().out
    for option in TIMM_OPTIONS:
        assert re.search(rf'(?<!\S){option}\b', text) or option in export_script.ONNX_EXPORT.refused, option


@pytest.mark.parametrize(('argv', 'message'), [
    (['no/folder/model.onnx'], 'there is no folder no/folder'),
    (['model.onnx', '--checkpoint', 'missing.pth'], 'no such file'),
    (['model.onnx', '--dynamo'], 'does not support opset 13'),
    (['model.onnx', '--atc'], '--soc-version'),
    (['model.onnx', '--training'], 'train with train.py'),
    (['model.onnx', '--img-size', '60'], '75'),
    (['model.onnx', '--model', 'resnet18', '--checkpoint', __file__], ''),
])
def test_what_is_wrong_is_told_in_a_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export(*argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1


# --------------------------------------------------------------------------------------------------------------- ATC


@pytest.fixture
def atc(tmp_path, monkeypatch):
    """A program of ATC's name, which keeps its arguments and writes the file that ATC would."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    program = folder / 'atc'
    program.write_text(f'#!{sys.executable}\nimport json, pathlib, sys\n'
                       f'pathlib.Path({str(tmp_path / "arguments.json")!r}).write_text(json.dumps(sys.argv[1:]))\n'
                       'options = dict(word[2:].split("=", 1) for word in sys.argv[1:])\n'
                       'pathlib.Path(options["output"] + ".om").write_text("compiled")\n')
    program.chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}{os.pathsep}{os.environ["PATH"]}')
    return tmp_path / 'arguments.json'


def test_atc_compiles_the_file_and_overwrites_nothing(exported, atc, tmp_path):
    model = tmp_path / 'model.onnx'
    model.symlink_to(exported)
    command = graph.AtcCommand(model, 'Ascend310P3', (None, 3, SIZE, SIZE), (1, 8))
    command.run()
    arguments = json.loads(atc.read_text())
    assert arguments == [
        f'--model={model}', '--framework=5', f'--output={tmp_path}/model_Ascend310P3', '--soc_version=Ascend310P3',
        '--input_format=NCHW', f'--input_shape=images:-1,3,{SIZE},{SIZE}', '--dynamic_batch_size=1,8']
    command.output.write_text('precious')
    with pytest.raises(graph.UserError, match='--force overwrites it'):
        command.run()
    assert command.output.read_text() == 'precious'
    command.run(force=True)
    assert command.output.read_text() == 'compiled'


def test_the_script_prints_and_runs_the_command(checkpoint, atc, tmp_path, capsys):
    model = tmp_path / 'model.onnx'
    assert export(model, '--checkpoint', checkpoint[0], '--img-size', SIZE, '-b', 4, '--atc',
                  '--soc-version', 'Ascend910B3') == 0
    printed = capsys.readouterr()
    assert re.search(r'float32 images; relative error against PyTorch \d\.\de-\d\d', printed.err)
    (line,) = printed.out.splitlines()
    assert line.startswith('atc --model=') and 'insert_op_conf' not in line
    assert f'--input_shape=images:4,3,{SIZE},{SIZE}' in json.loads(atc.read_text())
    assert (tmp_path / 'model_Ascend910B3.om').read_text() == 'compiled'
    model.unlink()
    again = '--checkpoint', checkpoint[0], '--img-size', SIZE, '--atc', '--soc-version', 'Ascend910B3'
    assert export(model, *again) == 2
    assert not model.exists()  # told before anything is done


def test_without_atc_it_is_said(exported, monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(graph.UserError, match='atc is not found'):
        graph.AtcCommand(tmp_path / 'model.onnx', 'Ascend310P3', (1, 3, SIZE, SIZE)).run()


# -------------------------------------------------------------------------------------------------------------- int8


def quantize(*argv):
    return run_script('onnx_quantize.py', quantize_script.main, list(map(str, argv)))


def test_int8_is_a_quarter_and_tells_its_loss(exported, photographs, tmp_path, capsys):
    """Calibrated by the method with the smallest loss, which is on images that it was not calibrated with."""
    output = tmp_path / 'int8.onnx'
    assert quantize(exported, output, '--calibration', photographs) == 0
    printed, log = capsys.readouterr()
    losses = dict(re.findall(r'int8, (.+): logits differ by (\S+) \(relative\)', log))
    assert list(losses)[:3] == ['minmax', 'entropy', 'percentile'] and len(losses) == 4
    ((chosen, count),) = re.findall(r'calibrated by (.+) with (\d+) images', log)
    assert chosen in losses and float(losses[chosen]) < 1.12 * min(map(float, losses.values())) and count == '6'
    assert re.search(r'same answer as float32 on [\d.]+ % of 6 images; logits differ by ', printed)
    assert re.search(r'top-1 [\d.]+ % \(float32: [\d.]+ %\)', printed)
    assert output.stat().st_size < exported.stat().st_size * 0.3
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    assert relative_error(outputs(output, images), outputs(exported, images)) < 0.2


def test_a_silent_loss_is_refused(exported, photographs, tmp_path, capsys):
    """Unless --max-loss allows it. The biases are such that the answers hang on small differences."""
    images = tmp_path / 'images'
    images.mkdir()
    for path in photographs.rglob('*.png'):
        (images / path.name).symlink_to(path)
    inputs = ModelInputs(images, graph.preprocessing(exported))
    logits = torch.cat([outputs(exported, torch.from_numpy(batch)) for batch, _ in inputs])
    model = onnx.load(exported)
    bias = next(each for each in model.graph.initializer if each.name == 'classif.bias')
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) - logits.mean(0).numpy(), bias.name))
    onnx.save(model, tmp_path / 'model.onnx')
    argv = tmp_path / 'model.onnx', tmp_path / 'int8.onnx', '--calibration', images, '--method', 'minmax'
    assert quantize(*argv) == 2
    assert re.search(r'another answer on [\d.]+ % of the images, more than --max-loss 5: no file was written',
                     capsys.readouterr().err)
    assert not (tmp_path / 'int8.onnx').exists()
    assert quantize(*argv, '--max-loss', 100) == 0
    assert (tmp_path / 'int8.onnx').exists()


@pytest.mark.parametrize(('argv', 'message'), [
    (['missing.onnx', 'out.onnx', '--calibration', '.'], 'no such file'),
    (['{model}', 'out.onnx'], '--calibration DIR is missing'),
    (['{model}', 'out.onnx', '--calibration', '.'], 'no images in this folder'),
    (['{model}', '{model}', '--calibration', '.'], 'would overwrite'),
    (['{model}', 'out.onnx', '--calibration', '.', '--max-loss', '101'], '--max-loss'),
    (['{model}', 'out.onnx', '--calibration', '{torn}'], 'torn.png cannot be read'),
])
def test_what_is_wrong_with_quantisation_is_told_in_a_line(exported, argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torn = tmp_path.with_name(tmp_path.name + '_torn')
    torn.mkdir()
    (torn / 'torn.png').write_bytes(b'\x89PNG')
    assert quantize(*(word.format(model=exported, torn=torn) for word in argv)) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_file_from_elsewhere_is_refused(exported, tmp_path, capsys, photographs):
    path = tmp_path / 'model.onnx'
    model = onnx.load(exported)
    del model.metadata_props[:]
    onnx.save(model, path)
    assert quantize(path, tmp_path / 'out.onnx', '--calibration', photographs) == 2
    assert 'does not contain its preprocessing' in capsys.readouterr().err
    path.write_bytes(b'no model')
    assert quantize(path, tmp_path / 'out.onnx', '--calibration', photographs) == 2
    assert 'cannot be read as an ONNX model' in capsys.readouterr().err

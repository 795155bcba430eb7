"""Every engine gives the torch network's answers, from any thread, wherever it is taken; int8 is what was measured."""

import copy
import gc
import json
import logging
import os
import pickle
import platform
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.conftest import OURS, create_pair, relative_error
from timm_npu_irv2 import UserError, schema
from timm_npu_irv2.cli.script import run_script
from timm_npu_irv2.deploy import EngineNetwork, InferenceNetwork, Predictor, load, save, to_inference
from timm_npu_irv2.deploy import onnx as graph
from timm_npu_irv2.deploy.engines import ENGINES as REGISTERED
from timm_npu_irv2.deploy.engines import fastest_engine, record_engine, record_path
from timm_npu_irv2.deploy.engines.base import open_by_size
from timm_npu_irv2.deploy.engines.cpu import warn_of_overflow
from timm_npu_irv2.deploy.engines.siblings import separate_siblings
from timm_npu_irv2.serialization import save_weights
from train_scripts import inference, validate

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

SIZE, CLASSES = 75, 7
SCRIPTS = Path(__file__).parents[2] / 'train_scripts'
ENGINES = ('openvino', 'onnxruntime', 'om')

pytestmark = pytest.mark.filterwarnings('ignore')


def blots(count, seed=0):
    """Smooth random images, uint8."""
    small = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, (SIZE, SIZE), mode='bicubic').mul(255).clamp(0, 255).byte()


def normalize(images):
    return (images / 255 - torch.tensor((0.4, 0.5, 0.6)).view(3, 1, 1)) / torch.tensor((0.2, 0.3, 0.4)).view(3, 1, 1)


@pytest.fixture(scope='module')
def model():
    """timm's network with random weights, for images of SIZE pixels, and with a mean of its own.

    The statistics of BatchNorm are those of some images, so that the logits of others differ from each other.
    """
    reference, _ = create_pair(num_classes=CLASSES)
    reference.pretrained_cfg = {'input_size': (3, SIZE, SIZE), 'mean': (0.4, 0.5, 0.6), 'std': (0.2, 0.3, 0.4)}
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the average of all batches
    with torch.no_grad():
        reference.train()(normalize(blots(16, seed=1)))
    return reference.eval()


@pytest.fixture(scope='module')
def images():
    return blots(3)


@pytest.fixture(scope='module')
def normalized(images):
    return normalize(images)


@pytest.fixture(scope='module')
def expected(model, normalized):
    with torch.inference_mode():
        return model(normalized)


# A double of ais_bench, aclruntime's Python interface (InferSession(device_id, model_path).infer(feeds, mode)), and of
# ATC. The .om file is the ONNX file, which ONNX Runtime computes.


class InferSession:
    loaded: ClassVar[list] = []

    def __init__(self, device_id, model_path, acl_json_path=None, debug=False, loop=1):
        self.loaded.append((device_id, model_path))
        self.runner = graph.session(model_path, threads=1)

    def infer(self, feeds, mode='static', custom_sizes=100000, out_array=True):
        (images,) = feeds
        assert mode == 'dymbatch' and len(images) in (1, 2, 4, 8), 'the model has no such batch'
        assert images.dtype == np.float32 and images.shape[2:] == (SIZE, SIZE)
        return [self.runner.run(None, {graph.INPUT: images})[0].reshape(-1)]


@pytest.fixture(scope='module')
def ascend(tmp_path_factory):
    """A machine with CANN: atc, acl and ais_bench, as far as they are documented."""
    folder = tmp_path_factory.mktemp('cann')
    program = folder / 'atc'
    program.write_text(f'#!{sys.executable}\nimport json, shutil, sys\n'
                       'options = dict(word[2:].split("=", 1) for word in sys.argv[1:])\n'
                       f'json.dump(options, open({str(folder / "options.json")!r}, "w"))\n'
                       'shutil.copyfile(options["model"], options["output"] + ".om")\n')
    program.chmod(0o755)
    modules = {name: types.ModuleType(name) for name in ('acl', 'ais_bench', 'ais_bench.infer',
                                                         'ais_bench.infer.interface')}
    modules['acl'].get_soc_name = lambda: 'Ascend310P3'
    modules['ais_bench.infer.interface'].InferSession = InferSession
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PATH', f'{folder}{os.pathsep}{os.environ["PATH"]}')
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield folder / 'options.json'


@pytest.fixture(scope='module', params=ENGINES)
def network(request, model):
    """The network on each engine."""
    if request.param == 'om':
        request.getfixturevalue('ascend')
    else:
        pytest.importorskip(request.param)
    return to_inference(model, engine=request.param, dtype='float32')


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize('kind', ['float', 'uint8'])
@pytest.mark.parametrize('count', [0, 1, 3, 9])
def test_logits_are_the_torch_networks(network, images, normalized, expected, kind, count):
    rows = torch.arange(count) % 3
    output = network((images if kind == 'uint8' else normalized)[rows].contiguous(memory_format=torch.channels_last))
    assert output.shape == (count, CLASSES) and output.dtype == torch.float32
    assert (output - expected[rows]).abs().max() < 1e-4 if count else True
    assert relative_error(output, expected[rows]) < 1e-5 or not count


@pytest.mark.parametrize('engine', ENGINES[:2])
def test_images_of_other_sizes(model, engine):
    pytest.importorskip(engine)
    network, x = to_inference(model, engine=engine), torch.randn(2, 3, 80, 107)
    with torch.inference_mode():
        assert relative_error(network(x), model(x)) < 1e-5
        assert relative_error(network(x[..., :75]), model(x[..., :75])) < 1e-5


def test_only_images_of_the_usual_size_are_known_to_have_it(model, tmp_path):
    path = tmp_path / 'model.onnx'
    graph.export(to_inference(model), path, uint8=False, dynamic_size=True)
    assert graph.session(path).get_inputs()[0].shape == ['batch', 3, 'height', 'width']
    opened = []

    def open_session(size):
        opened.append(size)
        session = graph.session(path, size=size)
        assert session.get_inputs()[0].shape[2:] == (['height', 'width'] if size is None else list(size))
        return lambda images: session.run(None, {graph.INPUT: images})[0]

    run = open_by_size((SIZE, SIZE), open_session)
    assert opened == [(SIZE, SIZE)]  # the first call need not wait for it
    for height, width in (SIZE, SIZE), (80, 75), (75, 90), (SIZE, SIZE):
        assert run(np.zeros((1, 3, height, width), np.float32)).shape == (1, CLASSES)
    assert opened == [(SIZE, SIZE), None]


@pytest.mark.parametrize('options', [dict(num_classes=0), dict(num_classes=5, in_chans=1, global_pool='catavgmax')])
def test_every_head_and_every_number_of_channels(options):
    reference, _ = create_pair(**options)
    x = torch.randn(2, options.get('in_chans', 3), SIZE, SIZE)
    with torch.inference_mode():
        assert relative_error(to_inference(reference.eval(), engine='onnxruntime')(x), reference(x)) < 1e-5


def test_a_new_network_whose_norms_are_all_alike():
    """The exporter keeps equal tensors once."""
    model, x = timm.create_model(OURS, num_classes=CLASSES).eval(), torch.randn(1, 3, SIZE, SIZE)
    with torch.inference_mode():
        assert relative_error(to_inference(model, engine='onnxruntime')(x), model(x)) < 1e-5


def test_bfloat16_on_a_cpu_that_has_it(model, images, expected):
    pytest.importorskip('openvino')
    fast = to_inference(model, engine='openvino', dtype='fast')
    assert fast.dtype in ('bfloat16', 'float32')
    error = relative_error(fast(images), expected)
    assert 1e-3 < error < 0.1 if fast.dtype == 'bfloat16' else error < 1e-5, error


def test_sixteen_threads_get_their_own_answers(network, model):
    """Through a Predictor, and without one."""
    images = blots(48, seed=2)
    with torch.inference_mode():
        expected = to_inference(model)(images).softmax(-1)
    assert torch.cdist(expected, expected).fill_diagonal_(1).min() > 1e-3  # a mixed-up pair would be noticed
    with Predictor(network, topk=CLASSES, batch_size=8) as predictor, ThreadPoolExecutor(16) as threads:
        answers = [answer for (answer,) in threads.map(predictor.predict, images)]
        direct = torch.cat(list(threads.map(network, images.split(1)))).softmax(-1)
    served = torch.stack([torch.tensor(answer['probabilities'])[torch.tensor(answer['indices']).argsort()]
                          for answer in answers])
    assert (served - expected).abs().max() < 1e-5
    assert (direct - expected).abs().max() < 1e-5


def test_a_network_is_a_module_and_cannot_be_misfed(network, images):
    assert isinstance(network, EngineNetwork) and not list(network.parameters()) and not network.training
    assert network.to('cpu').eval().num_classes == CLASSES
    for wrong in (images[0], images[:, :2], images.long()):
        with pytest.raises(UserError, match=r'expected images \(N, 3, H, W\)'):
            network(wrong)


# -------------------------------------------------------------------------------------------------- where it is taken


def test_saved_copied_and_pickled_it_is_the_same_to_the_bit(network, images, tmp_path):
    network.pretrained_cfg['label_names'] = [f'class {i}' for i in range(CLASSES)]
    again = load(save(network, tmp_path / 'deployed'))
    assert again.engine.name == network.engine.name and again.dtype == network.dtype
    assert again.pretrained_cfg['label_names'] == network.pretrained_cfg.pop('label_names')
    for other in (again, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(images), network(images))


def test_a_damaged_folder_is_one_line(network, tmp_path):
    folder = save(network, tmp_path / 'deployed')
    path = folder / network.engine.model_file
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match='checksum is wrong'):
        load(folder)
    path.unlink()
    with pytest.raises(UserError, match='No such file'):
        load(folder)
    os.mkfifo(path)
    with pytest.raises(UserError, match='a pipe or a device'):
        load(folder)
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'engine': 'abacus'}))
    with pytest.raises(UserError, match="the engine 'abacus', which this version does not have"):
        load(folder)
    del config['engine']
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match='is refused'):
        load(folder)


def test_the_file_of_a_discarded_network_is_removed(model):
    network = to_inference(model, engine='onnxruntime')
    folder = Path(network._folder.name)
    assert [path.name for path in folder.iterdir()] == ['model.onnx']
    del network
    gc.collect()
    assert not folder.exists()


# ---------------------------------------------------------------------------------------------------------- the choice


def test_torch_is_the_default_and_what_auto_means_before_a_measurement(model, caplog, monkeypatch, tmp_path):
    monkeypatch.setenv('TIMM_NPU_IRV2_CACHE', str(tmp_path))
    assert isinstance(to_inference(model), InferenceNetwork)
    with caplog.at_level(logging.INFO):
        assert isinstance(to_inference(model, engine='auto'), InferenceNetwork)
    assert [record.getMessage() for record in caplog.records] == [
        "engine 'auto': no engine has been measured on this machine; using torch."]
    assert to_inference(model, dtype='bfloat16').conv2d_1a.weight.dtype == torch.bfloat16


def test_auto_is_the_engine_of_the_last_record_for_its_dtype_and_threads(model, monkeypatch, tmp_path):
    monkeypatch.setenv('TIMM_NPU_IRV2_CACHE', str(tmp_path))
    record_engine('float32', 'onnxruntime', {})
    record_engine('bfloat16', 'torch', {})
    assert to_inference(model, engine='auto').engine.name == 'onnxruntime'
    assert isinstance(to_inference(model, engine='auto', dtype='bfloat16'), InferenceNetwork)
    assert isinstance(to_inference(model, 'meta', engine='auto'), InferenceNetwork)
    record_engine('float32', 'torch', {})
    assert isinstance(to_inference(model, engine='auto'), InferenceNetwork)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, 'get_num_threads', lambda: 99)
        assert fastest_engine('float32') is None
    for content in '{"engines": {"torch": 3}}', '{"engine": "auto"}', '{"engine": 1}', '[' * 100_000, '':
        record_path('float32').write_text(content)
        with pytest.raises(UserError, match=r'float32-.*json .*Run `benchmark\.py infer` again') as caught:
            to_inference(model, engine='auto')
        assert '\n' not in str(caught.value)


def test_the_engines_that_a_file_may_name_are_those_there_are():
    assert set(schema.ENGINES) == set(REGISTERED)


@pytest.mark.parametrize(('options', 'message'), [
    (dict(engine='openvin'), 'Did you mean openvino'),
    (dict(engine='tensorrt'), 'Use one of auto, torch, openvino, onnxruntime, om'),
    (dict(engine='onnxruntime', dtype='bfloat16'), 'cannot compute in bfloat16 here: use one of float32, int8'),
    (dict(engine='onnxruntime', device='meta'), 'runs on a CPU, not on meta'),
    (dict(engine='onnxruntime', dtype='int8'), 'needs calibration=FOLDER'),
    (dict(engine='onnxruntime', dtype='int8', calibration='no/such'), 'no/such: No such file'),
    (dict(dtype='int8'), "use engine='openvino' or 'onnxruntime'"),
    (dict(dtype='float12'), "no dtype 'float12'"),
])
def test_what_cannot_be_is_told_in_a_line(model, options, message):
    with pytest.raises(UserError, match=message) as caught:
        to_inference(model, **options)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(('engine', 'package', 'command'), [
    ('openvino', 'openvino', "pip install 'timm-npu-irv2[openvino]'"),
    ('onnxruntime', 'onnxruntime', "pip install 'timm-npu-irv2[onnxruntime]'"),
    ('om', 'ais_bench', 'https://gitee.com/ascend/tools'),
])
def test_a_missing_engine_is_named_with_the_way_to_install_it(model, monkeypatch, engine, package, command):
    for name in [name for name in sys.modules if name.partition('.')[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match='not installed') as caught:
        to_inference(model, engine=engine)
    assert command in str(caught.value)


def test_engines_are_imported_when_they_are_used():
    code = ('import sys, timm_npu_irv2.deploy; '
            'assert not {"openvino", "onnxruntime", "onnx", "ais_bench"} & set(sys.modules)')
    subprocess.run([sys.executable, '-c', code], check=True)


# ------------------------------------------------------------------------------------------------- a graph for each


def test_separate_siblings_are_the_same_function(model, images, tmp_path):
    path = tmp_path / 'model.onnx'
    graph.export(to_inference(model), path, uint8=True)
    (before,) = graph.session(path).run(None, {graph.INPUT: images.numpy()})
    content = onnx.load(path)
    separate_siblings(content)
    onnx.checker.check_model(content)
    kinds = [node.op_type for node in content.graph.node]
    assert kinds.count('Conv') == 244 and 'Split' not in kinds  # as many as timm's network has
    graph.write(content, path)
    (after,) = graph.session(path).run(None, {graph.INPUT: images.numpy()})
    assert relative_error(torch.from_numpy(after), torch.from_numpy(before)) < 1e-5


def test_om_is_compiled_for_the_card_and_loaded_onto_the_one_that_is_named(ascend, model, images, expected, caplog):
    with caplog.at_level(logging.WARNING):
        network = to_inference(model, engine='om', device='npu:3', dtype='fast')
    options = json.loads(ascend.read_text())
    assert options['soc_version'] == 'Ascend310P3' and options['precision_mode'] == 'force_fp16'
    assert options['input_shape'] == f'images:-1,3,{SIZE},{SIZE}' and options['dynamic_batch_size'] == '1,2,4,8'
    assert InferSession.loaded[-1][0] == 3
    assert 'has not been tried on a card' in caplog.text
    assert relative_error(network(images), expected) < 1e-5
    with pytest.raises(UserError, match='runs on an Ascend card'):
        to_inference(model, engine='om', device='cpu')


# ---------------------------------------------------------------------------------------------------------------- int8


def test_int8_is_calibrated_with_tensors_and_runs_on_every_engine_of_a_cpu(model, caplog, tmp_path):
    pytest.importorskip('openvino')
    images = blots(12, seed=3)
    network = to_inference(model, engine='onnxruntime', dtype='int8', calibration=images[:6])
    with torch.inference_mode():
        expected = to_inference(model)(images)
    assert relative_error(network(images), expected) < 0.2
    folder = save(network, tmp_path / 'int8')
    assert (folder / 'model.onnx').stat().st_size < 70e6
    with pytest.raises(UserError, match='saved in int8, which cannot become float32'):
        load(folder, dtype='float32')
    shutil.copytree(folder, tmp_path / 'other')
    config = json.loads((folder / 'config.json').read_text())
    (tmp_path / 'other' / 'config.json').write_text(json.dumps({**config, 'engine': 'openvino'}))
    other = load(tmp_path / 'other')
    assert other.dtype == 'int8' and 'overflow' not in caplog.text  # made for this CPU
    assert relative_error(other(images), expected) < 0.2


@pytest.mark.parametrize(('largest', 'vnni', 'warns'), [(127, False, True), (64, False, False), (127, True, False)])
def test_weights_of_8_bits_are_warned_of_where_their_sums_overflow(largest, vnni, warns, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(platform, 'machine', lambda: 'x86_64')
    monkeypatch.setattr(torch.cpu, '_is_vnni_supported', lambda: vnni)
    weight = onnx.numpy_helper.from_array(np.array([-largest, 0, 3], np.int8), 'weight')
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], 'int8', [], [], [weight])), tmp_path / 'model.onnx')
    warn_of_overflow(tmp_path / 'model.onnx')
    assert ('sums overflow on this CPU' in caplog.text) == warns


# ------------------------------------------------------------------------------------------------------- the scripts


@pytest.fixture(scope='module')
def run(model, tmp_path_factory):
    """run(script, options...): its result on images of as many classes as the model has, or its exit code."""
    root = tmp_path_factory.mktemp('data')
    for index, image in enumerate(blots(2 * CLASSES, seed=4)):
        folder = root / 'validation' / f'class {index % CLASSES}'
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f'{index}.png')
    save_weights(model.state_dict(), root / 'weights.safetensors')
    common = ['--checkpoint', root / 'weights.safetensors', '--img-size', SIZE, '--device', 'cpu', '-j', 0]
    scripts = {'validate': validate, 'inference': inference}
    data = {'validate': ['--data-dir', root], 'inference': [root / 'validation', '--output-type', 'logit', '--topk', 0]}

    def call(name, capsys, *options):
        words = [str(word) for word in (*data[name], *common, *options)]
        code = run_script(f'{name}.py', scripts[name].main, words)
        printed = capsys.readouterr()
        return json.loads(printed.out.split('--result\n')[1]) if code == 0 else (code, printed.err)

    return call


def test_validate_and_inference_run_on_an_engine(run, capsys, tmp_path):
    for options in ([], ['--valid-labels', tmp_path / 'labels.txt']):
        (tmp_path / 'labels.txt').write_text('\n'.join(map(str, range(CLASSES))))
        plain, engine = (run('validate', capsys, *options, *more) for more in ([], ['--engine', 'onnxruntime']))
        assert engine['count'] == 2 * CLASSES and engine['loss'] == pytest.approx(plain['loss'], rel=1e-4)
        assert (engine['top1'], engine['top5']) == (plain['top1'], plain['top5'])
    plain, *others = (run('inference', capsys, *more) for more in ([], ['--engine', 'onnxruntime'],
                                                                   ['--engine', 'torch']))
    for engine in others:
        assert list(engine) == list(plain)
        assert all(engine[name]['logit'] == pytest.approx(plain[name]['logit'], abs=1e-4) for name in plain)


@pytest.mark.parametrize(('script', 'options', 'message'), [
    ('validate', ['--engine', 'openvin'], 'Did you mean openvino?'),
    ('validate', ['--engine', 'torch', '--amp'], 'leave out --amp'),
    ('validate', ['--calibration', '.'], '--calibration is for --engine'),
    ('validate', ['--engine', 'onnxruntime', '--model-dtype', 'bfloat16'], 'cannot compute in bfloat16 here'),
    ('inference', ['--engine', 'onnxruntime', '--gradcam', '--picture', 'x.png'], 'leave out --gradcam'),
])
def test_what_an_engine_cannot_do_is_told_in_a_line(run, capsys, script, options, message):
    code, error = run(script, capsys, *options)
    assert code == 2 and message in error.splitlines()[-1]


def test_onnx_runtime_reports_nothing(tmp_path):
    """Its reports are collected in a file in the folder of temporary files before they are sent."""
    environment = {name: value for name, value in os.environ.items() if name not in ('ORT_DISABLE_TELEMETRY', 'CI')}
    code = "from timm_npu_irv2.deploy.onnx import optional; optional('onnxruntime')"
    subprocess.run([sys.executable, '-c', code], env={**environment, 'TMPDIR': str(tmp_path)}, check=True)
    assert not list(tmp_path.iterdir())

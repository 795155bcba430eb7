"""The same picture has the same pixels, class and logits in train.py, validate.py, inference.py, onnx_quantize.py, a
published model and Predictor; or all of them refuse it in one line."""

import functools
import importlib.util
import json
import shutil
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch.nn.functional import conv2d, cross_entropy

from tests.conftest import fill
from timm_npu_irv2 import hub
from timm_npu_irv2.cli.script import run_script
from timm_npu_irv2.deploy import Predictor, load, onnx, save, to_inference
from timm_npu_irv2.deploy.quantization import ModelInputs, compare
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.hub.__main__ import main as hub_main
from timm_npu_irv2.serialization import read_checkpoint, write_checkpoint

SIZE = 75
CLASSES = ['01', '1', '2', '10', 'Cat', 'cat']  # in the order in which they are numbered
SCRIPTS = Path(__file__).parents[2] / 'train_scripts'
COMMON = ['--device', 'cpu', '-j', '0', '-b', '6']

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')


def run(script: str, *argv) -> int:
    spec = importlib.util.spec_from_file_location(f'same_{script}', SCRIPTS / f'{script}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return run_script(f'{script}.py', module.main, list(map(str, argv)))


# ------------------------------------------------------------------------------------------------------------ images


def write_images(folder: Path, classes=CLASSES, *, bits: int = 8, ending: str = 'png') -> Path:
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            random = np.random.default_rng([index, number])
            if bits == 16:
                image = Image.fromarray(random.integers(0, 65536, (90, 80), dtype=np.uint16))
            else:
                image = Image.fromarray(random.integers(0, 256, (9, 8, 3), dtype=np.uint8)).resize((80, 90))
            image.save(folder / name / f'{name}{number}.{ending}')
    return folder


def tarred(folder: Path) -> Path:
    with tarfile.open(folder.with_suffix('.tar'), 'w') as archive:
        archive.add(folder, '.')
    shutil.rmtree(folder)
    return folder.with_suffix('.tar')


def linked(folder: Path) -> Path:
    folder.rename(folder.with_name('elsewhere'))
    folder.mkdir()
    for path in folder.with_name('elsewhere').iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def without(folder: Path, name: str) -> Path:
    shutil.rmtree(folder / name)
    return folder


def renamed(folder: Path, old: str, new: str) -> Path:
    (folder / old).rename(folder / new)
    return folder


def merged(folder: Path) -> Path:
    for name in '1', '2':
        (folder / name).rename(folder / 'photos')
        (folder / name).mkdir()
        (folder / 'photos').rename(folder / name / 'photos')
    return folder


# Which network, what its images are, what is wrong with them.
SITUATIONS = {
    'folder': ('RGB', write_images, ''),
    'tar': ('RGB', lambda folder: tarred(write_images(folder)), ''),
    'symlinks': ('RGB', lambda folder: linked(write_images(folder)), ''),
    '16 bit PNG': ('RGB', functools.partial(write_images, bits=16), ''),
    '16 bit PGM': ('L', functools.partial(write_images, bits=16, ending='pgm'), ''),
    'one channel': ('L', write_images, ''),
    'four channels': ('RGBA', write_images, ''),
    'YCbCr': ('YCbCr', write_images, ''),
    'missing class': ('RGB', lambda folder: without(write_images(folder), '2'), ''),
    'renamed class': ('RGB', lambda folder: renamed(write_images(folder), '2', 'two'), 'two'),
    'blanks': ('RGB', lambda folder: renamed(write_images(folder), '2', ' 2 '), ''),
    'merging classes': ('RGB', lambda folder: merged(write_images(folder)), "photos"),
}
NETWORKS = {'RGB': [], 'L': ['--in-chans', '1'], 'RGBA': ['--in-chans', '4'], 'YCbCr': ['--input-img-mode', 'YCbCr']}


@pytest.fixture(scope='session')
def network(tmp_path_factory):
    """network(mode): a checkpoint of train.py, its export for the hub and as ONNX, and the deployed network."""
    @functools.cache
    def make(mode: str) -> SimpleNamespace:
        root = tmp_path_factory.mktemp(mode)
        write_images(root / 'data' / 'train')
        assert run('train', '--data-dir', root / 'data', '--val-split', '', '--output', root, '--experiment', 'run',
                   '--img-size', SIZE, '--num-classes', len(CLASSES), '--epochs', 1, '--train-batches-per-epoch', 1,
                   '--crop-pct', 0.8, '--mean', '0.4', '--interpolation', 'bilinear', '--lr', 0, '--warmup-epochs', 0,
                   *COMMON, *NETWORKS[mode]) == 0
        checkpoint = root / 'run' / 'last.pth.tar'
        content = read_checkpoint(checkpoint)
        model = fill(hub.create(checkpoint)).eval()  # so that images have different answers
        content['state_dict'] = model.state_dict()
        write_checkpoint(content, checkpoint)
        assert hub_main(['export', str(checkpoint), str(root / 'published')]) == 0
        assert run('onnx_export', root / 'model.onnx', '--checkpoint', checkpoint, '--uint8') == 0
        save(to_inference(model), root / 'deployed')
        return SimpleNamespace(mode=mode, root=root, checkpoint=checkpoint, model=model)

    return make


@pytest.fixture(params=SITUATIONS)
def situation(request, network, tmp_path):
    """A network, images, and what is to be said of them."""
    mode, make, message = SITUATIONS[request.param]
    made = network(mode)
    (tmp_path / 'data').mkdir()
    data = make(tmp_path / 'data' / 'val')
    return SimpleNamespace(network=made, data=data, message=message, name=request.param, root=tmp_path,
                           expected=expected(made, write_images(tmp_path / 'plain')
                                             if request.param in ('tar', 'symlinks', 'blanks') else data))


def expected(network, folder: Path) -> dict[str, tuple[torch.Tensor, str]]:
    """Logits and class name by the name of the image, by hand."""
    transform = create_transform((0, SIZE, SIZE), mean=(0.4,) * 4, std=(0.5,) * 4, crop_pct=0.8, is_training=False,
                                 interpolation='bilinear', use_prefetcher=True)
    answers = {}
    for path in sorted(path for path in folder.rglob('*') if path.is_file()):
        image = Image.open(path)
        if image.mode.startswith('I'):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        pixels = transform(image.convert(network.mode)).float()[None] / 255
        with torch.inference_mode():
            answers[path.name] = network.model((pixels - 0.4) / 0.5)[0], path.parent.name
    return answers


def figures(answers) -> tuple[float, float]:
    """Loss and top-1 in percent."""
    logits = torch.stack([each for each, _ in answers.values()])
    targets = torch.tensor([CLASSES.index(name) for _, name in answers.values()])
    return cross_entropy(logits, targets).item(), 100 * (logits.argmax(1) == targets).float().mean().item()


# ------------------------------------------------------------------------------------------------------------- tools


def of_train(situation, capsys):
    train = situation.root / 'data' / ('train.tar' if situation.data.suffix else 'train')
    good = situation.name == 'missing class'
    train.symlink_to(situation.network.root / 'data' / 'train' if good else copied(situation.data))
    capsys.readouterr()
    code = run('train', '--data-dir', situation.root / 'data', '--output', situation.root, '--experiment', 'again',
               '--resume', situation.network.checkpoint, '--no-resume-opt', '--epochs', 0, '--img-size', SIZE,
               '--num-classes', len(CLASSES), '--crop-pct', 0.8,
               '--mean', '0.4', '--interpolation', 'bilinear', *COMMON,
               *NETWORKS[situation.network.mode], *([] if situation.message else ['--allow-changed-data']))
    if code:
        return code, capsys.readouterr().err
    report = json.loads((situation.root / 'again' / 'report.json').read_text())
    return report['loss'], report['top1']


def copied(data: Path) -> Path:
    elsewhere = data.with_name('copy of ' + data.name).parent.parent / ('copy' + data.suffix)
    shutil.copytree(data, elsewhere) if data.is_dir() else shutil.copy(data, elsewhere)
    return elsewhere


def of_validate(situation, capsys, *words):
    capsys.readouterr()
    code = run('validate', '--data-dir', situation.data.parent if situation.data.is_dir() else situation.data,
               *COMMON, *(words or ('--checkpoint', situation.network.checkpoint)))
    captured = capsys.readouterr()
    if code:
        return code, captured.err
    results = json.loads(captured.out.split('--result\n')[1])
    return results['loss'], results['top1']


def of_a_published_model(situation, capsys):
    return of_validate(situation, capsys, '--model', f'local-dir:{situation.network.root / "published"}',
                       '--pretrained')


def of_onnx(situation, capsys):
    file = situation.network.root / 'model.onnx'
    try:
        inputs = ModelInputs(situation.data, onnx.preprocessing(file))
        loss = compare(file, file, inputs)
    except UserError as error:
        return 2, str(error)
    runner = onnx.session(file)
    outputs = [(torch.from_numpy(runner.run(None, {'images': batch})[0][0]), CLASSES[target])
               for batch, target in inputs]
    assert figures(dict(enumerate(outputs)))[1] == pytest.approx(100 * loss.top1[0])
    return figures(dict(enumerate(outputs)))


@pytest.mark.parametrize('tool', [of_train, of_validate, of_a_published_model, of_onnx])
def test_accuracy_is_the_same(situation, tool, capsys):
    found = tool(situation, capsys)
    if situation.message:
        assert found[0] == 2 and situation.message in found[1].splitlines()[-1]
        return
    assert found == pytest.approx(figures(situation.expected), abs=1e-3)


def of_inference(situation, capsys, *words):
    capsys.readouterr()
    assert run('inference', situation.data, '--device', 'cpu', '--topk', 0, '--output-type', 'logit',
               *(words or ('--checkpoint', situation.network.checkpoint))) == 0
    results = json.loads(capsys.readouterr().out.split('--result\n')[1])
    return {Path(name).name: row['logit'] for name, row in results.items()}


def of_inference_with_a_published_model(situation, capsys):
    return of_inference(situation, capsys, '--model', f'local-dir:{situation.network.root / "published"}',
                        '--pretrained')


@pytest.mark.parametrize('tool', [of_inference, of_inference_with_a_published_model])
def test_logits_are_the_same(situation, tool, capsys):
    found = tool(situation, capsys)
    assert found.keys() == situation.expected.keys()
    for name, (logits, _) in situation.expected.items():
        assert found[name] == pytest.approx(logits.tolist(), abs=1e-3)


def test_a_predictor_answers_the_same(situation):
    if situation.data.suffix:
        pytest.skip('a predictor reads no tar files')
    paths = sorted(path for path in situation.data.rglob('*/**/*') if path.is_file()) or \
        sorted(path for folder in situation.data.iterdir() for path in folder.iterdir())
    with Predictor(load(situation.network.root / 'deployed', 'cpu'), topk=len(CLASSES)) as predictor:
        answers = predictor.predict(paths)
    for path, answer in zip(paths, answers, strict=True):
        logits, _ = situation.expected[path.name]
        assert answer['labels'] == [CLASSES[index] for index in logits.argsort(descending=True)]
        expected = logits.softmax(0).sort(descending=True).values.tolist()
        assert answer['probabilities'] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize('name', ['folder', 'renamed class'])
def test_names_of_a_data_set_are_published_in_the_order_of_the_training(network, name, tmp_path, capsys):
    _, make, message = SITUATIONS[name]
    made = network('RGB')
    code = hub_main(['export', str(made.checkpoint), str(tmp_path / 'out'), '--class-names',
                     str(make(tmp_path / 'train'))])
    if message:
        assert code == 2 and message in capsys.readouterr().err
    else:
        assert json.loads((tmp_path / 'out' / 'config.json').read_text())['label_names'] == CLASSES


def test_positions_are_averaged_over_images_larger_than_those_of_the_training(network, tmp_path, capsys):
    made, size = network('RGB'), 139  # 3 × 3 positions, of which the training had one
    write_images(tmp_path / 'val')
    assert run('inference', tmp_path / 'val', '--device', 'cpu', '--topk', 0, '--output-type', 'logit', '--img-size',
               size, '--test-pool', '--checkpoint', made.checkpoint) == 0
    results = json.loads(capsys.readouterr().out.split('--result\n')[1])
    transform = create_transform((0, size, size), crop_pct=1.0, is_training=False, interpolation='bilinear',
                                 use_prefetcher=True)
    pixels = transform(Image.open(tmp_path / 'val' / 'cat' / 'cat0.png')).float()[None] / 255
    with torch.inference_mode():
        features = made.model.forward_features((pixels - 0.4) / 0.5)
        logits = conv2d(features, made.model.classif.weight[:, :, None, None], made.model.classif.bias)[0]
    assert logits.shape[1:] == (3, 3)
    expected = (logits.mean((1, 2)) + logits.amax((1, 2))) / 2  # timm's average and maximum
    assert results['cat0.png']['logit'] == pytest.approx(expected.tolist(), abs=1e-3)

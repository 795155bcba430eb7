"""The same picture has the same pixels, class and logits in train.py, validate.py, inference.py, onnx_quantize.py, a
published model and Predictor; or all of them refuse it in one line."""

import functools
import importlib
import json
import shutil
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
from timm_npu_irv2.data.folder import find_images
from timm_npu_irv2.deploy import Predictor, load, onnx, save, to_inference
from timm_npu_irv2.deploy.quantization import ModelInputs, compare
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.hub.__main__ import main as hub_main
from timm_npu_irv2.serialization import read_checkpoint, write_checkpoint

SIZE = 75
CLASSES = ['01', '1', '2', '10', 'Cat', 'cat']  # in the order in which they are numbered
SCRIPTS = Path(__file__).parents[2] / 'train_scripts'
COMMON = ['--device', 'cpu', '-j', '0', '-b', '6']

pytestmark = pytest.mark.filterwarnings('ignore')


def run(script: str, *argv) -> int:
    return run_script(f'{script}.py', importlib.import_module(f'train_scripts.{script}').main, list(map(str, argv)))


# ------------------------------------------------------------------------------------------------------------ images


def write_images(folder: Path, classes=CLASSES, *, bits: int = 8, ending: str = 'png') -> Path:
    for name in classes:
        index = CLASSES.index(name)
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
    'in-chans 1': ('L', write_images, ''),
    'in-chans 4': ('RGBA', write_images, ''),
    'YCbCr': ('YCbCr', write_images, ''),
    '16 bit PNG': ('RGB', functools.partial(write_images, bits=16), ''),
    '16 bit PGM': ('L', functools.partial(write_images, bits=16, ending='pgm'), ''),
    'classes 1-2-10': ('RGB', functools.partial(write_images, classes=('1', '2', '10')), ''),
    'Cat/cat': ('RGB', functools.partial(write_images, classes=('cat', 'Cat')), ''),
    'missing class': ('RGB', lambda folder: without(write_images(folder), '2'), ''),
    'renamed class': ('RGB', lambda folder: renamed(write_images(folder), '2', 'two'), 'two'),
    'blanks': ('RGB', lambda folder: renamed(write_images(folder), '2', ' 2 '), ''),
    'merging classes': ('RGB', lambda folder: merged(write_images(folder)), "photos"),
}
FEWER = ('classes 1-2-10', 'Cat/cat', 'missing class')  # than the training has
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


@pytest.fixture
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
    own = situation.network.root / 'data' / 'train'
    train.symlink_to(own if situation.name in FEWER else copied(situation.data))
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


def of_calibration(situation, capsys):
    """Read the images as onnx_quantize.py does, and compute the figures of its float32 file."""
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


def of_onnx_quantize(situation, capsys):
    """Calibrate and measure with the images; the loss is that of int8, computed by validate.py."""
    int8 = situation.root / 'int8.onnx'
    capsys.readouterr()
    code = run('onnx_quantize', situation.network.root / 'model.onnx', int8, '--calibration', situation.data,
               '--evaluation', situation.data, '--method', 'minmax', '--max-loss', 100)
    captured = capsys.readouterr()
    if code:
        return code, captured.err
    assert onnx.preprocessing(int8)['label_names'] == CLASSES
    return None, float(captured.out.split('(float32: ')[1].split(' %')[0])


def of_hub_export(situation, capsys):
    """Publish the checkpoint with the names of the images' classes, and evaluate what was published."""
    published = situation.root / 'published'
    capsys.readouterr()
    if code := hub_main(['export', str(situation.network.checkpoint), str(published), '--class-names',
                         str(situation.data)]):
        return code, capsys.readouterr().err
    assert json.loads((published / 'config.json').read_text())['label_names'] == CLASSES
    return of_validate(situation, capsys, '--model', f'local-dir:{published}', '--pretrained')


TOOLS = {'train': of_train, 'validate': of_validate, 'calibration': of_calibration, 'onnx_quantize': of_onnx_quantize,
         'hub export': of_hub_export}
QUICK = ('YCbCr', 'renamed class')  # int8 takes ten seconds of a core each


@pytest.mark.parametrize(('situation', 'tool'), [
    pytest.param(name, tool, marks=[pytest.mark.long] if tool == 'onnx_quantize' and name not in QUICK else [])
    for name in SITUATIONS for tool in TOOLS
], indirect=['situation'])
def test_classes_and_accuracy_are_the_same_or_refused_in_one_line(situation, tool, capsys):
    found = TOOLS[tool](situation, capsys)
    if situation.message:
        assert found[0] == 2 and situation.message in found[1].splitlines()[-1]
        return
    loss, top1 = figures(situation.expected)
    assert found == (pytest.approx(loss, abs=1e-3) if found[0] is not None else None, pytest.approx(top1, abs=1e-2))


def of_inference(situation, capsys, *model):
    capsys.readouterr()
    assert run('inference', situation.data, '--device', 'cpu', '--topk', len(CLASSES), '--output-type', 'logit',
               '--label-type', 'name', *model) == 0
    results = json.loads(capsys.readouterr().out.split('--result\n')[1])
    return {Path(name).name: dict(zip(row['label'], row['logit'], strict=True)) for name, row in results.items()}


def with_a_checkpoint(situation, capsys):
    return of_inference(situation, capsys, '--checkpoint', situation.network.checkpoint)


def with_a_published_model(situation, capsys):
    return of_inference(situation, capsys, '--model', f'local-dir:{situation.network.root / "published"}')


def with_an_onnx_file(situation, capsys):
    return of_inference(situation, capsys, '--checkpoint', situation.network.root / 'model.onnx')


def with_a_predictor(situation, capsys):
    images = find_images(situation.data)
    with Predictor(load(situation.network.root / 'deployed', 'cpu'), topk=len(CLASSES)) as predictor:
        answers = predictor.predict([image.open().read() if image.offset >= 0 else image.path for image in images])
    return {Path(image.name).name: dict(zip(answer['labels'], np.log(answer['probabilities']), strict=True))
            for image, answer in zip(images, answers, strict=True)}


@pytest.mark.parametrize('situation', SITUATIONS, indirect=True)
@pytest.mark.parametrize('tool', [with_a_checkpoint, with_a_published_model, with_an_onnx_file, with_a_predictor])
def test_logits_and_class_names_are_the_same(situation, tool, capsys):
    found = tool(situation, capsys)
    assert found.keys() == situation.expected.keys()
    for name, (logits, _) in situation.expected.items():
        expected = logits.log_softmax(0) if tool is with_a_predictor else logits
        assert found[name] == pytest.approx(dict(zip(CLASSES, expected.tolist(), strict=True)), abs=1e-3)


def test_training_folded_onnx_int8_and_published_in_one_table_of_one_command(network, tmp_path, capsys):
    """The accuracy of what is deployed is that of the checkpoint."""
    made = network('RGB')
    data = write_images(tmp_path / 'val')
    shutil.rmtree(data / '01')  # classes are found by name
    int8 = tmp_path / 'int8.onnx'
    assert run('onnx_quantize', made.root / 'model.onnx', int8, '--calibration', data, '--method', 'minmax',
               '--max-loss', 100) == 0
    onnx.export(load(made.root / 'deployed', 'cpu'), tmp_path / 'floats.onnx', uint8=False, batch_size=4)
    places = [made.checkpoint, made.root / 'deployed', made.root / 'model.onnx', tmp_path / 'floats.onnx', int8,
              made.root / 'published']
    capsys.readouterr()
    assert run('validate', '--data-dir', data, *COMMON, '--checkpoint', *places, '--results-file', tmp_path / 'r.json',
               '--results-format', 'json') == 0
    text, _, printed = capsys.readouterr().out.partition('--result\n')
    rows = {row['checkpoint']: row for row in json.loads(printed)}
    assert json.loads((tmp_path / 'r.json').read_text()) == list(rows.values())
    loss, top1 = figures(expected(made, data))
    for place, format in zip(map(str, places), (
            'checkpoint', 'folded float32', 'onnx float32', 'onnx float32', 'onnx int8', 'published'), strict=True):
        row = rows[place]
        assert row['format'] == format and row['count'] == 10 and row['img_size'] == SIZE
        assert row['loss'] == pytest.approx(loss, abs=0.2 if place == str(int8) else 1e-4)
        assert row['top1'] == pytest.approx(top1, abs=1e-2) or place == str(int8)
        assert (50 if place == str(int8) else 200) < row['file_mb'] < (70 if place == str(int8) else 700)
        assert any(line.startswith(place) and format in line for line in text.splitlines())
    assert text.splitlines()[0].split() == ['network', 'format', 'top-1', 'top-5', 'loss', 'images/s', 'MB']


@pytest.mark.parametrize(('words', 'message'), [
    (['ONNX', '--img-size', '80'], 'model.onnx takes images of 3 × 75 × 75, not 3 × 80 × 80'),
    (['ONNX', '--mean', '0.3'], 'model.onnx is deployed, with its precision and its layers as they are: leave out --m'),
    (['DEPLOYED', '--amp'], 'leave out --amp'),
    (['DEPLOYED', '--num-classes', '9'], '--num-classes 9: '),
    (['ONNX', 'nowhere.onnx'], '1 of 2 networks could not be validated'),
    (['nowhere.onnx', 'nowhere.om'], 'none of the 2 networks could be validated'),
    (['broken.onnx'], 'cannot be read as an ONNX model'),
    (['lonely.om'], 'the ONNX file that it was compiled from is not beside it'),
])
def test_what_a_deployed_network_cannot_do_is_one_line(network, tmp_path, capsys, monkeypatch, words, message):
    made = network('RGB')
    write_images(tmp_path / 'val')
    monkeypatch.chdir(tmp_path)
    Path('broken.onnx').write_bytes(b'no model')
    Path('lonely.om').touch()
    places = {'ONNX': made.root / 'model.onnx', 'DEPLOYED': made.root / 'deployed'}
    assert run('validate', '--data-dir', tmp_path, *COMMON, '--checkpoint', *(places.get(w, w) for w in words)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


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

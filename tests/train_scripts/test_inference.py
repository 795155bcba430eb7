"""inference.py as a user meets it: images in, answers out, with a tiny network."""

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from timm_npu_irv2 import device as devices
from timm_npu_irv2.cli.script import run_script
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.plots import gradcam
from train_scripts import inference as script

CLASSES = 5
MODEL = ['--model', 'test_resnet', '--num-classes', str(CLASSES), '--img-size', '64', '--device', 'cpu']

# of timm 1.0.31's inference.py
TIMM_OPTIONS = '''
--data-dir --dataset --split --model -m --workers -j --batch-size -b --img-size --in-chans --input-size --use-train-size
--crop-pct --crop-mode --mean --std --interpolation --num-classes --class-map --log-freq --checkpoint --pretrained
--num-gpu --test-pool --channels-last --device --amp --amp-dtype --model-dtype --fuser --model-kwargs
--torchcompile-mode --torchscript --torchcompile --aot-autograd --results-dir --results-file --results-format
--results-separate-col --topk --fullname --filename-col --index-col --label-col --output-col --output-type --label-type
--include-index --exclude-output --no-console-results
'''.split()

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    """Eleven images, two of them in a subfolder."""
    root = tmp_path_factory.mktemp('some images')
    random = np.random.default_rng(0)
    (root / 'more').mkdir()
    for index in range(11):
        picture = random.integers(0, 255, (60 + index, 90, 3), dtype=np.uint8)
        Image.fromarray(picture).save(root / ('more' if index > 8 else '') / f'{index}.png')
    (root / 'notes.txt').write_text('no image')
    return root


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    """Weights whose answers differ from image to image."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=CLASSES)
    with torch.no_grad():
        model.fc.weight.normal_(std=2)
    path = tmp_path_factory.mktemp('weights') / 'weights.pth'
    torch.save({'state_dict': model.state_dict()}, path)
    return path


@pytest.fixture
def infer(images, checkpoint, capfd):
    """infer(options…) -> the answers that are printed, by the images' names."""

    def run(*options: object, data: object = images, model: list[str] = MODEL):
        words = [*(data if isinstance(data, list) else [data]), *model, '--checkpoint', checkpoint, *options]
        code = run_script('inference.py', script.main, [str(word) for word in words])
        out, err = capfd.readouterr()
        assert code == 0, err
        return json.loads(out.split('--result\n')[1]) if '--result' in out else {}

    return run


@pytest.fixture
def fails(images, capfd):
    """fails(options…) -> the one line that the script ends with."""

    def run(*options: object) -> str:
        code = run_script('inference.py', script.main, [str(option) for option in options])
        err = capfd.readouterr().err
        assert code == 2 and 'Traceback' not in err
        return err.splitlines()[-1]

    return run


def by_hand(images: Path, checkpoint: Path) -> dict[str, torch.Tensor]:
    """The probabilities, one image at a time."""
    model = timm.create_model('test_resnet', num_classes=CLASSES, checkpoint_path=checkpoint).eval()
    transform = create_transform(**resolve_data_config({'img_size': 64}, model=model))
    with torch.inference_mode():
        return {path.name: model(transform(Image.open(path).convert('RGB'))[None])[0].softmax(-1)
                for path in images.rglob('*.png')}


# ------------------------------------------------------------------------------------------------------- answers


def test_answers_are_those_found_by_hand(infer, images, checkpoint):
    expected = by_hand(images, checkpoint)
    found = infer('--topk', 2, '--include-index')
    assert list(found) == [f'{index}.png' for index in range(11)]  # in natural order
    for name, answer in found.items():
        probabilities, indices = expected[name].topk(2)
        assert answer['index'] == indices.tolist() and answer['label'] == [str(index) for index in indices.tolist()]
        assert answer['prob'] == pytest.approx(probabilities.tolist(), rel=1e-4)
    assert len({tuple(answer['prob']) for answer in found.values()}) == 11


@pytest.mark.parametrize('options', [['-b', 1], ['-b', 4, '-j', 3], ['-b', 64, '-j', 0]])
def test_batches_and_threads_change_nothing(infer, options):
    expected, found = infer('--topk', 1, '-b', 3), infer('--topk', 1, *options)
    assert list(found) == list(expected)
    assert all(found[name]['label'] == expected[name]['label'] for name in expected)
    assert all(found[name]['prob'] == pytest.approx(expected[name]['prob'], rel=1e-5) for name in expected)


def test_images_folders_and_tars(infer, images, checkpoint, tmp_path):
    several = infer(data=[images / '0.png', images / 'more'])
    assert list(several) == ['0.png', '9.png', '10.png']
    twice = infer(data=[images / '0.png', images])  # the same name twice: the paths tell them apart
    assert all(name.startswith(images.as_posix()) for name in twice)
    assert list(infer('--fullname', data=images / 'more')) == [f'{images.as_posix()}/more/{i}.png' for i in (9, 10)]
    with tarfile.open(tmp_path / 'images.tar', 'w') as archive:
        for path in sorted(images.glob('more/*.png')):
            archive.add(path, f'more/{path.name}')
    assert infer(data=tmp_path / 'images.tar') == {
        name: answer for name, answer in infer().items() if name in ('9.png', '10.png')} != {}


def test_labels(infer, checkpoint, tmp_path):
    from timm.models import save_for_hf  # noqa: PLC0415

    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=3)
    names = ['ant', 'bee', 'cat']
    save_for_hf(model, tmp_path / 'model', safe_serialization=True, model_config={
        'label_names': names, 'label_descriptions': {name: f'a {name}' for name in names}})

    def labels(*options: object) -> set[str]:
        model = ['--model', f'local-dir:{tmp_path}/model', '--img-size', '64', '--device', 'cpu']
        found = infer('--checkpoint', '', '--topk', 3, *options, model=model)
        return {label for answer in found.values() for label in answer.get('label', ())}

    assert labels() == {'a ant', 'a bee', 'a cat'} and labels('--label-type', 'name') == set(names)
    assert labels('--label-type', 'none') == set()


def test_a_damaged_image(infer, fails, images, checkpoint, tmp_path):
    (tmp_path / 'whole.png').write_bytes((images / '0.png').read_bytes())
    (tmp_path / 'torn.png').write_bytes((images / '1.png').read_bytes()[:4000])
    error = fails(tmp_path, *MODEL, '--checkpoint', checkpoint)
    assert 'torn.png cannot be read' in error and '--on-bad-image skip' in error
    assert list(infer('--on-bad-image', 'skip', data=tmp_path)) == ['whole.png']
    (tmp_path / 'whole.png').unlink()
    assert 'none of the images' in fails(tmp_path, *MODEL, '--checkpoint', checkpoint, '--on-bad-image', 'skip')


# -------------------------------------------------------------------------------------------------------- results


def test_every_format_says_the_same(infer, tmp_path):
    for format in ('csv', 'json', 'json-record', 'json-split'):
        found = infer('--topk', 2, '--results-file', f'{format}.x', '--results-dir', tmp_path / 'out',
                      '--results-format', format)
    first = {'filename': '0.png', **found['0.png']}
    assert json.loads((tmp_path / 'out' / 'json.x.json').read_text()) == found
    assert json.loads((tmp_path / 'out' / 'json-record.x.json').read_text().splitlines()[0]) == first
    split = json.loads((tmp_path / 'out' / 'json-split.x.json').read_text())
    assert dict(zip(split['columns'], split['data'][0], strict=True)) == first
    row = next(csv.DictReader((tmp_path / 'out' / 'csv.x.csv').open()))
    assert {key: json.loads(value) if key != 'filename' else value for key, value in row.items()} == first


def test_columns(infer, tmp_path):
    columns = list(infer('--topk', 2, '--results-separate-col', '--include-index')['0.png'])
    assert columns == ['index_0', 'index_1', 'label_0', 'label_1', 'prob_0', 'prob_1']
    named = infer('--index-col', 'i', '--label-col', 'l', '--output-col', 'o', '--include-index')['0.png']
    assert list(named) == ['i', 'l', 'o'] and not isinstance(named['o'], list)
    assert list(infer('--exclude-output')['0.png']) == ['label']
    logits = infer('--topk', 0, '--output-type', 'logit')['0.png']
    assert list(logits) == ['logit'] and len(logits['logit']) == CLASSES
    assert infer('--no-console-results', '--results-dir', tmp_path) == {}
    assert [path.name for path in tmp_path.iterdir()] == ['test_resnet-64.csv']


@pytest.mark.parametrize('options', [
    ['--amp', '--amp-dtype', 'bfloat16'], ['--model-dtype', 'bfloat16'], ['--fast'], ['--torchscript'],
    ['--torchcompile', 'eager'], ['--test-pool'], ['--channels-last'], ['--crop-mode', 'squash', '--crop-pct', '1'],
    ['--use-train-size'], ['--interpolation', 'bilinear', '--mean', '0.5', '--std', '0.5'],
])
def test_options_run(infer, options):
    assert len(infer(*options)) == 11


def test_timms_options_are_known(fails):
    known = {name for group in script.INFERENCE.groups for flag in group.flags for name in flag.names.split()}
    assert set(TIMM_OPTIONS) - known == script.INFERENCE.refused.keys() & set(TIMM_OPTIONS) == {'--aot-autograd'}


def test_fast_is_what_the_device_computes_fast():
    dtype = devices.fast_dtype('cpu')
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
    assert devices.fast_dtype('cuda') == torch.float16


# -------------------------------------------------------------------------------------------------------- picture


def test_the_picture_shows_images_and_bars(infer, tmp_path):
    pytest.importorskip('matplotlib')
    infer('--topk', 3, '--picture', tmp_path / 'plain.png', '-b', 4)
    infer('--topk', 3, '--picture', tmp_path / 'heat.png', '--gradcam', '-b', 4, '--torchcompile', 'eager')
    plain, heat = (np.asarray(Image.open(tmp_path / name).convert('RGB')) for name in ('plain.png', 'heat.png'))
    assert plain.shape == heat.shape and plain.shape[0] > 1000 and plain.shape[1] > 1500
    assert (plain != heat).any(2).mean() > 0.2  # the images have another look, the bars do not
    assert (plain == heat).all(2).mean() > 0.3


def test_gradcam_is_the_class_activation_map_where_the_head_is_linear():
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=CLASSES).eval()
    images = torch.randn(3, 3, 128, 128)
    classes = torch.tensor([0, 2, 4])
    with torch.inference_mode():
        features = model.forward_features(images)
    # Grad-CAM generalises CAM (Zhou et al., 2016): the class's weights of the linear layer, summed over channels
    maps = torch.einsum('nchw,nc->nhw', features, model.fc.weight[classes].detach()).relu()
    expected = torch.nn.functional.interpolate(maps[:, None], (128, 128), mode='bilinear')[:, 0]
    expected = expected / expected.amax((1, 2), keepdim=True).clamp_min(1e-30)  # for one class nothing speaks
    found = gradcam(model, images, classes)
    assert found.shape == (3, 128, 128) and torch.allclose(found, expected, atol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(('options', 'message'), [
    ([], 'no images'),
    (['missing', 'MODEL'], 'missing: no such file or folder'),
    (['EMPTY', 'MODEL'], 'no images in this folder'),
    (['IMAGES', '--model', 'test_resnett'], 'Unknown model'),
    (['IMAGES', '--model', 'local-dir:missing'], 'missing/config.json'),
    (['IMAGES', '--checkpoint', 'missing.pth'], 'no such file'),
    (['IMAGES', '--gradcam'], '--picture'),
    (['IMAGES', '--fast', '--amp'], '--fast chooses'),
    (['IMAGES', '--results-format', 'json', 'json-split'], 'same name'),
    (['IMAGES', '--aot-autograd'], 'aot_eager'),
    (['IMAGES', '--topkk', '3'], 'Did you mean --topk'),
    (['IMAGES', '--picture', 'missing/x.png', 'MODEL'], 'there is no folder missing'),
    (['IMAGES', '--gradcam', '--picture', 'x.png', 'MODEL', '--img-size', '32'], 'too small for a heat map'),
])
def test_mistakes_are_told_in_a_line(fails, images, checkpoint, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    places = {'IMAGES': [images], 'EMPTY': [tmp_path / 'empty'], 'MODEL': [*MODEL, '--checkpoint', checkpoint]}
    words = [word for option in options for word in places.get(option, [option])]
    assert message in fails(*words, '--device', 'cpu')


def test_gradcam_needs_places():
    model = timm.create_model('test_vit').eval()
    with pytest.raises(UserError, match='too small for a heat map'):
        gradcam(model, torch.zeros(1, 3, 160, 160), torch.tensor([0]))

"""validate.py: exact figures whatever the processes and batches, any dialect, results in files, one line for errors."""

import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import RealLabelsImagenet, create_dataset, create_transform

from timm_npu_irv2 import serialization, weights
from timm_npu_irv2.cli.script import run_script
from timm_npu_irv2.errors import UserError
from train_scripts import validate

SCRIPTS = Path(__file__).parents[2] / 'train_scripts'

CLASSES, PER_CLASS = 7, 5  # 35 images: no batch size and number of processes below divides them
MODEL = ['--model', 'test_resnet', '--img-size', '64', '--device', 'cpu', '-j', '0']


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('images')
    random = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / 'val' / f'class{label}').mkdir(parents=True)
        for number in range(PER_CLASS):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((80, 70), Image.Resampling.BICUBIC)
            image.save(folder / 'val' / f'class{label}' / f'{number}.png')
    return folder


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=CLASSES)
    path = tmp_path_factory.mktemp('weights') / 'model.pth.tar'
    averaged = {key: value + 0.3 * torch.randn_like(value) if value.is_floating_point() else value
                for key, value in model.state_dict().items()}
    torch.save({'state_dict': model.state_dict(), 'state_dict_ema': averaged}, path)
    return path


@pytest.fixture
def results(images, checkpoint, capfd):
    """results(words…): what validate.py prints as its result."""

    def run(*words: str):
        arguments = ['--data-dir', str(images), *MODEL, *words]
        if '--checkpoint' not in words:
            arguments += ['--checkpoint', str(checkpoint)]
        capfd.readouterr()
        assert validate.main(arguments) == 0
        return json.loads(capfd.readouterr().out.split('--result\n')[1])

    return run


def answers_by_hand(images: Path, model: torch.nn.Module, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits and targets of all images, one at a time."""
    config = timm.data.resolve_data_config({'img_size': size}, model=model)
    transform = create_transform(**config)
    dataset = create_dataset('', root=str(images), split='validation')
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(transform(image)[None]) for image, _ in dataset])
    return logits, torch.tensor([target for _, target in dataset])


def accuracy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    ranked = logits.topk(5, 1).indices == targets[:, None]
    return (round(100 * ranked[:, 0].float().mean().item(), 4), round(100 * ranked.any(1).float().mean().item(), 4))


def test_figures_are_those_found_by_hand(results, images, checkpoint):
    model = timm.create_model('test_resnet', num_classes=CLASSES)
    model.load_state_dict(serialization.load_weights(checkpoint))
    logits, targets = answers_by_hand(images, model)
    found = results()
    assert (found['top1'], found['top5']) == pytest.approx(accuracy(logits, targets), abs=1e-4)
    assert found['top1_err'] == pytest.approx(100 - found['top1']) and found['count'] == CLASSES * PER_CLASS
    assert found['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-4)
    assert (found['model'], found['img_size'], found['checkpoint']) == ('test_resnet', 64, str(checkpoint))


@pytest.mark.parametrize('processes', [1, 2])
def test_reassessed_labels_replace_the_original_ones(images, checkpoint, tmp_path, processes):
    """As timm counts them: any of several classes is right, and an image without one does not count."""
    files = sorted(images.glob('val/*/*.png'))[::2]
    for number, path in enumerate(files, 1):
        place = tmp_path / 'images' / 'val' / f'class{number * 5 % CLASSES}' / f'ILSVRC2012_val_{number:08d}.JPEG'
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(place)
    labels = [[number % CLASSES, (3 * number + 1) % CLASSES] if number % 4 else [] for number in range(len(files))]
    (tmp_path / 'real.json').write_text(json.dumps(labels))

    model = timm.create_model('test_resnet', num_classes=CLASSES)
    model.load_state_dict(serialization.load_weights(checkpoint))
    dataset = create_dataset('', root=str(tmp_path / 'images'), split='validation')
    timms = RealLabelsImagenet(dataset.filenames(basename=True), tmp_path / 'real.json', topk=(1, 5))
    logits, targets = answers_by_hand(tmp_path / 'images', model)
    timms.add_result(logits)
    expected = tuple(round(timms.get_accuracy(k), 4) for k in (1, 5))
    assert expected != accuracy(logits, targets) and 0 < expected[0] < 100  # or the original labels would do, too

    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes),
         SCRIPTS / 'validate.py', '--data-dir', tmp_path / 'images', *MODEL, '--checkpoint', checkpoint, '-b', '4',
         '--real-labels', tmp_path / 'real.json'],
        capture_output=True, text=True, check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    found = json.loads(done.stdout.split('--result\n')[1])
    assert (found['top1'], found['top5'], found['count']) == (*expected, len(files))


def test_the_averaged_weights_are_taken_if_asked(results):
    assert results()['loss'] != results('--use-ema')['loss']


@pytest.mark.parametrize('words', [['-b', '1'], ['-b', '4', '-j', '2'], ['-b', '64', '--no-prefetcher']], ids=' '.join)
def test_batch_size_and_workers_change_nothing(results, words):
    expected, found = results('-b', '16'), results(*words)
    assert (found['top1'], found['top5'], found['count']) == (expected['top1'], expected['top5'], expected['count'])


@pytest.mark.parametrize('processes', [2, 3])
def test_the_number_of_processes_changes_nothing(results, images, checkpoint, processes):
    expected = results()
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes),
         SCRIPTS / 'validate.py', '--data-dir', images, *MODEL, '--checkpoint', checkpoint, '-b', '4',
         '--metrics-avg', 'macro'],
        capture_output=True, text=True, check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    found = json.loads(done.stdout.split('--result\n')[1])
    assert (found['top1'], found['top5'], found['count']) == (expected['top1'], expected['top5'], expected['count'])
    assert found['macro_f1_score'] == results('--metrics-avg', 'macro')['macro_f1_score']


def test_a_network_that_one_process_cannot_read_is_skipped_by_all(images, checkpoint, tmp_path):
    """The processes have folders of their own, as on two machines."""
    for rank, names in enumerate((('a', 'b', 'c'), ('a', 'c'))):
        (tmp_path / str(rank)).mkdir()
        for name in names:
            shutil.copy(checkpoint, tmp_path / str(rank) / f'{name}.pth.tar')
    words = ['--data-dir', images, *MODEL, '--checkpoint', 'b.pth.tar', 'a.pth.tar', 'c.pth.tar', '-b', '4']
    path = os.pathsep.join([str(SCRIPTS.parent), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--no-python',
         'bash', '-c', f'cd {tmp_path}/$RANK; exec "$@"', '', sys.executable, SCRIPTS / 'validate.py', *words],
        capture_output=True, text=True, check=False, timeout=900,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path})
    assert done.returncode and '--result\n' in done.stdout, done.stderr
    found = json.loads(done.stdout.split('--result\n')[1])
    assert {each['checkpoint']: each['count'] for each in found} == {'a.pth.tar': 35, 'c.pth.tar': 35}
    skipped = [line for line in done.stderr.splitlines() if 'Skipped' in line]
    assert skipped == ['Skipped b.pth.tar: rank 1: b.pth.tar: no such file.']
    assert 'validate.py: error: 1 of 3 networks could not be validated.' in done.stderr


@pytest.mark.parametrize('words', [['--amp', '--amp-dtype', 'bfloat16'], ['--model-dtype', 'bfloat16'],
                                   ['--torchscript'], ['--tta', '2'], ['--test-pool'], ['--channels-last'],
                                   ['--crop-mode', 'squash', '--crop-pct', '1'], ['--crop-border-pixels', '3'],
                                   ['--use-train-size'], ['--reparam'], ['--torchcompile', 'eager']], ids=' '.join)
def test_options_run(results, words):
    assert results(*words)['count'] == CLASSES * PER_CLASS


def test_results_as_csv_and_json(results, tmp_path):
    found = results('--results-file', str(tmp_path / 'a b.csv'))
    (row,) = csv.DictReader((tmp_path / 'a b.csv').open())
    assert list(row)[:5] == ['model', 'top1', 'top1_err', 'top5', 'top5_err'] and float(row['top1']) == found['top1']
    found = results('--results-file', str(tmp_path / 'r.json'), '--results-format', 'json')
    assert json.loads((tmp_path / 'r.json').read_text()) == found


def test_a_folder_of_checkpoints_is_sorted_by_accuracy(results, checkpoint, tmp_path):
    state_dict = serialization.load_weights(checkpoint)
    save_file({key: value.clone() for key, value in state_dict.items()}, tmp_path / 'a.safetensors')
    flipped = {**state_dict, 'fc.weight': -state_dict['fc.weight']}
    torch.save(flipped, tmp_path / 'b.pth')
    torch.save({'nothing': 1}, tmp_path / 'c.pth')  # is left out
    found = results('--checkpoint', str(tmp_path), '--num-classes', str(CLASSES),
                    '--results-file', str(tmp_path / 'r.csv'))
    assert sorted(Path(result['checkpoint']).name for result in found) == ['a.safetensors', 'b.pth']
    assert found[0]['top1'] >= found[1]['top1'] and len((tmp_path / 'r.csv').read_text().splitlines()) == 3


def test_valid_labels_choose_columns(results, images, tmp_path):
    torch.manual_seed(1)
    model = timm.create_model('test_resnet', num_classes=20)
    torch.save(model.state_dict(), tmp_path / 'wide.pth')
    labels = [19, 3, 7, 0, 12, 5, 1]
    (tmp_path / 'labels.txt').write_text('\n'.join(map(str, labels)))
    logits, targets = answers_by_hand(images, model)
    found = results('--checkpoint', str(tmp_path / 'wide.pth'), '--num-classes', '20',
                    '--valid-labels', str(tmp_path / 'labels.txt'))
    assert (found['top1'], found['top5']) == pytest.approx(accuracy(logits[:, labels], targets), abs=1e-4)


def test_precision_recall_and_f1(results):
    metrics = pytest.importorskip('sklearn.metrics')
    assert metrics is not None
    found = results('--metrics-avg', 'micro')
    assert found['micro_precision'] == found['micro_recall'] == found['micro_f1_score'] == found['top1']


def test_a_picture_of_answers(results, tmp_path):
    results('--picture', str(tmp_path / 'answers.png'))
    with Image.open(tmp_path / 'answers.png') as picture:
        assert picture.size[0] == 1440


def test_a_config_of_a_training_run_is_read(results, images, checkpoint, tmp_path, capfd):
    (tmp_path / 'args.yaml').write_text(f'data_dir: {images}\nmodel: test_resnet\nimg_size: 64\nlr: 0.3\nworkers: 0\n'
                                        'resume: auto\nval_split: validation\ndevice: cpu\nval_num_samples: null\n')
    expected = results()
    capfd.readouterr()
    assert validate.main(['-c', str(tmp_path / 'args.yaml'), '--checkpoint', str(checkpoint)]) == 0
    assert json.loads(capfd.readouterr().out.split('--result\n')[1])['top1'] == expected['top1']


@pytest.mark.parametrize('dialect', ['timm', 'cadene', 'npu'])
def test_checkpoints_of_any_dialect(reference_state_dict, tmp_path, dialect):
    state_dict = {f'module.{key}': value for key, value in weights.convert(reference_state_dict, dialect).items()}
    torch.save({'state_dict': state_dict}, tmp_path / 'model.pth.tar')
    path = str(tmp_path / 'model.pth.tar')
    args, candidate = validate.parse(['--checkpoint', path]), validate.Candidate('inception_resnet_v2_npu', path)
    model = validate.load_model(args, candidate)
    assert model.num_classes == 1000
    loaded = model.state_dict()
    for key, value in weights.convert(reference_state_dict, 'npu').items():
        assert torch.equal(loaded[key], value)


def test_images_that_cannot_be_read_are_not_counted_but_named(images, checkpoint, results, tmp_path):
    folder = tmp_path / 'images'
    shutil.copytree(images, folder)
    bad = folder / 'val' / 'class2' / '0.png'
    bad.write_bytes(bad.read_bytes()[:-500])
    found = results('--data-dir', str(folder), '--on-bad-image', 'skip')
    assert (found['count'], found['bad_image_count'], found['bad_images']) == (CLASSES * PER_CLASS - 1, 1, [str(bad)])
    with pytest.raises(UserError, match=f'image {bad} cannot be read'):
        results('--data-dir', str(folder))


@pytest.mark.long
def test_top1_of_1003_images_is_one_number_for_all_world_and_batch_sizes(checkpoint, tmp_path):
    random = np.random.default_rng(1)
    for number in range(1003):
        path = tmp_path / 'val' / f'class{number % CLASSES}' / f'{number}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((70, 70), Image.Resampling.BICUBIC).save(path)
    shutil.copytree(tmp_path / 'val', tmp_path / 'train')  # train.py insists on one
    found = {}
    for processes, batch in itertools.product((1, 2, 3), (7, 64)):
        for script in 'validate.py', 'train.py':
            found[script, processes, batch] = accuracy_of(script, tmp_path, checkpoint, processes, batch)
    print(found)
    assert len(set(found.values())) == 1


def accuracy_of(script: str, images: Path, checkpoint: Path, processes: int, batch: int) -> tuple[float, float]:
    """top-1 and top-5 as validate.py, or train.py without an epoch, reports them."""
    words = ['--data-dir', images, *MODEL, '-b', str(batch), '-j', '1']
    if script == 'validate.py':
        words += ['--checkpoint', checkpoint, '--use-ema', '--results-file', images / 'report.json', '--results-format',
                  'json']  # train.py takes averaged weights where there are some
    else:
        words += ['--initial-checkpoint', checkpoint, '--epochs', '0', '--output', images.parent, '--experiment',
                  images.name, '--num-classes', str(CLASSES)]
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes),
                    SCRIPTS / script, *words], check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    report = json.loads((images / 'report.json').read_text())
    return round(report['top1'], 4), round(report['top5'], 4)


# ------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(('words', 'message'), [
    (['--tf-preprocessing'], 'TensorFlow'),
    (['--aot-autograd'], '--torchcompile'),
    (['--naflex-loader'], 'NaFlex'),
    (['--num-gpu', '2'], 'torchrun'),
    (['--lr', '1'], 'option of train.py'),
    (['--batch-size', '0'], 'at least 1'),
    (['--amp', '--model-dtype', 'float16'], 'leave one out'),
    (['--torchscript', '--torchcompile'], 'exclude'),
    (['--model', 'no_such_model'], 'no such model'),
    (['--num-classes', '3'], '7 classes'),
    (['--real-labels', 'nowhere.json'], 'nowhere.json'),
    (['--valid-labels', 'nowhere.txt'], 'nowhere.txt'),
    (['--results-file', 'no/such/folder.csv'], 'cannot write no/such/folder.csv: there is no folder no/such.'),
    (['--tta', '3'], 'two views'),
    (['--workers', '-1'], 'at least 0'),
    (['--model', 'inception_resnet_v2_npu', '--img-size', '74'], 'at least 75 pixels'),
])
def test_errors_are_one_line(images, checkpoint, tmp_path, capfd, words, message):
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), tmp_path / 'small.pth')
    file = tmp_path / 'small.pth' if '--num-classes' in words else checkpoint
    arguments = ['--data-dir', str(images), *MODEL, '--checkpoint', str(file), *words]
    assert run_script('validate.py', validate.main, arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    (line,) = (line for line in lines if 'error:' in line)
    assert line.startswith('validate.py: error: ') and message in line
    assert not [line for line in lines if line.startswith('Validate [')]  # found before the evaluation


def test_out_of_memory_is_one_line_and_retried_if_asked(results, monkeypatch):
    sizes = []

    def measure(args, world, candidate, batch_size):
        sizes.append(batch_size)
        if batch_size > 10:
            raise torch.OutOfMemoryError('out of memory')
        return {'top1': 1.0}

    monkeypatch.setattr(validate, 'measure', measure)
    with pytest.raises(UserError, match='--batch-size 64'):
        results('-b', '64')
    sizes.clear()
    assert results('-b', '64', '--retry') == {'top1': 1.0} and sizes[0] == 64 and sizes[-1] <= 10

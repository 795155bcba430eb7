"""Wrong inputs of a training or an evaluation: one line, exit code 2, and no file lost, with one process or two.

In one process all of them run here; in two, through the launcher, one for each place where a mistake can be found,
and the whole list with ``pytest -m long``.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from tests.pictures import write_classes
from timm_npu_irv2.cli.script import run_script

SCRIPTS = Path(__file__).parents[2] / 'train_scripts'
sys.path.insert(0, str(SCRIPTS))
import train  # noqa: E402
import validate  # noqa: E402

MODEL = '--model test_resnet --img-size 64 --device cpu -b 2 -j 0'
TRAIN = f'{MODEL} --num-classes 3 --epochs 1 --train-batches-per-epoch 2 --log-interval 1'

# Words after the valid options of the script, which they override; {name} is a folder or file of the fixture below.
OF_TRAIN = [
    # The command line
    ('--epochz 3', 'Did you mean --epoch'),
    ('--lr', 'expected one argument'),
    ('--lr fast', 'fast'),
    ('--lr nan', '--lr nan: must be'),
    ('--batch-size 0', 'at least 1'),
    ('--batch-size many', 'many'),
    ('--epochs -1', 'at least 0'),
    ('--workers 500', 'CPU cores'),
    ('--smoothing 1', 'less than 1'),
    ('--sched cosin', 'cosine'),
    ('--opt sdg', 'Did you mean sgd'),
    ('--opt sgd --momentum 0', 'Nesterov momentum requires'),
    ('--opt adamw --opt-kwargs nonsense=1', 'nonsense'),
    ('--opt-kwargs nonsense', 'expected name=value'),
    ('--model resnet_fifty', 'no such model'),
    ('--model inceptionresnet_v2', 'Did you mean inception_resnet_v2'),
    ('--model-kwargs nonsense=1', 'nonsense'),
    ('--model inception_resnet_v2_npu --img-size 74', 'at least 75 pixels'),
    ('--img-size 64 --input-size 3 80 80', 'different sizes'),
    ('--in-chans 3 --mean 0.5 0.5', 'expected 1 or 3'),
    ('--input-img-mode P', '--input-img-mode'),
    ('--aa rand-nonsense', 'AutoAugment'),
    ('--scale 0.5 0.1', 'smaller one first'),
    ('--mixup 0.2 -b 3', 'even --batch-size'),
    ('--jsd-loss', '--aug-splits'),
    ('--loss-scale 128', '--amp'),
    ('--amp --amp-impl apex', 'apex'),
    ('--torchcompile nonsense', 'no such backend'),
    ('--torchscript --torchcompile', 'exclude'),
    ('--naflex-loader', 'vision transformers'),
    ('--kd-model-name nonsense', 'nonsense'),
    ('--kd-model-name test_efficientnet --kd-distill-type token', 'distillation head'),
    ('--recompute cheap', '--recompute is for inception_resnet_v2_npu, not test_resnet'),
    ('--sched wsd', 'decay_epochs'),
    ('--warmup-epochs 9', 'must not exceed --epochs'),
    ('--resume auto --experiment=', '--experiment'),
    ('--start-epoch 3', 'ends after 1'),
    ('--tta 3', 'two views'),
    ('--push-to-hub owner/name', '--push-to-hub publishes'),
    # Devices and packages
    ('--device tpu', 'tpu'),
    ('--device npu', 'no NPU'),
    ('--device cuda:77', 'CUDA'),
    ('--sync-bn --split-bn --aug-splits 2', 'exclude'),
    ('--device-list 0,1', '--multiprocessing-distributed'),
    ('--device-modules nonsense_module', 'nonsense_module'),
    ('--log-wandb', 'pip install wandb'),
    # Files
    ('-c {missing}.yaml', 'cannot read the config'),
    ('-c {unknown_key}', "unknown key 'momentumm'"),
    ('-c {no_yaml}', 'cannot read the config'),
    ('--resume {missing}.pth.tar', 'no such file'),
    ('--resume {torn}', 'cannot be read as a checkpoint'),
    ('--resume {other_network}', 'does not fit the model'),
    ('--initial-checkpoint {missing}.pth', '--initial-checkpoint'),
    ('--initial-checkpoint {torn}', 'torn.pth'),
    ('--initial-checkpoint {other_network}', 'other_network.pth'),
    ('--initial-checkpoint {five_classes}', '--pretrained-path'),
    ('--pretrained-path {missing}.pth', '--pretrained-path'),
    ('--pretrained-path {other_network}', 'other_network.pth'),
    ('--class-map {missing}.txt', '--class-map'),
    ('--output /proc/nowhere', 'output folder'),
    ('--experiment earlier', 'checkpoints of another run'),
    # Data
    ('--data-dir {missing}', 'does not exist'),
    ('--data-dir {empty}', 'no images in this folder'),
    ('--data-dir {no_val}', "no split 'validation'"),
    ('--data-dir {empty_class}', 'holds no image'),
    ('--data-dir {new_class}', "'class3'"),
    ('--data-dir {flat}', 'outside of class folders'),
    ('--data-dir {torn_image}', 'cannot be read'),
    ('--val-split train', 'not apart'),
    ('--num-classes 2', '3 classes'),
    ('--dataset nonsense/x', '<type>/<name>'),
    ('--dataset torch/nonsense', 'nonsense'),
    ('--dataset torch/cifar10', 'torch/cifar10'),
    # In the middle of a run
    ('--lr 1e30 --val-split=', 'the loss is nan'),
    ('--lr 1e30', 'last good checkpoint: none was saved'),
    ('--lr 1e30 --train-batches-per-epoch 1', 'the validation loss is nan'),
    ('--split-bn --resplit --img-size 32', '--batch-size 2: batch normalisation needs more than one value'),
]
OF_VALIDATE = [
    ('--checkpoint {missing}.pth', 'no such file'),
    ('--checkpoint {other_network}', 'other_network.pth'),
    ('--data-dir {missing}', 'does not exist'),
    ('--results-file {missing}/results.csv', 'there is no folder'),
]
WRONG = [*((train, *case) for case in OF_TRAIN), *((validate, *case) for case in OF_VALIDATE)]
IDS = [f'{script.__name__} {words}' for script, words, _ in WRONG]


@pytest.fixture(scope='module')
def places(tmp_path_factory) -> dict[str, Path]:
    """Folders and files by the names that the words above use."""
    root = tmp_path_factory.mktemp('wrong')
    names = 'data missing empty no_val empty_class new_class flat torn_image output'.split()
    found = {name: root / name for name in names} | {
        name: root / f'{name}{ending}' for name, ending in (
            ('torn', '.pth'), ('other_network', '.pth'), ('five_classes', '.pth'), ('weights', '.pth'),
            ('unknown_key', '.yaml'), ('no_yaml', '.yaml'))}
    for name in 'data', 'empty_class', 'new_class', 'torn_image':
        for split in 'train', 'val':
            write_classes(found[name] / split)
    found['empty'].mkdir()
    write_classes(found['no_val'] / 'train')
    (found['empty_class'] / 'train' / 'class9').mkdir()
    write_classes(found['new_class'] / 'val', classes=4)
    for split in 'train', 'val':
        write_classes(found['flat'] / split)
        (found['flat'] / split / 'loose.png').write_bytes((found['flat'] / split / 'class0' / '0.png').read_bytes())
    for path in found['torn_image'].glob('train/*/*.png'):
        path.write_bytes(path.read_bytes()[:-2000])
    for name, model, classes in (('other_network', 'test_efficientnet', 3), ('five_classes', 'test_resnet', 5),
                                 ('weights', 'test_resnet', 3)):
        torch.save(timm.create_model(model, num_classes=classes).state_dict(), found[name])
    found['torn'].write_bytes(found['weights'].read_bytes()[:-5000])
    found['unknown_key'].write_text('momentumm: 1\n')
    found['no_yaml'].write_text('a: [')
    earlier = found['output'] / 'earlier'
    earlier.mkdir(parents=True)
    (earlier / 'last.pth.tar').write_bytes(found['weights'].read_bytes())
    (earlier / 'summary.csv').write_text('epoch\n')
    return found


def arguments(script, words: str, places: dict[str, Path]) -> list[str]:
    own = f'{TRAIN} --output {{output}} --experiment new' if script is train else f'{MODEL} --checkpoint {{weights}}'
    line = f'--data-dir {{data}} {own} {words}'
    return [word.format(**places) for word in line.split()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def check(script, said: str, code: int, errors: str, before: dict[str, bytes], output: Path) -> None:
    lines = [line for line in errors.splitlines() if ': error: ' in line]
    assert code == 2 and len(lines) == 1, errors
    assert said in lines[0], errors
    assert 'Traceback' not in errors
    assert before.items() <= contents(output).items()
    shutil.rmtree(output / 'new', ignore_errors=True)


@pytest.mark.parametrize(('script', 'words', 'said'), WRONG, ids=IDS)
@pytest.mark.filterwarnings('ignore')
def test_a_wrong_input_is_one_line(places, capfd, monkeypatch, tmp_path, script, words, said):
    monkeypatch.chdir(tmp_path)
    before = contents(places['output'])
    code = run_script(f'{script.__name__}.py', script.main, arguments(script, words, places))
    check(script, said, code, capfd.readouterr().err, before, places['output'])


# The same in two processes. Each of these is found in another place: by the check before the processes start, in both
# of them, in rank 0 alone, and in a batch.
PLACES = ['--epochz 3', '--initial-checkpoint {five_classes}', '--output /proc/nowhere',
          '--data-dir {torn_image}']


def in_two_processes(script, words: str, places: dict[str, Path], folder: Path) -> subprocess.CompletedProcess:
    launch = f'source "{SCRIPTS / "common.sh"}"; launch {script.__name__}.py 2 "$@"'
    return subprocess.run(['bash', '-c', launch, 'launch.sh', *arguments(script, words, places)], capture_output=True,
                          text=True, check=False, cwd=folder, env={**os.environ, 'PYTHON': sys.executable})


def check_in_two_processes(script, words: str, said: str, places: dict[str, Path], folder: Path) -> None:
    before = contents(places['output'])
    done = in_two_processes(script, words, places, folder)
    check(script, said, done.returncode, done.stderr, before, places['output'])


@pytest.mark.parametrize('words', PLACES)
def test_so_it_is_in_two_processes(places, tmp_path, words):
    said = next(said for script, each, said in WRONG if script is train and each == words)
    check_in_two_processes(train, words, said, places, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(('script', 'words', 'said'), WRONG, ids=IDS)
def test_so_are_all_of_them(places, tmp_path, script, words, said):
    check_in_two_processes(script, words, said, places, tmp_path)

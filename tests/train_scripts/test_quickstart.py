"""The pieces of the quick start: the digits as an image folder, the recipe's words, and the picture of answers."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_npu_irv2.plots import GRID_SIZE, Prediction, draw_prediction_grid, select_predictions

SCRIPTS = Path(__file__).parents[2] / 'train_scripts'


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    pytest.importorskip('sklearn')
    folder = tmp_path_factory.mktemp('digits') / 'a b'
    subprocess.run([sys.executable, SCRIPTS / 'digits.py', folder], check=True)
    return folder


def test_the_last_360_digits_are_held_out(digits):
    numbers = {split: sorted(int(path.stem) for path in digits.glob(f'{split}/*/*.png')) for split in ('train', 'val')}
    assert numbers == {'train': list(range(1437)), 'val': list(range(1437, 1797))}
    assert [path.name for path in sorted((digits / 'val').iterdir())] == list('0123456789')


def test_digits_are_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits  # noqa: PLC0415 (an optional dependency)

    known = load_digits()
    for number in 0, 900, 1796:
        (path,) = digits.glob(f'*/*/{number:04d}.png')
        assert path.parent.name == str(known.target[number])
        with Image.open(path) as image:
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float) / 255 * 16
        assert np.corrcoef(small.flat, known.images[number].flat)[0, 1] > 0.95


def test_digits_that_are_there_stay(digits):
    path = next(digits.glob('train/*/0000.png'))
    before = path.stat().st_mtime_ns
    subprocess.run([sys.executable, SCRIPTS / 'digits.py', digits], check=True)
    assert path.stat().st_mtime_ns == before


@pytest.fixture
def quickstart(tmp_path):
    """quickstart(words…): run the script with a Python that writes down what it is called with."""
    environment, log = tmp_path / 'an environment', tmp_path / 'calls'
    (environment / 'bin').mkdir(parents=True)
    python = environment / 'bin' / 'python'
    python.write_text(f'#!/usr/bin/env bash\nprintf "%s|" "$@" >> "{log}"; echo >> "{log}"\n'
                      f'if [[ $1 == -c && $2 == *json* ]]; then echo 98.5; fi\n')
    python.chmod(0o755)

    def run(*words: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        done = subprocess.run(['bash', SCRIPTS / 'quickstart.sh', *words], capture_output=True, text=True, check=False,
                              env={**os.environ, 'VENV': str(environment), 'OUT': str(tmp_path / 'out $(here)')})
        return done, log.read_text().splitlines() if log.exists() else []

    return run


def test_quickstart_writes_trains_evaluates_and_tells(quickstart):
    done, calls = quickstart('--epochs', '2', '--model-kwargs', "a='b c'")
    assert done.returncode == 0, done.stderr
    _, digits, train, validate, _ = calls
    assert 'digits.py|' in digits and 'out $(here)/digits|' in digits
    assert 'train.py|-c|' in train and train.endswith("|--epochs|2|--model-kwargs|a='b c'|")
    assert 'validate.py|-c|' in validate and 'last.pth.tar|' in validate and 'predictions.png|' in validate
    assert '98.5 %' in done.stdout and 'last.pth.tar' in done.stdout and 'predictions.png' in done.stdout


@pytest.mark.parametrize('option', ['--output', '--experiment=x', '--data-dir=x'])
def test_quickstart_keeps_its_folders(quickstart, option):
    done, calls = quickstart(option)
    assert (done.returncode, calls) == (2, []) and 'set OUT' in done.stderr and done.stderr.count('\n') == 1


def test_wrong_answers_are_shown_first():
    answers = [(index, index % 10 == 3, 0) for index in range(100)]
    chosen = select_predictions(answers)
    assert len(chosen) == GRID_SIZE and [index for index, _, _ in chosen[:3]] == [3, 13, 23]
    assert [answer for _, answer, _ in chosen] == [True] * 10 + [False] * 30
    assert select_predictions(answers[:3]) == answers[:3] and select_predictions([]) == []
    assert len(select_predictions([(index, 1, 0) for index in range(100)])) == GRID_SIZE // 2


@pytest.mark.parametrize('count', [0, 1, 13, 40])
def test_a_picture_holds_up_to_forty_images(tmp_path, count):
    predictions = [Prediction(Image.new('RGB', (9, 5 + index)), [str(index)], target='a long name of a class')
                   for index in range(count)]
    assert draw_prediction_grid(tmp_path / 'picture.png', predictions, 'title')
    assert (tmp_path / 'picture.png').stat().st_size > 1000

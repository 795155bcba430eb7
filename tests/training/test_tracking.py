"""TensorBoard's event file: the scalars, the first validation pictures and the curves of a run, resumed ones too."""

import sys
from pathlib import Path

import pytest

from tests.pictures import write_pictures
from timm_npu_irv2.cli.script import run_script
from timm_npu_irv2.errors import UserError
from train_scripts import train

accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')

pytestmark = pytest.mark.filterwarnings('ignore')
PER_EPOCH = 3  # updates


@pytest.fixture
def run(tmp_path):
    write_pictures(tmp_path / 'images', train=4, val=4)

    def start(*words: str) -> Path:
        argv = ['--data-dir', str(tmp_path / 'images'), '--output', str(tmp_path), '--experiment', 'run', '--model',
                'test_resnet', '--img-size', '64', '-b', '4', '-j', '0', '--device', 'cpu', '--log-interval', '1',
                '--log-tensorboard', *words]
        assert run_script('train.py', train.main, argv) == 0
        return tmp_path / 'run'

    return start


def events(folder: Path):
    found = accumulator.EventAccumulator(str(folder / 'tensorboard'), {'scalars': 0, 'images': 0})
    return found.Reload()


def picture(found, tag: str) -> list[tuple[int, int, int]]:
    return [(event.step, event.width, event.height) for event in found.Images(tag)]


def test_a_run_is_in_the_event_file(run):
    pytest.importorskip('matplotlib')
    folder = run('--epochs', '2')
    found = events(folder)
    assert [event.step for event in found.Scalars('step/loss')] == list(range(1, 2 * PER_EPOCH + 1))
    rows = [line.split(',') for line in (folder / 'summary.csv').read_text().splitlines()]
    for column, *values in zip(*rows, strict=True):
        logged = found.Scalars(f'epoch/{column}')
        assert [event.step for event in logged] == [PER_EPOCH, 2 * PER_EPOCH]
        assert [event.value for event in logged] == pytest.approx([float(value) for value in values])
    assert picture(found, 'curves') == [(2 * PER_EPOCH, 1440, 960)]
    assert picture(found, 'validation') == [(0, 8 * 64, 2 * 64)]  # 12 images of 64 px, in rows of 8


def test_what_a_resumed_run_repeats_is_hidden(run):
    folder = run('--epochs', '2')
    run('--epochs', '3', '--resume', str(folder / 'checkpoint-0.pth.tar'))
    steps = [event.step for event in events(folder).Scalars('step/loss')]
    assert steps == list(range(1, 3 * PER_EPOCH + 1))


def test_a_service_that_fails_in_the_middle_does_not_end_the_run(run, monkeypatch, capfd):
    """wandb is not installed here; of it this takes the function that logs a row."""
    def fail(row):
        rows.append(row)
        raise ConnectionError('the network is gone')

    rows: list[dict] = []
    monkeypatch.setattr('timm_npu_irv2.training.tracking.check_installed', lambda *_: None)
    monkeypatch.setattr('timm_npu_irv2.training.tracking.start_wandb', lambda *_: fail)
    folder = run('--epochs', '2', '--log-wandb')
    assert len((folder / 'summary.csv').read_text().splitlines()) == 3
    assert [row['epoch'] for row in rows] == [0]
    assert capfd.readouterr().err.count('Weights & Biases: the run goes on without it: the network is gone') == 1


def test_a_missing_package_is_found_before_the_run(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorboard', None)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError, match=r'--log-tensorboard needs tensorboard: pip install tensorboard\.'):
        train.main(['--log-tensorboard'])

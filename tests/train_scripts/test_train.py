"""train.py as a user meets it: a tiny network on a tiny folder of images, options, resume, signals, mistakes."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from timm.models import register_model

from tests.kills import differences
from tests.pictures import write_pictures
from timm_npu_irv2.cli.script import run_script
from timm_npu_irv2.serialization import read_checkpoint
from train_scripts import inference, validate
from train_scripts import train as train_script

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'train_scripts' / 'train.py'
WITNESS = ROOT / 'tests' / 'witness'
SMALL = ('--model test_resnet --img-size 64 --num-classes 3 -b 4 -j 0 --device cpu --lr 0.01 --warmup-epochs 0 '
         '--epochs 1 --log-interval 2 --train-batches-per-epoch 3').split()

pytestmark = pytest.mark.filterwarnings('ignore')


@register_model
def tiny_teacher(pretrained=False, **kwargs):
    """A teacher that needs no download; narrower features than the student's."""
    return timm.create_model('test_efficientnet', **kwargs)


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    """Three classes that differ in their colour: 12 images each to train with, 5 to validate with."""
    return write_pictures(tmp_path_factory.mktemp('a folder') / 'images', train=12, val=5)


@pytest.fixture
def train(images, tmp_path, monkeypatch):
    """Run train.py in this process; the output folder, after checking the exit code."""
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)  # drawing curves takes longer than all the rest

    def run(*words: str, code: int = 0, experiment: str = 'run') -> Path:
        argv = ['--data-dir', str(images), '--output', str(tmp_path), '--experiment', experiment, *SMALL, *words]
        assert run_script('train.py', train_script.main, argv) == code
        return tmp_path / experiment

    return run


def last(folder: Path) -> dict:
    return read_checkpoint(folder / 'last.pth.tar')


def rows(folder: Path) -> list[list[str]]:
    """summary.csv without the throughput, which no two runs share."""
    return [line.split(',')[:-1] for line in (folder / 'summary.csv').read_text().splitlines()]


def test_a_run_leaves_timms_files_a_report_and_the_zoos_three_lines(train, capsys):
    folder = train('--epochs', '2')
    names = {path.name for path in folder.iterdir()}
    assert names >= {'args.yaml', 'summary.csv', 'report.json', 'last.pth.tar', 'model_best.pth.tar',
                     'checkpoint-0.pth.tar', 'checkpoint-1.pth.tar'}
    assert len(rows(folder)) == 3
    report = json.loads((folder / 'report.json').read_text())
    assert report['epochs'] == 2 and report['world_size'] == 1 and report['batch_size'] == 4
    assert report['images_per_second'] > 0 and 0 <= report['top1'] <= 100
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(' : ')[0] for line in lines] == [
        'Final Performance images/sec', 'Final Train Accuracy', 'E2E Training Duration sec']


def test_the_network_of_this_package_trains_at_its_smallest_size(train):
    folder = train('--model', 'inception_resnet_v2_npu', '--img-size', '75', '--train-batches-per-epoch', '2',
                   '--val-split', '', '-b', '2')
    assert last(folder)['arch'] == 'inception_resnet_v2_npu'
    assert torch.isfinite(last(folder)['state_dict']['classif.weight']).all()


# Together, every option that changes what a run does; those that exclude each other are in different lines.
RUNS = [
    '--amp --channels-last --model-ema --clip-grad 1 --sched plateau --synchronize-step',
    '--opt-level O2 --model-ema --clip-grad 0.1 --clip-mode agc --opt adamp --grad-accum-steps 2',
    '--amp --opt-level O2 --loss-scale dynamic --amp-dtype float16 --opt npufusedsgd --sched none',
    '--amp --loss-scale 128 --opt npufusedadamw --opt-betas 0.9 0.99 --opt-eps 1e-6 --sched step --lr-noise 0.1 0.9',
    '--model-dtype bfloat16 --opt-level O0 --sched wsd --decay-epochs 1 --sched-on-updates --drop 0.3',
    '--opt adamw --layer-decay 0.7 --layer-decay-min-scale 0.1 --sched poly --lr-cycle-limit 2 --gp max',
    '--opt lookahead_sgd --opt-kwargs nesterov=False --clip-grad 0.1 --clip-mode value --sched tanh --no-aug',
    '--mixup 0.2 --cutmix 0.4 --mixup-off-epoch 1 --epochs 2 --use-multi-epochs-loader --sched multistep '
    '--decay-milestones 1 2',
    '--bce-loss --mixup 0.1 --bce-target-thresh 0.2 --bce-sum --no-prefetcher --reprob 0.5',
    '--bce-loss --bce-pos-weight 2 --model-ema --model-ema-force-cpu --model-ema-warmup --eval-metric loss',
    '--jsd-loss --aug-splits 2 --aa augmix-m1 --split-bn --resplit --reprob 0.2 --smoothing 0',
    '--train-img-sizes 64 96 --train-batch-sizes 4 2 --variable-batch-loss-scale linear --val-split= --fast-norm',
    '--train-img-sizes 64 96 --train-size-schedule progressive --variable-batch-loss-scale sqrt --epochs 2 --sync-bn',
    '--torchcompile eager --model-ema --aug-repeats 2 --epoch-repeats 2 --pin-mem --worker-seeding part',
    '--torchscript --in-chans 1 --remode const --jit-compile --allow-internal-format',
    '--grad-checkpointing --head-init-scale 0.1 --head-init-bias -2 --drop-path 0.1 --mean 0.5 --std 0.5',
    '--kd-model-name tiny_teacher --tta 2 -vb 6 --bn-momentum 0.3 --bn-eps 1e-3 --model-kwargs drop_rate=0.1',
    '--kd-model-name tiny_teacher --kd-distill-type feature --opt-level O2 --task-loss-weight 0.3 --model-ema '
    '--clip-grad 1',
]


@pytest.mark.parametrize('words', RUNS)
def test_options_go_together_and_leave_finite_weights(train, words):
    folder = train(*words.split())
    assert all(torch.isfinite(value).all() for value in last(folder)['state_dict'].values())


def test_resume_continues_to_the_last_bit_with_other_workers_and_another_log_interval(train):
    """From a checkpoint in mid-epoch, with dropout, mixup, momentum and an average of the weights."""
    words = ['--epochs', '2', '--model-ema', '--mixup', '0.2', '--drop', '0.2', '--opt-level', 'O2']
    undisturbed = train(*words, '--recovery-interval', '1', experiment='undisturbed')
    resumed = undisturbed.parent / 'resumed'
    resumed.mkdir()
    shutil.copy(undisturbed / 'recovery-1-1.pth.tar', resumed)
    (resumed / 'summary.csv').write_text(''.join((undisturbed / 'summary.csv').read_text().splitlines(True)[:2]))
    train(*words, '--resume', 'auto', '-j', '1', '--log-interval', '1', experiment='resumed')
    assert rows(resumed) == rows(undisturbed)
    for key in 'state_dict', 'state_dict_ema', 'optimizer':
        assert not differences(last(resumed)[key], last(undisturbed)[key])


def test_resume_goes_on_with_epoch_best_metric_and_duration(train):
    folder = train('--epochs', '1')
    before = last(folder)['seconds']
    train('--epochs', '3', '--resume', str(folder / 'last.pth.tar'))
    assert [row[0] for row in rows(folder)] == ['epoch', '0', '1', '2']
    assert last(folder)['training']['position']['epoch'] == 3
    assert json.loads((folder / 'report.json').read_text())['seconds'] > before > 0


def test_resume_auto_in_an_empty_folder_is_a_new_run(train):
    assert len(rows(train('--resume', 'auto'))) == 2


def test_start_epoch_overrides_the_checkpoint(train):
    folder = train('--epochs', '2')
    train('--epochs', '2', '--start-epoch', '1', '--resume', str(folder / 'last.pth.tar'), experiment='again')
    assert [row[0] for row in rows(folder.parent / 'again')] == ['epoch', '1']


def test_changed_data_is_refused_unless_told_otherwise(train, images, tmp_path, capsys):
    changed = tmp_path / 'changed'
    shutil.copytree(images, changed)
    words = ['--data-dir', str(changed), '--epochs', '2', '--resume']
    path = str(train('--data-dir', str(changed), '--recovery-interval', '1') / 'recovery-0-2.pth.tar')
    (changed / 'train' / 'class1').rename(changed / 'train' / 'class3')
    (changed / 'val' / 'class1').rename(changed / 'val' / 'class3')
    train(*words, path, code=2)
    assert 'class class1 is missing, class class3 is new' in capsys.readouterr().err
    folder = train(*words, path, '--allow-changed-data')
    assert 'Continuing with changed data' in capsys.readouterr().err
    assert last(folder)['training']['position'] == {'epoch': 2, 'batch': 0, 'updates': 6, 'samples': 0}


def test_a_learning_rate_of_0_is_0(train):
    folder = train('--lr', '0', '--epochs', '1')
    assert [row[5] for row in rows(folder)] == ['lr', '0.0']


def test_epochs_0_evaluates_and_stops(train, capsys):
    folder = train('--epochs', '2')
    expected = json.loads((folder / 'report.json').read_text())
    evaluated = train(
        '--epochs', '0', '--initial-checkpoint', str(folder / 'model_best.pth.tar'), experiment='evaluated'
    )
    report = json.loads((evaluated / 'report.json').read_text())
    assert report['top1'] == expected['top1'] and report['epochs'] == 0
    assert not (evaluated / 'last.pth.tar').exists()
    assert 'Final Train Accuracy' in capsys.readouterr().out


def test_args_yaml_repeats_the_run(train):
    first = train('--seed', '7')
    again = run_script('train.py', train_script.main, ['-c', str(first / 'args.yaml'), '--experiment', 'again'])
    assert again == 0
    assert not differences(last(first)['state_dict'], last(first.parent / 'again')['state_dict'])


def test_val_interval_skips_validations_and_checkpoints_but_not_the_last(train):
    folder = train('--epochs', '3', '--val-interval', '2')
    assert not (folder / 'checkpoint-0.pth.tar').exists()
    assert (folder / 'checkpoint-1.pth.tar').exists() and (folder / 'checkpoint-2.pth.tar').exists()
    assert [bool(row[2]) for row in rows(folder)[1:]] == [False, True, True]


@pytest.mark.parametrize('channels', ['2', '3', '4'])
def test_save_images_writes_a_batch_with_each_line_of_the_log(train, channels):
    folder = train('--save-images', '--in-chans', channels)
    assert {path.name for path in folder.glob('*.jpg')} == {'train-batch-0.jpg', 'train-batch-1.jpg'}


def test_a_checkpoint_of_another_network_or_number_of_classes_is_refused(train, capsys):
    path = str(train() / 'last.pth.tar')
    train('--resume', path, '--num-classes', '4', code=2)
    assert 'a checkpoint with 3 classes, not 4' in capsys.readouterr().err
    train('--resume', path, '--model', 'test_efficientnet', code=2)
    assert 'a checkpoint of --model test_resnet' in capsys.readouterr().err


def test_a_folder_with_the_checkpoints_of_another_run_is_refused(train, capsys):
    folder = train()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    train(code=2)
    assert 'has the checkpoints of another run (' in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_restarts_need_a_folder_to_go_on_in(train, capsys, monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', '3')
    train('--experiment', '', code=2)
    assert '--max-restarts needs --experiment' in capsys.readouterr().err


def test_a_restart_goes_on_by_itself_whatever_the_first_start_was_told(train, monkeypatch):
    words = ['--no-resume-opt', '--start-epoch', '0', '--model-ema', '--epochs', '2']
    undisturbed = train(*words, '--recovery-interval', '1', experiment='undisturbed')
    restarted = undisturbed.parent / 'restarted'
    restarted.mkdir()
    shutil.copy(undisturbed / 'recovery-1-1.pth.tar', restarted)
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    train(*words, experiment='restarted')
    for key in 'state_dict', 'state_dict_ema', 'optimizer':
        assert not differences(last(restarted)[key], last(undisturbed)[key])


@pytest.fixture
def damaged(images, tmp_path) -> Path:
    """The images, one of each split cut off."""
    folder = tmp_path / 'damaged'
    shutil.copytree(images, folder)
    for split in 'train', 'val':
        path = folder / split / 'class1' / '3.png'
        path.write_bytes(path.read_bytes()[:-2000])
    return folder


def test_bad_images_are_counted_and_named_in_the_report(train, damaged, capsys):
    folder = train('--data-dir', str(damaged), '--on-bad-image', 'skip', '--train-batches-per-epoch', '9')
    report = json.loads((folder / 'report.json').read_text())
    expected = [str(damaged / split / 'class1' / '3.png') for split in ('train', 'val')]
    assert (report['bad_image_count'], report['bad_images']) == (2, expected)
    assert report['top1'] in [100 * hits / 14 for hits in range(15)]
    told = capsys.readouterr().err
    assert all(f'Skipped image {name}' in told for name in expected)


def test_a_bad_image_stops_the_run_unless_told_otherwise(train, damaged, capsys):
    train('--data-dir', str(damaged), '--train-batches-per-epoch', '9', code=2)
    assert f"error: image {damaged / 'train' / 'class1' / '3.png'} cannot be read" in capsys.readouterr().err


class Exhausting(torch.nn.Linear):
    def forward(self, features):
        raise torch.OutOfMemoryError('device out of memory. Tried to allocate 20.00 GiB')


@register_model
def too_large_model(pretrained=False, **kwargs):
    model = timm.create_model('test_resnet', **kwargs)
    model.fc = Exhausting(1, 3)
    return model


def test_lack_of_memory_names_the_batch_size_to_try(train, capsys):
    train('--model', 'too_large_model', code=2)
    assert '--batch-size 4. Try --batch-size 2 --grad-accum-steps 2, which makes' in capsys.readouterr().err
    train('--model', 'too_large_model', '-b', '9', '--grad-accum-steps', '2', code=2)
    assert '--batch-size 9. Try --batch-size 3 --grad-accum-steps 6, which makes' in capsys.readouterr().err
    train('--model', 'too_large_model', '-b', '1', code=2)
    assert '--batch-size 1. Try --grad-checkpointing.' in capsys.readouterr().err


@pytest.mark.parametrize('words', ['--batch-size 2 --grad-accum-steps 2', '--grad-checkpointing'])
def test_a_resumed_run_may_follow_that_advice(train, images, tmp_path, words):
    argv = ['--data-dir', str(images), '--output', str(tmp_path), *SMALL[:-2], '--recovery-interval', '4']
    assert run_script('train.py', train_script.main, [*argv, '--experiment', 'a']) == 0
    path = str(tmp_path / 'a' / 'recovery-0-8.pth.tar')
    argv += ['--experiment', 'b', '--resume', path, *words.split()]
    assert run_script('train.py', train_script.main, argv) == 0
    assert last(tmp_path / 'b')['training']['position']['updates'] == 9


def test_a_model_that_the_backend_cannot_compile_is_one_line(train, images, tmp_path, capsys):
    from torch._dynamo import register_backend  # noqa: PLC0415 - takes seconds

    @register_backend
    def refusing(graph, inputs):
        raise OSError('there is no compiler\nof C++')

    words = ['--torchcompile', 'refusing']
    weights = str(tmp_path / 'a.pth')
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), weights)
    train(*words, code=2)
    for script in validate, inference:
        argv = [str(images), '--model', 'test_resnet', '--num-classes', '3', '--img-size', '64', '--device', 'cpu']
        assert run_script('x.py', script.main, [*argv, *words, '--checkpoint', weights]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if 'error: ' in line]
    said = '--torchcompile refusing: the model cannot be compiled: '
    assert len(errors) == 3 and all(said in line for line in errors)
    assert all('there is no compiler of C++' in line for line in errors)


# As processes of their own


@pytest.fixture
def start(images, tmp_path):
    """start(options…, torchrun=0, variables={}) -> a process of train.py, or of torchrun, which ends with the test."""
    started = []

    def start_process(
            *words: str, torchrun: int = 0, variables: dict[str, str] | None = None, **options) -> subprocess.Popen:
        path = os.pathsep.join([str(WITNESS), str(ROOT)])
        launcher = [] if not torchrun else [
            '-m', 'torch.distributed.run', '--nproc-per-node', str(torchrun), '--rdzv-backend', 'c10d',
            '--rdzv-endpoint', 'localhost:0', '--max-restarts', '1']
        process = subprocess.Popen(
            [sys.executable, *launcher, str(SCRIPT), '--data-dir', str(images), '--output', str(tmp_path),
             '--experiment', 'run', *SMALL, *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1', **(variables or {})}, **options)
        started.append(process)
        return process

    yield start_process
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def output_of(process: subprocess.Popen) -> str:
    return process.communicate(timeout=2400)[0]


def test_two_processes_share_a_run_and_its_evaluation(start, tmp_path):
    process = start('--epochs', '2', '--model-ema', torchrun=2)
    out = output_of(process)
    assert process.returncode == 0, out
    assert out.count('Final Performance') == 1 and out.count('Epoch 0') == 1
    state = last(tmp_path / 'run')
    assert len(state['training']['processes']) == 2
    report = json.loads((tmp_path / 'run' / 'report.json').read_text())
    assert report['world_size'] == 2 and report['batch_size'] == 8
    assert report['top1'] in [100 * hits / 15 for hits in range(16)]  # 15 images, each once


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_the_zoos_launcher_stops_on_a_signal_with_a_checkpoint_to_resume_from(start, tmp_path, number):
    words = ['--epochs', '500', '--multiprocessing-distributed', '--device-list', '0,1']
    process = start(*words)
    wait_for(tmp_path / 'run' / 'checkpoint-0.pth.tar', process)
    process.send_signal(number)
    out = output_of(process)
    assert process.returncode == 128 + number, out
    assert 'Traceback' not in out
    path = Path(re.search(r'--resume (\S+) goes on', out)[1])
    assert read_checkpoint(path)['training']['position']['updates'] > 0
    assert not list(path.parent.glob('.*.part'))  # nothing half-written


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 2400
    while not path.exists():
        assert process.poll() is None, output_of(process)
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_zoos_launcher_ends_with_one_line_for_a_mistake_of_all_processes(start):
    process = start('--multiprocessing-distributed', '--device-list', '0,1', '-b', '5')
    out = output_of(process)
    assert process.returncode == 2
    assert [line for line in out.splitlines() if line.startswith('train.py: error')] == [out.strip().splitlines()[-1]]
    assert 'must be a multiple of 2' in out and 'Traceback' not in out


def assert_no_file_is_half_written(folder: Path) -> None:
    assert not list(folder.glob('.*.part'))
    for path in folder.glob('*.pth.tar'):
        read_checkpoint(path)


def test_a_killed_worker_is_one_line(start, tmp_path):
    process = start('--epochs', '3', '-j', '1', '--device-modules', 'killed_worker')
    out = output_of(process)
    assert process.returncode == 2 and 'Traceback' not in out, out
    assert re.search(r'train.py: error: a process that loads images was killed, .*fewer --workers', out), out
    assert_no_file_is_half_written(tmp_path / 'run')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_all_processes_stops_them_with_a_checkpoint(start, tmp_path, number):
    """A cluster's SIGTERM or notice, or a terminal that is closed, reaches the workers too."""
    words = ['--epochs', '500', '-j', '2', '--use-multi-epochs-loader']
    process = start(*words)
    wait_for(tmp_path / 'run' / 'checkpoint-0.pth.tar', process)
    os.killpg(process.pid, number)
    out = output_of(process)
    assert process.returncode == 128 + number, out
    assert 'Traceback' not in out and 'goes on from there' in out
    assert_no_file_is_half_written(tmp_path / 'run')


def test_a_job_of_which_a_rank_is_killed_restarts_and_goes_on_by_itself(start, tmp_path):
    words = ['--epochs', '3', '--train-batches-per-epoch', '5', '--recovery-interval', '1', '-b', '2']
    variables = {'SAMPLE_LOG': str(tmp_path / 'samples'), 'KILL_AT': '1 3', 'KILL_RANK': '1'}
    process = start(*words, '--device-modules', 'sample_log', torchrun=2, variables=variables)
    out = output_of(process)
    assert process.returncode == 0, out
    assert re.search(r'Resuming automatically: \S+\.pth\.tar', out) and 'Final Performance' in out
    assert [row[0] for row in rows(tmp_path / 'run')] == ['epoch', *map(str, range(3))]


def test_a_disk_that_is_full_stops_the_run_and_spoils_nothing(start, tmp_path):
    """A limit on the size of files stands for it: torch's file of 3 MB does not fit."""
    process = start('--epochs', '2')
    output_of(process)
    before = {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir() if path.name.endswith('.pth.tar')}

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = start('--epochs', '4', '--resume', 'auto', preexec_fn=small_files)
    out = output_of(process)
    assert process.returncode == 2 and 'Traceback' not in out, out
    assert re.search(r'error: cannot write \S+last\.pth\.tar: .*Earlier checkpoints are untouched\.', out), out
    after = {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir() if path.name.endswith('.pth.tar')}
    assert after == before
    assert_no_file_is_half_written(tmp_path / 'run')

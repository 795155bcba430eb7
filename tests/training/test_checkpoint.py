"""Checkpoints: whole or not at all, exact, readable by timm, and never executed."""

import argparse
import dataclasses
import os
import pickle
import random
import resource
from pathlib import Path

import pytest
import timm
import torch
from timm.models import load_checkpoint
from timm.task import ClassificationTask, FeatureDistillationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver as TimmSaver

from tests.data.batches import Batches
from timm_npu_irv2 import serialization
from timm_npu_irv2.distributed import World
from timm_npu_irv2.errors import CannotWrite, UserError
from timm_npu_irv2.precision import create_precision
from timm_npu_irv2.serialization import peek_checkpoint, read_checkpoint, write_checkpoint
from timm_npu_irv2.training import setup
from timm_npu_irv2.training.checkpoint import RunInfo, resume, training_state
from timm_npu_irv2.training.engine import Diverged, Position, Trainer, TrainSettings
from timm_npu_irv2.training.layout import plan_layout
from timm_npu_irv2.training.options import parse_args
from timm_npu_irv2.training.saver import CheckpointSaver, find_newest
from timm_npu_irv2.training.task import build_task

WORLD = World()


def options(*words: str) -> argparse.Namespace:
    usual = '--model test_resnet --num-classes 3 --drop 0.3 --checkpoint-hist 2'.split()
    return parse_args([*usual, *words])


def info_of(args: argparse.Namespace) -> RunInfo:
    return RunInfo(args.model, args.num_classes, vars(args))


def saver_in(folder: Path, args: argparse.Namespace, decreasing: bool = False) -> CheckpointSaver:
    return CheckpointSaver(folder, WORLD, info_of(args), keep=args.checkpoint_hist, decreasing=decreasing)


def trainer_of(args: argparse.Namespace, seed: int = 0, **settings) -> Trainer:
    torch.manual_seed(seed)
    model = timm.create_model(args.model, num_classes=args.num_classes, drop_rate=args.drop)
    task = ClassificationTask(model, verbose=False)
    if args.kd_model_name:
        torch.manual_seed(9)
        teacher = timm.create_model('test_efficientnet', num_classes=args.num_classes)
        task = FeatureDistillationTask(model, teacher, verbose=False)
    precision = create_precision(WORLD.device, amp=args.amp, opt_level=args.opt_level)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.01, momentum=0.9)
    task.trainable_module, optimizer = precision.prepare(task.trainable_module, optimizer)
    if args.model_ema:
        setup.setup_ema(task, precision, decay=args.model_ema_decay)
    generator = torch.Generator().manual_seed(1)
    loader = Batches((torch.randn(2, 3, 32, 32, generator=generator), torch.tensor([0, 1])) for _ in range(4))
    return Trainer(task, loader, optimizer, precision, WORLD, settings=TrainSettings(**settings))


def assert_same(one, other) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.mark.parametrize('words', [
    '', '--opt-level O2 --model-ema', '--kd-model-name t --model-ema --opt-level O2', '--amp --model-ema',
])
def test_a_run_resumed_in_mid_epoch_ends_in_the_same_bits(tmp_path, words):
    args = options(*words.split())
    saver = saver_in(tmp_path, args)
    undisturbed = trainer_of(args, recovery_interval=2)
    undisturbed.on_recovery = saver.save_recovery
    expected = undisturbed.train_one_epoch()
    saver.wait()
    resumed = trainer_of(args, seed=5)
    resume(resumed, tmp_path / 'recovery-0-2.pth.tar', info_of(args))
    assert resumed.position == Position(0, 2, 2)
    metrics = resumed.train_one_epoch()
    assert {key: metrics[key] for key in ('loss', 'top1')} == {key: expected[key] for key in ('loss', 'top1')}
    one, other = training_state(resumed, info_of(args)), training_state(undisturbed, info_of(args))
    for state in (one, other):
        del state['training']['throughput']
    assert_same(one, other)


def test_older_checkpoints_keep_the_counts_of_batches_in_the_weights_alone(tmp_path):
    args = options('--model-ema')
    trainer = trainer_of(args)
    trainer.train_one_epoch()
    content = training_state(trainer, info_of(args))
    modules = {'model': trainer.module, 'ema': trainer.ema.module}
    statistics = {name: {key: value + 1 for key, value in module.named_buffers() if 'num_batches' not in key}
                  for name, module in modules.items()}
    processes = content['training']['processes']
    processes.append({**processes[0], 'buffers': statistics})
    content['training']['layout']['processes'] = 2
    write_checkpoint(content, tmp_path / 'a.pth.tar')
    resumed = trainer_of(args, seed=5)
    resumed.world = World(rank=1, size=2)
    resume(resumed, tmp_path / 'a.pth.tar', info_of(args))
    for name, module in ('model', resumed.module), ('ema', resumed.ema.module):
        buffers = dict(module.named_buffers())
        assert_same({key: buffers[key] for key in statistics[name]}, statistics[name])
        counts = [value for key, value in buffers.items() if 'num_batches' in key]
        assert len(counts) > 5 and all(count == 4 for count in counts), name


# Between them: state outside of state dicts, in a scheduler, an optimizer, an average and a loss.
HIDDEN = [
    '--model-dtype bfloat16 --model-ema', '--sched plateau --lr-noise 0.1 0.9 --patience-epochs 0', '--opt adahessian',
    '--opt lookahead_adahessian --opt-kwargs update_each=3', '--loss-with-memory', '--opt lamb', '--opt adan',
]


class LossWithMemory(torch.nn.Module):
    """Smooths by a random amount, and less from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.random = torch.Generator().manual_seed(3), random.Random(3)
        self.amount, self.register = 0.5, [1.0]

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.amount *= 0.9
        self.register = [*self.register[-3:], self.amount]
        drawn = torch.rand((), generator=self.generator).item() * self.random.random() * sum(self.register)
        return torch.nn.functional.cross_entropy(output, target, label_smoothing=min(drawn, 1.0))


def trainer_by_options(*words: str, seed: int) -> tuple[Trainer, RunInfo]:
    """What train.py builds."""
    special = '--loss-with-memory' in words
    args = options('--epochs', '8', '--warmup-epochs', '1', *(word for word in words if word != '--loss-with-memory'))
    torch.manual_seed(seed)
    precision = setup.build_precision(args, WORLD)
    task = build_task(setup.place_model(setup.build_model(args), WORLD), args, WORLD)
    if special:
        task.criterion = LossWithMemory()
    optimizer = setup.build_optimizer(task.trainable_module, args, 0.01 if args.lr is None else args.lr)
    task.trainable_module, optimizer = precision.prepare(task.trainable_module, optimizer)
    if args.model_ema:
        setup.setup_ema(task, precision, decay=0.9)
    scheduler, _ = setup.build_scheduler(optimizer, args, 4, decreasing_metric=False)
    generator = torch.Generator().manual_seed(1)
    dtype = precision.input_dtype
    loader = Batches((torch.randn(2, 3, 32, 32, generator=generator).to(dtype), torch.tensor([0, 1])) for _ in range(4))
    layout = plan_layout(args, WORLD, None)
    layout = dataclasses.replace(layout, epoch_samples=len(loader) * layout.images_per_batch)
    settings = dataclasses.replace(setup.train_settings(args, layout, 1.0), recovery_interval=2)
    return Trainer(task, loader, optimizer, precision, WORLD, scheduler, settings), info_of(args)


def train_epochs(trainer: Trainer, until: int) -> None:
    while trainer.position.epoch < until:
        trainer.train_one_epoch()
        trainer.scheduler.step(trainer.position.epoch, 50.0)


def assert_resumes_exactly(folder: Path, *words: str) -> None:
    undisturbed, info = trainer_by_options(*words, seed=0)
    train_epochs(undisturbed, until=3)
    undisturbed.on_recovery = lambda trainer: write_checkpoint(training_state(trainer, info), folder / 'a.pth.tar')
    train_epochs(undisturbed, until=4)
    undisturbed.on_recovery = lambda trainer: None
    train_epochs(undisturbed, until=5)
    resumed, _ = trainer_by_options(*words, seed=5)
    resume(resumed, folder / 'a.pth.tar', info)
    setup.fast_forward(resumed.scheduler, resumed.position)
    assert resumed.position == Position(3, 2, 14)
    train_epochs(resumed, until=5)
    one, other = training_state(resumed, info), training_state(undisturbed, info)
    for state in (one, other):
        del state['training']['throughput']
    assert_same(one, other)


@pytest.mark.parametrize('words', HIDDEN)
def test_state_outside_of_state_dicts_goes_on_too(tmp_path, words):
    assert_resumes_exactly(tmp_path, *words.split())


@pytest.mark.long
@pytest.mark.parametrize('name', timm.optim.list_optimizers(exclude_filters=['bnb*', 'fused*']))  # bitsandbytes, apex
def test_every_optimizer_of_timm_goes_on_in_the_same_bits(tmp_path, name):
    assert_resumes_exactly(tmp_path, '--opt', name, '--sched', 'plateau', '--lr-noise', '0.1', '--lr', '0.001')


def test_a_changed_option_is_not_undone_by_the_state_of_the_scheduler(tmp_path):
    trainer, info = trainer_by_options('--sched', 'plateau', '--patience-epochs', '7', seed=0)
    train_epochs(trainer, until=3)
    write_checkpoint(training_state(trainer, info), tmp_path / 'a.pth.tar')
    resumed, info = trainer_by_options('--sched', 'plateau', '--patience-epochs', '2', seed=0)
    resume(resumed, tmp_path / 'a.pth.tar', info)
    assert resumed.scheduler.lr_scheduler.patience == 2
    assert resumed.scheduler.lr_scheduler.best == trainer.scheduler.lr_scheduler.best == 50


def test_timm_reads_our_checkpoints(tmp_path):
    args = options('--model-ema')
    trainer = trainer_of(args)
    trainer.train_one_epoch()
    saver = saver_in(tmp_path, args)
    saver.save_epoch(trainer, 0, 50.0)
    saver.wait()
    model = timm.create_model('test_resnet', num_classes=3)
    load_checkpoint(model, str(tmp_path / 'model_best.pth.tar'), use_ema=True)
    assert_same(dict(model.state_dict()), dict(trainer.task.trainable_module_ema.module.state_dict()))
    task = ClassificationTask(timm.create_model('test_resnet', num_classes=3), verbose=False)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1, momentum=0.9)
    assert resume_task_checkpoint(task, str(tmp_path / 'last.pth.tar'), optimizer=optimizer) == 1
    assert_same(optimizer.state_dict()['state'], trainer.optimizer.state_dict()['state'])


def test_weights_in_a_checkpoint_are_contiguous_whatever_the_layout_in_training(tmp_path):
    # timm's clean_checkpoint.py makes safetensors of them, which take no other.
    args = options('--model-ema')
    trainer = trainer_of(args)
    trainer.module.to(memory_format=torch.channels_last)
    saver = saver_in(tmp_path, args)
    saver.save_epoch(trainer, 0, 50.0)
    saver.wait()
    checkpoint = torch.load(tmp_path / 'last.pth.tar', weights_only=True)
    for entry in ('state_dict', 'state_dict_ema'):
        assert all(value.is_contiguous() for value in checkpoint[entry].values())


def test_a_checkpoint_of_timm_continues_with_its_optimizer_and_epoch(tmp_path):
    args = options()
    theirs = trainer_of(args)
    theirs.train_one_epoch()
    TimmSaver(theirs.task.trainable_module, theirs.optimizer, args, checkpoint_dir=str(tmp_path),
              task=theirs.task).save_checkpoint(4, metric=1.0)
    ours = trainer_of(args, seed=1)
    resume(ours, tmp_path / 'last.pth.tar', info_of(args))
    assert ours.position == Position(5, 0, 20)
    assert_same(ours.optimizer.state_dict()['state'], theirs.optimizer.state_dict()['state'])
    assert_same(dict(ours.task.trainable_module.state_dict()), dict(theirs.task.trainable_module.state_dict()))


@pytest.mark.parametrize('name', ['weights.safetensors', 'weights.pth'])
def test_a_file_of_weights_alone_starts_at_the_beginning(tmp_path, name):
    args = options()
    state_dict = trainer_of(args, seed=3).task.trainable_module.state_dict()
    serialization.save_weights(state_dict, tmp_path / name)
    trainer = trainer_of(args)
    resume(trainer, tmp_path / name, info_of(args))
    assert trainer.position == Position()
    assert_same(dict(trainer.task.trainable_module.state_dict()), dict(state_dict))


def test_without_the_optimizer_come_the_weights_only(tmp_path):
    args = options()
    trainer = trainer_of(args)
    trainer.train_one_epoch()
    write_checkpoint(training_state(trainer, info_of(args)), tmp_path / 'a.pth.tar')
    fresh = trainer_of(args, seed=1)
    resume(fresh, tmp_path / 'a.pth.tar', info_of(args), load_optimizer=False)
    assert not fresh.optimizer.state_dict()['state']
    assert fresh.position == Position(1, 0, 4)
    assert_same(dict(fresh.task.trainable_module.state_dict()), dict(trainer.task.trainable_module.state_dict()))


def test_weights_that_do_not_fit_are_named_in_one_line(tmp_path):
    other = trainer_of(options('--model', 'test_efficientnet')).task.trainable_module
    write_checkpoint({'state_dict': other.state_dict()}, tmp_path / 'a.pth.tar')
    with pytest.raises(UserError, match=r'a\.pth\.tar does not fit the model') as caught:
        resume(trainer_of(options()), tmp_path / 'a.pth.tar', info_of(options()))
    assert '\n' not in str(caught.value)


# Files


def test_the_best_the_last_and_two_recoveries_are_kept(tmp_path):
    args = options()
    trainer, saver = trainer_of(args), saver_in(tmp_path, args)
    for epoch, metric in enumerate([10.0, 30.0, float('nan'), 20.0]):
        saver.save_epoch(trainer, epoch, metric)
        trainer.position = Position(epoch, 1, epoch + 1)
        saver.save_recovery(trainer)
    saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'checkpoint-1.pth.tar', 'checkpoint-3.pth.tar', 'last.pth.tar', 'model_best.pth.tar', 'recovery-2-1.pth.tar',
        'recovery-3-1.pth.tar']
    assert (saver.best_metric, saver.best_epoch) == (30.0, 1)
    assert read_checkpoint(tmp_path / 'model_best.pth.tar')['metric'] == 30.0
    assert saver.last_good().endswith('recovery-3-1.pth.tar')


def test_the_smaller_loss_is_the_better_one_and_the_history_goes_on_after_a_resume(tmp_path):
    args = options()
    trainer, saver = trainer_of(args), saver_in(tmp_path, args, decreasing=True)
    saver.save_epoch(trainer, 0, 1.0)
    saver.save_epoch(trainer, 1, 2.0)
    saver.wait()
    again = saver_in(tmp_path, args, decreasing=True)
    again.load_state_dict(read_checkpoint(tmp_path / 'last.pth.tar')['saver'], tmp_path / 'last.pth.tar')
    again.save_epoch(trainer, 2, 1.5)
    again.wait()
    assert again.best_epoch == 0
    names = sorted(path.name for path in tmp_path.glob('checkpoint-*'))
    assert names == ['checkpoint-0.pth.tar', 'checkpoint-2.pth.tar']


@pytest.mark.parametrize('lost', ['checkpoint-1', 'model_best'])
def test_a_kill_between_the_names_of_a_checkpoint_loses_none(tmp_path, lost):
    """last.pth.tar comes first; the rest is made up for when the run goes on."""
    args = options('--checkpoint-hist', '1')
    trainer, saver = trainer_of(args), saver_in(tmp_path, args)
    saver.save_epoch(trainer, 0, 10.0)
    saver.wait()
    left = {name: (tmp_path / f'{name}.pth.tar').read_bytes() for name in ('checkpoint-0', 'model_best')}
    saver.save_epoch(trainer, 1, 20.0)
    saver.wait()
    expected = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / f'{lost}.pth.tar').unlink()
    for name in ('checkpoint-0', lost):  # as they were before the kill
        if name in left:
            (tmp_path / f'{name}.pth.tar').write_bytes(left[name])
    saver_in(tmp_path, args).load_state_dict(
        read_checkpoint(tmp_path / 'last.pth.tar')['saver'], tmp_path / 'last.pth.tar')
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == expected


def test_a_file_that_cannot_be_put_in_its_place_ends_the_run_at_the_next_one(tmp_path, caplog):
    """The training has gone on meanwhile."""
    args = options()
    (tmp_path / 'checkpoint-0.pth.tar').mkdir()
    trainer, saver = trainer_of(args), saver_in(tmp_path, args)
    saver.save_epoch(trainer, 0, 10.0)
    with pytest.raises(CannotWrite, match=r'cannot write .*checkpoint-0\.pth\.tar: .*directory'):
        saver.save_recovery(trainer)
    saver.save_epoch(trainer, 0, 10.0)
    saver.close()
    assert 'cannot write' in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ['checkpoint-0.pth.tar', 'last.pth.tar']


def test_a_folder_in_the_place_of_a_checkpoint_is_refused_before_it_is_written(tmp_path):
    args = options()
    (tmp_path / 'last.pth.tar').mkdir()
    with pytest.raises(CannotWrite, match=r'cannot write .*last\.pth\.tar: it is a folder'):
        saver_in(tmp_path, args).save_epoch(trainer_of(args), 0, 10.0)
    assert [path.name for path in tmp_path.iterdir()] == ['last.pth.tar']


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    args = options()
    trainer, saver = trainer_of(args), saver_in(tmp_path, args)
    saver.save_recovery(trainer)
    next(trainer.task.trainable_module.parameters()).data.view(-1)[0] = float('inf')
    for save in (lambda: saver.save_recovery(trainer), lambda: saver.save_epoch(trainer, 0, 1.0)):
        trainer.position.batch += 1
        trainer.last_good = saver.last_good
        with pytest.raises(Diverged, match=r'weights are no longer finite.*rate 0\.01.*recovery-0-0\.pth\.tar'):
            save()
    assert [path.name for path in tmp_path.iterdir()] == ['recovery-0-0.pth.tar']


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path):
    """A limit on the size of files fails as a full disk does: in the middle of writing."""
    path = tmp_path / 'last.pth.tar'
    write_checkpoint({'state_dict': {'value': torch.zeros(3)}}, path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(UserError, match=r'cannot write .*last') as caught:
            write_checkpoint({'state_dict': {'value': torch.zeros(1_000_000)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert '\n' not in str(caught.value)
    assert torch.equal(read_checkpoint(path)['state_dict']['value'], torch.zeros(3))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('damage', ['cut', 'flip', 'empty', 'text'])
def test_a_damaged_file_is_named_and_the_one_before_is_taken(tmp_path, caplog, damage):
    for number, name in enumerate(('checkpoint-0', 'last')):
        write_checkpoint({'state_dict': {'value': torch.arange(10_000) + number}}, tmp_path / f'{name}.pth.tar')
        os.utime(tmp_path / f'{name}.pth.tar', (number, number))
    path = tmp_path / 'last.pth.tar'
    content = bytearray(path.read_bytes())
    content[40_000] ^= 1
    path.write_bytes({'cut': bytes(content[:50_000]), 'flip': bytes(content), 'empty': b'', 'text': b'hello\n'}[damage])
    os.utime(path, (1, 1))
    with pytest.raises(UserError, match=r'last\.pth\.tar'):
        read_checkpoint(path)
    assert find_newest(tmp_path) == tmp_path / 'checkpoint-0.pth.tar'
    assert 'last.pth.tar' in caplog.text


def save_at(folder: Path, trainer: Trainer, *places: tuple[int, int], resumed_from: Path | None = None) -> str:
    """Save recovery checkpoints at (epoch, batch); the name that the log would tell of the last one."""
    saver = saver_in(folder, options())
    if resumed_from is not None:
        saver.load_state_dict(read_checkpoint(resumed_from)['saver'], resumed_from)
    for epoch, batch in places:
        trainer.position = Position(epoch, batch, 4 * epoch + batch)
        saver.save_recovery(trainer)
    return saver.last_good()


@pytest.mark.parametrize('clock', ['backwards', 'stopped'])
def test_the_newest_checkpoint_is_the_one_furthest_on_whatever_the_clock_says(tmp_path, clock):
    trainer = trainer_of(options())
    save_at(tmp_path, trainer, (2, 3), (11, 1))
    for number, name in enumerate(('recovery-2-3', 'recovery-11-1')):
        os.utime(tmp_path / f'{name}.pth.tar', (0, 1000 - number if clock == 'backwards' else 0))
    assert find_newest(tmp_path) == tmp_path / 'recovery-11-1.pth.tar'


def test_a_recovery_checkpoint_that_was_just_written_stays(tmp_path):
    """Even where the clock was set back, and where the run went back to an earlier checkpoint."""
    trainer = trainer_of(options())
    save_at(tmp_path, trainer, (1, 1), (4, 2), (5, 3))
    for path in tmp_path.iterdir():
        os.utime(path, (2**32, 2**32))
    told = save_at(tmp_path, trainer, (4, 3), resumed_from=tmp_path / 'recovery-4-2.pth.tar')
    assert Path(told).exists() and Path(told).name == 'recovery-4-3.pth.tar'
    assert find_newest(tmp_path) == Path(told)
    again = save_at(tmp_path, trainer, (5, 0), resumed_from=Path(told))
    assert find_newest(tmp_path) == Path(again)
    assert {path.name for path in tmp_path.iterdir()} == {'recovery-4-3.pth.tar', 'recovery-5-0.pth.tar'}


def test_damaged_recovery_files_do_not_push_out_new_ones(tmp_path):
    for name in 'recovery-7-1', 'recovery-7-2', 'recovery-7-3':
        (tmp_path / f'{name}.pth.tar').write_bytes(b'torn')
    told = save_at(tmp_path, trainer_of(options()), (1, 1), (1, 2), (1, 3))
    assert Path(told).exists() and len(list(tmp_path.iterdir())) == 5
    assert find_newest(tmp_path) == Path(told)


@pytest.mark.parametrize('entry', [
    {'training': []}, {'training': {'position': {}}}, {'saver': {'resumptions': 'x'}}, {'saver': None},
    {'epoch': '7'}, {'training': {'position': {'epoch': 'x', 'batch': 'y'}}}])
def test_a_file_with_odd_entries_is_named_and_the_one_before_is_taken(tmp_path, caplog, entry):
    save_at(tmp_path, trainer_of(options()), (1, 1))
    write_checkpoint({'state_dict': {'value': torch.zeros(3)}, **entry}, tmp_path / 'last.pth.tar')
    assert find_newest(tmp_path) == tmp_path / 'recovery-1-1.pth.tar'
    assert 'last.pth.tar is refused' in caplog.text
    saver_in(tmp_path, options()).load_state_dict({}, tmp_path / 'recovery-1-1.pth.tar')


@pytest.mark.timeout(600)
@pytest.mark.parametrize('place', ['link to nothing', 'link to itself', 'pipe', 'folder'])
def test_what_is_no_file_is_named_and_the_one_before_is_taken(tmp_path, place):
    save_at(tmp_path, trainer_of(options()), (1, 1))
    path = tmp_path / 'checkpoint-8.pth.tar'
    {'link to nothing': lambda: path.symlink_to('nowhere'), 'link to itself': lambda: path.symlink_to(path.name),
     'pipe': lambda: os.mkfifo(path), 'folder': path.mkdir}[place]()
    assert find_newest(tmp_path) == tmp_path / 'recovery-1-1.pth.tar'


def test_a_name_that_cannot_be_removed_is_told_and_the_run_goes_on(tmp_path, caplog):
    args = options('--checkpoint-hist', '1')
    trainer, saver = trainer_of(args), saver_in(tmp_path, args)
    (tmp_path / 'checkpoint-0.pth.tar').mkdir()
    saver.load_state_dict({'dropped': ['checkpoint-0.pth.tar'], 'epoch': 1}, tmp_path / 'last.pth.tar')
    assert 'checkpoint-0.pth.tar is no longer needed, but cannot be removed' in caplog.text
    saver.save_epoch(trainer, 1, 20.0)
    saver.wait()


def test_an_empty_folder_has_no_newest_checkpoint(tmp_path):
    assert find_newest(tmp_path) is None


class Payload:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize('form', ['torch', 'pickle'])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, form):
    path, proof = tmp_path / 'last.pth.tar', tmp_path / 'it ran'
    if form == 'torch':
        torch.save({'state_dict': Payload(proof)}, path)
    else:
        path.write_bytes(pickle.dumps({'state_dict': Payload(proof)}))
    with pytest.raises(UserError, match='cannot be read as a checkpoint') as caught:
        read_checkpoint(path)
    assert '\n' not in str(caught.value)
    assert peek_checkpoint(path) is None and find_newest(tmp_path) is None
    assert not proof.exists()


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r'/nowhere\.pth\.tar: no such file'):
        read_checkpoint(Path('/nowhere.pth.tar'))


@pytest.mark.parametrize(('change', 'said'), [
    (lambda content: content.pop('args'), 'args is missing'),
    (lambda content: content.update(arch='\x1b[2J\n'), r'--model \\x1b\[2J\\n, not'),
])
def test_a_checkpoint_without_options_or_of_an_odd_model_is_one_line(tmp_path, change, said):
    args = options()
    content = training_state(trainer_of(args), info_of(args))
    change(content)
    write_checkpoint(content, tmp_path / 'a.pth.tar')
    with pytest.raises(UserError, match=said) as caught:
        resume(trainer_of(args), tmp_path / 'a.pth.tar', info_of(args))
    assert '\n' not in str(caught.value)

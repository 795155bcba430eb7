"""What may change between a checkpoint and the run that goes on from it."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.training.test_checkpoint import train_epochs, trainer_by_options
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.serialization import write_checkpoint
from timm_npu_irv2.training import setup
from timm_npu_irv2.training.checkpoint import resume, training_state
from timm_npu_irv2.training.engine import Position, Trainer
from timm_npu_irv2.training.options import parse_args
from timm_npu_irv2.training.resumption import APPLIED, DIVIDED, FREE, REFUSED, check_data, describe_data

PAGE = Path(__file__).parents[2] / 'docs' / 'interrupted.md'


def test_every_option_has_one_place_in_the_table():
    assert sorted([*FREE, *APPLIED, *DIVIDED, *REFUSED]) == sorted(vars(parse_args([])))


def test_the_documentation_shows_the_table():
    rows = re.findall(r'^\| (free|applied|divided|refused) \|.*\| (.*) \|$', PAGE.read_text(), re.MULTILINE)
    shown = {kind: set(re.findall(r'`--([\w-]+)`', options)) for kind, options in rows}
    for kind, names in ('free', FREE), ('applied', APPLIED), ('divided', DIVIDED), ('refused', REFUSED):
        assert shown[kind] == {name.replace('_', '-') for name in names}


def resumed_with(folder: Path, before: str, after: str, load_optimizer: bool = True) -> tuple[Trainer, Trainer]:
    """A trainer after two epochs with one choice of options, and another that goes on from it with another choice."""
    trainer, info = trainer_by_options(*before.split(), seed=0)
    train_epochs(trainer, until=2)
    write_checkpoint(training_state(trainer, info), folder / 'a.pth.tar')
    resumed, info = trainer_by_options(*after.split(), seed=0)
    resume(resumed, folder / 'a.pth.tar', info, load_optimizer=load_optimizer)
    setup.fast_forward(resumed.scheduler, resumed.position)
    return trainer, resumed


def test_changed_values_of_the_optimizer_take_effect_and_the_log_says_so(tmp_path, caplog):
    caplog.set_level('INFO')
    before, after = '--momentum 0.9 --weight-decay 0.1', '--momentum 0.5 --weight-decay 0.2 --smoothing 0.2 --epochs 9'
    trainer, resumed = resumed_with(tmp_path, before, after)
    decays = [group['weight_decay'] for group in resumed.optimizer.param_groups]
    assert [group['momentum'] for group in resumed.optimizer.param_groups] == [0.5] * len(decays)
    assert sorted(decays) == [0, 0.2]  # biases and norms have none
    assert torch.equal(*(next(iter(each.optimizer.state.values()))['momentum_buffer'] for each in (trainer, resumed)))
    assert ('Changed since the checkpoint: --epochs 9 (before: 8), --momentum 0.5 (before: 0.9), --smoothing 0.2 '
            '(before: 0.1), --weight-decay 0.2 (before: 0.1).') in caplog.messages


@pytest.mark.parametrize('schedule', ['cosine', 'plateau', 'wsd --decay-epochs 2'])
def test_a_changed_learning_rate_takes_effect_whatever_the_schedule(tmp_path, schedule):
    trainer, resumed = resumed_with(tmp_path, f'--sched {schedule} --lr 0.01', f'--sched {schedule} --lr 0.02')
    assert resumed.learning_rate == pytest.approx(2 * trainer.learning_rate, rel=0.01) != 0


def test_a_changed_learning_rate_is_not_undone_when_the_noise_ends(tmp_path):
    """Plateau's scheduler keeps the rate from before the noise, and restores it at its next step."""
    usual = '--sched plateau --lr-noise 0.05 0.9 --warmup-epochs 0 --lr'
    trainer, resumed = resumed_with(tmp_path, f'{usual} 0.01', f'{usual} 0.02')
    assert trainer.scheduler.restore_lr == pytest.approx([0.01, 0.01]) and trainer.learning_rate != 0.01
    for each in trainer, resumed:
        train_epochs(each, until=3)
    assert resumed.scheduler.restore_lr == pytest.approx([0.02, 0.02])
    assert resumed.learning_rate == pytest.approx(2 * trainer.learning_rate)


@pytest.mark.parametrize('rates', ['x', [0.1], [0.1, 'x'], {'a': 1}, 3])
def test_odd_rates_of_the_scheduler_are_refused(tmp_path, rates):
    words = '--sched plateau --lr-noise 0.05 0.9 --warmup-epochs 0'.split()
    trainer, info = trainer_by_options(*words, seed=0)
    train_epochs(trainer, until=2)
    content = training_state(trainer, info)
    content['training']['processes'][0]['hidden']['scheduler']['restore_lr'] = rates
    write_checkpoint(content, tmp_path / 'a.pth.tar')
    resumed, info = trainer_by_options(*words, seed=0)
    with pytest.raises(UserError, match=r'a\.pth\.tar is refused: restore_lr'):
        resume(resumed, tmp_path / 'a.pth.tar', info)


def test_the_same_options_change_nothing(tmp_path, caplog):
    caplog.set_level('INFO')
    trainer, resumed = resumed_with(tmp_path, '--lr 0.01', '--lr 0.01 --workers 3 --log-interval 7')
    assert trainer.optimizer.param_groups[0]['lr'] == resumed.optimizer.param_groups[0]['lr']
    assert 'Changed since' not in caplog.text


@pytest.mark.parametrize(('after', 'said'), [
    ('--seed 7', '--seed 42, not 7'), ('--opt adamw', '--opt sgd, not adamw'),
    ('--batch-size 9', r'1 process\(es\) × 128 × 1 accumulated = 128 images in an update, and this one has .* = 9:'),
    ('--grad-accum-steps 3', 'let --elastic choose them'),
    ('--weight-decay 0', 'other parameter groups: resume with its --weight-decay'),
])
def test_options_that_may_not_change_are_refused_unless_only_the_weights_are_resumed(tmp_path, after, said):
    with pytest.raises(UserError, match=said) as caught:
        resumed_with(tmp_path, '', after)
    assert '--no-resume-opt' in str(caught.value) and '\n' not in str(caught.value)
    resumed_with(tmp_path, '', after, load_optimizer=False)


def change_state(path: Path, change: Callable[[dict], None]) -> None:
    content = torch.load(path, weights_only=True)
    change(content['optimizer']['state'])
    write_checkpoint(content, path)


def remove_moments(state: dict) -> None:
    for entries in state.values():
        del entries['exp_avg_sq']


def shrink_moments(state: dict) -> None:
    for entries in state.values():
        entries['exp_avg_sq'] = torch.ones(1)


@pytest.mark.parametrize('change', [remove_moments, shrink_moments])
def test_a_state_that_fails_in_the_first_step_is_one_line(tmp_path, change):
    trainer, info = trainer_by_options('--opt', 'adamw', seed=0)
    train_epochs(trainer, until=1)
    write_checkpoint(training_state(trainer, info), tmp_path / 'a.pth.tar')
    change_state(tmp_path / 'a.pth.tar', change)
    resumed, info = trainer_by_options('--opt', 'adamw', seed=0)
    resume(resumed, tmp_path / 'a.pth.tar', info)
    with pytest.raises(UserError, match=r'a\.pth\.tar: the first step with the state of its optimizer') as caught:
        resumed.train_one_epoch()
    assert '\n' not in str(caught.value) and '--no-resume-opt' in str(caught.value)


@pytest.mark.parametrize('error', [RuntimeError('no C++ compiler'), KeyError('backward')])
def test_an_error_of_the_backward_pass_is_not_blamed_on_the_state_of_the_optimizer(tmp_path, error):
    trainer, info = trainer_by_options('--opt', 'adamw', seed=0)
    train_epochs(trainer, until=1)
    write_checkpoint(training_state(trainer, info), tmp_path / 'a.pth.tar')
    resumed, info = trainer_by_options('--opt', 'adamw', seed=0)
    resume(resumed, tmp_path / 'a.pth.tar', info)

    def fail(gradient: torch.Tensor) -> None:
        raise error

    next(resumed.module.parameters()).register_hook(fail)
    with pytest.raises(type(error), match=str(error.args[0]).replace('+', r'\+')) as caught:
        resumed.train_one_epoch()
    assert not isinstance(caught.value, UserError)


def test_parameters_without_a_state_are_counted_in_the_log(tmp_path, caplog):
    trainer, info = trainer_by_options('--opt', 'adamw', seed=0)
    train_epochs(trainer, until=1)
    write_checkpoint(training_state(trainer, info), tmp_path / 'a.pth.tar')
    change_state(tmp_path / 'a.pth.tar', lambda state: state.pop(3))
    resumed, info = trainer_by_options('--opt', 'adamw', seed=0)
    resume(resumed, tmp_path / 'a.pth.tar', info)
    count = len(list(resumed.module.parameters()))
    assert f'has optimizer state for {count - 1} of {count} parameters' in caplog.text


class Samples(list):
    """A data set as check_data sees it."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        self.reader = self
        self.samples = names

    def filenames(self) -> list[str]:
        return self.samples


def fingerprint(names: str) -> dict:
    files = names.split()
    classes = sorted({name.split('/')[0] for name in files})
    return {'training': describe_data(Samples(files), {name: index for index, name in enumerate(classes)})}


@pytest.mark.parametrize(('now', 'said'), [
    ('a/1 b/1 b/2 c/1', None), ('a/1 b/1 c/1', '3 samples, not 4'), ('a/1 a/2 b/1 b/2 c/1', '5 samples, not 4'),
    ('a/1 b/1 b/2 d/1', 'class c is missing, class d is new'), ('a/1 b/1 b/3 c/1', 'files were renamed or replaced'),
    ('a/1 b/1 b/2', 'class c is missing; 3 samples, not 4'),
])
def test_what_has_changed_in_the_data_is_named(now, said):
    then = fingerprint('a/1 b/1 b/2 c/1')
    if said is None:
        check_data('last.pth.tar', then, fingerprint(now))
        return
    with pytest.raises(UserError) as caught:
        check_data('last.pth.tar', then, fingerprint(now))
    assert str(caught.value) == (f'the training data is not that of last.pth.tar: {said}. Restore it, or use '
                                 '--allow-changed-data to continue with it as it is.')


def test_what_a_fingerprint_does_not_know_is_not_compared():
    then, now = fingerprint('a/1 b/1'), fingerprint('a/1 b/2')
    for unknown in 'names', 'classes', 'count':
        then['training'][unknown] = None
        if unknown == 'names':
            check_data('last.pth.tar', then, now)
            check_data('last.pth.tar', now, then)
    check_data('last.pth.tar', then, fingerprint('c/1 c/2 c/3'))


def test_classes_that_change_places_are_changed_data():
    files = Samples(['a/1', 'b/1'])
    then, now = ({'training': describe_data(files, classes)} for classes in ({'a': 0, 'b': 1}, {'a': 1, 'b': 0}))
    with pytest.raises(UserError, match='the classes have other indices'):
        check_data('last.pth.tar', then, now)


def test_names_of_any_bytes_have_a_fingerprint_and_their_borders_count():
    odd = [describe_data(Samples(names), None)['names'] for names in (
        ['caf\udce9/1', '2'], ['caf\udce9/', '12'], ['café/1', '2'])]
    assert len(set(odd)) == 3


@pytest.mark.parametrize(('now', 'position'), [('a/1 b/1', Position(0, 2, 2)), ('a/1 b/2', Position(0, 0, 0))])
def test_an_epoch_begins_again_with_changed_data_that_are_allowed(tmp_path, now, position):
    trainer, info = trainer_by_options(seed=0)
    info = dataclasses.replace(info, data=fingerprint('a/1 b/1'))
    trainer.on_recovery = lambda trainer: write_checkpoint(training_state(trainer, info), tmp_path / 'a.pth.tar')
    train_epochs(trainer, until=1)
    resumed, info = trainer_by_options(seed=5)
    info = dataclasses.replace(info, data=fingerprint(now))
    resume(resumed, tmp_path / 'a.pth.tar', info, allow_changed_data=True)
    assert resumed.position == position

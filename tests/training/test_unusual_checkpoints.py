"""Checkpoints of other devices, numbers of processes and versions continue; what a file may not say is refused."""

import copy
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.test_checkpoint import (
    assert_same,
    info_of,
    options,
    save_at,
    saver_in,
    train_epochs,
    trainer_by_options,
    trainer_of,
)
from tests.training.test_resumption import fingerprint
from timm_npu_irv2.distributed import World
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.precision import create_precision
from timm_npu_irv2.serialization import read_checkpoint, write_checkpoint
from timm_npu_irv2.training.checkpoint import resume, training_state
from timm_npu_irv2.training.engine import Position, Trainer
from timm_npu_irv2.training.saver import find_newest

ARGS = options()


def saved(path: Path, change: Callable[[dict], object] = lambda content: None, *words: str) -> Trainer:
    """Write the changed checkpoint of a trainer after two of four batches, and return the trainer."""
    trainer = trainer_of(options(*words), recovery_interval=2, epoch_samples=8)
    states = []
    trainer.on_recovery = lambda trainer: states.append(copy.deepcopy(training_state(trainer, info_of(ARGS))))
    trainer.train_one_epoch()
    change(states[0])
    write_checkpoint(states[0], path)
    return trainer


def resumed(path: Path, *words: str, world: World | None = None, **settings) -> Trainer:
    trainer = trainer_of(options(*words), seed=5, epoch_samples=8, **settings)
    if world is not None:
        trainer.world = world
    resume(trainer, path, info_of(ARGS))
    return trainer


def draw() -> tuple[float, ...]:
    """A number of each random generator of the process."""
    return torch.rand(()).item(), np.random.random(), np.random.standard_normal(), random.random(), random.gauss(0, 1)


def test_all_random_generators_of_a_process_go_on(tmp_path):
    draw()  # a second number of the normal distribution waits in NumPy and in Python
    trainer = trainer_of(ARGS)
    write_checkpoint(training_state(trainer, info_of(ARGS)), tmp_path / 'a.pth.tar')
    expected = draw()
    resume(trainer, tmp_path / 'a.pth.tar', info_of(ARGS))
    assert draw() == expected


def test_another_number_of_classes_is_named(tmp_path):
    saved(tmp_path / 'a.pth.tar')
    info = dataclasses.replace(info_of(ARGS), num_classes=5)
    with pytest.raises(UserError, match=r'a\.pth\.tar is a checkpoint with 3 classes, not 5: use --num-classes 3'):
        resume(trainer_of(ARGS), tmp_path / 'a.pth.tar', info)


def test_figures_of_the_whole_run_go_on(tmp_path):
    def change(content: dict) -> None:
        content['training'].update(throughput=(640, 5.0), skipped=(7, 3))

    saved(tmp_path / 'a.pth.tar', change)
    trainer = resumed(tmp_path / 'a.pth.tar')
    assert trainer.throughput.images_per_second == 128
    assert (trainer.precision.skipped_steps, trainer.precision.skipped_in_a_row) == (7, 3)


def test_fewer_processes_take_over_the_sums_of_all(tmp_path):
    def of_two_processes(content: dict) -> None:
        first = content['training']['processes'][0]
        content['training']['processes'].append({**first, 'meter': {'loss': 3.0, 'hits': 2, 'count': 5}})
        first['meter'] = {'loss': 1.5, 'hits': 1, 'count': 3}
        content['training']['layout'].update(processes=2, batch_size=1)
        content['training']['position']['samples'] = 4

    saved(tmp_path / 'a.pth.tar', of_two_processes)
    trainer = resumed(tmp_path / 'a.pth.tar', batch_size=2)
    assert trainer.position == Position(0, 2, 2)
    assert trainer.meter.state_dict() == {'loss': 4.5, 'hits': 3, 'count': 8}


def test_where_an_epoch_has_no_global_order_other_processes_begin_it_again(tmp_path):
    def of_two_processes(content: dict) -> None:
        content['training']['processes'] *= 2
        content['training']['layout'].update(processes=2, batch_size=1, epoch_samples=None)

    saved(tmp_path / 'a.pth.tar', of_two_processes)
    trainer = resumed(tmp_path / 'a.pth.tar', batch_size=2)
    assert trainer.position == Position(0, 0, 0)
    assert trainer.meter.state_dict() == {'loss': 0, 'hits': 0, 'count': 0}


def test_more_processes_draw_numbers_of_their_own_and_count_nothing_twice(tmp_path):
    def of_one_image_each(content: dict) -> None:
        content['training']['layout'].update(batch_size=2)
        content['training']['position']['samples'] = 4

    saved(tmp_path / 'a.pth.tar', of_one_image_each)
    drawn, counts = [], []
    for rank in range(2):
        trainer = resumed(tmp_path / 'a.pth.tar', world=World(rank, rank, 2))
        drawn.append(torch.rand(()).item())
        counts.append(trainer.meter.state_dict()['count'])
    assert len({*drawn}) == 2 and counts == [4, 0]


def test_a_run_goes_on_on_another_kind_of_device(tmp_path):
    """Whose random generator has a state of its own."""
    def of_a_card(content: dict) -> None:
        content['training']['processes'][0]['random']['device'] = torch.zeros(16, dtype=torch.uint8)

    expected = saved(tmp_path / 'a.pth.tar', of_a_card).module.state_dict()
    trainer = resumed(tmp_path / 'a.pth.tar')
    trainer.train_one_epoch()
    assert_same(dict(trainer.module.state_dict()), dict(expected))


def test_the_scale_of_the_loss_goes_on(tmp_path):
    scales = []
    for name in 'before', 'after':
        trainer = trainer_of(ARGS)
        trainer.precision = create_precision(
            torch.device('cpu'), amp=True, amp_dtype=torch.float16, loss_scale='dynamic')
        if name == 'before':
            content = training_state(trainer, info_of(ARGS))
            content['amp_scaler']['scale'] = 1024.0
            write_checkpoint(content, tmp_path / 'a.pth.tar')
        else:
            resume(trainer, tmp_path / 'a.pth.tar', info_of(ARGS))
        scales.append(trainer.precision.state_dict()['scale'])
    assert scales == [65536.0, 1024.0]


def test_an_average_begins_with_the_weights_where_the_checkpoint_has_none(tmp_path):
    saved(tmp_path / 'a.pth.tar')
    trainer = resumed(tmp_path / 'a.pth.tar', '--model-ema')
    assert_same(dict(trainer.ema.module.state_dict()), dict(trainer.module.state_dict()))


@pytest.mark.parametrize(('entries', 'epoch'), [({'epoch': 5}, 5), ({'epoch': 5, 'version': 1}, 5),
                                                ({'epoch': 5, 'version': 2}, 6)])
def test_older_checkpoints_of_timm_count_an_epoch_before_it_is_saved(tmp_path, entries, epoch):
    write_checkpoint({'state_dict': trainer_of(ARGS).module.state_dict(), **entries}, tmp_path / 'a.pth.tar')
    trainer = trainer_of(ARGS)
    resume(trainer, tmp_path / 'a.pth.tar', info_of(ARGS))
    assert trainer.position == Position(epoch, 0, 4 * epoch)


def test_a_chosen_epoch_has_the_updates_of_those_before_it(tmp_path):
    saved(tmp_path / 'a.pth.tar')
    trainer = trainer_of(ARGS)
    resume(trainer, tmp_path / 'a.pth.tar', info_of(ARGS), start_epoch=3)
    assert trainer.position == Position(3, 0, 12)


def test_older_checkpoints_know_the_data_by_its_classes(tmp_path):
    def of_an_earlier_version(content: dict) -> None:
        del content['training']['data']
        content['training'].update(format=1, class_to_idx={'a': 0, 'c': 1})

    saved(tmp_path / 'a.pth.tar', of_an_earlier_version)
    info = dataclasses.replace(info_of(ARGS), data=fingerprint('a/1 b/1'))
    with pytest.raises(UserError, match='class c is missing, class b is new'):
        resume(trainer_of(ARGS), tmp_path / 'a.pth.tar', info)


def rate_of(trainer: Trainer) -> float:
    return trainer.optimizer.param_groups[0]['lr']


def test_a_learning_rate_may_change_again_and_again_and_from_zero(tmp_path):
    path, words = tmp_path / 'a.pth.tar', '--sched plateau --warmup-epochs 0 --lr'.split()
    trainer, info = trainer_by_options(*words, '0.01', seed=0)
    for rate in '0.02', '0.04', '0', '0.03':
        train_epochs(trainer, trainer.position.epoch + 1)
        write_checkpoint(training_state(trainer, info), path)
        trainer, info = trainer_by_options(*words, rate, seed=0)
        resume(trainer, path, info)
        assert rate_of(trainer) == pytest.approx(float(rate))


@pytest.mark.parametrize(('entry', 'value'), [
    ('numpy', 625), ('numpy', -1), ('keys', torch.zeros(623, dtype=torch.int64)), ('keys', torch.zeros(624)),
    ('gauss', 'x'), ('python', (1,) * 624), ('python', (2**40,) * 625), ('torch', torch.zeros(7, dtype=torch.uint8)),
    ('torch', torch.zeros(5056)),
])
def test_random_states_that_cannot_be_are_refused(tmp_path, entry, value):
    """With a position beyond its end, NumPy would read memory that is not its own."""
    def change(content: dict) -> None:
        states = content['training']['processes'][0]['random']
        kind, keys, position, has_gauss, gauss = states['numpy']
        numpy = {'keys': keys, 'numpy': position, 'gauss': gauss}
        if entry in numpy:
            numpy[entry] = value
            states['numpy'] = (kind, numpy['keys'], numpy['numpy'], has_gauss, numpy['gauss'])
        else:
            states[entry] = (3, value, None) if entry == 'python' else value

    saved(tmp_path / 'last.pth.tar', change)
    is_bytes = getattr(value, 'dtype', None) == torch.uint8  # whose number depends on the version of PyTorch
    assert (find_newest(tmp_path) is None) == (not is_bytes)
    with pytest.raises(UserError, match=r'last\.pth\.tar is refused: training\.processes\[0\]\.random') as caught:
        resumed(tmp_path / 'last.pth.tar')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(('change', 'said'), [
    (lambda training, content: training['processes'][0]['hidden'].update(task={'forward': 1}), 'forward'),
    (lambda training, content: training['processes'][0]['hidden'].update(optimizer={'step': 'x'}), 'step'),
    (lambda training, content: training['position'].update(other=1), 'the unknown entry'),
    (lambda training, content: content.update(amp_scaler={'scale': -1.0}), r'amp_scaler\.'),
    (lambda training, content: content.update(saver={'dropped': ['notes.txt']}), r'saver\.dropped'),
    (lambda training, content: content.update(saver={'checkpoint_files': [('.lock', 1.0)]}), 'saver.checkpoint_files'),
    (lambda training, content: content['args'].update(x=torch.zeros(3)), r'args\[.x.\]'),
    (lambda training, content: training.update(skipped=(True, 0)), 'skipped'),
    (lambda training, content: content['optimizer']['state'][0].update(momentum_buffer=torch.ones(7)),
     r'optimizer\.state\[0\]\.momentum_buffer is a tensor'),
])
def test_entries_that_would_act_are_refused(tmp_path, change, said):
    saved(tmp_path / 'a.pth.tar', lambda content: change(content['training'], content))
    with pytest.raises(UserError, match=rf'a\.pth\.tar is refused: .*{said}') as caught:
        resumed(tmp_path / 'a.pth.tar')
    assert '\n' not in str(caught.value)


def test_the_optimizer_of_another_program_keeps_its_settings(tmp_path):
    """As in timm, whose checkpoints do not tell which options have changed."""
    trainer = trainer_of(ARGS)
    trainer.train_one_epoch()
    state = trainer.optimizer.state_dict()
    state['param_groups'][0].update(momentum=0.7, weight_decay=0.01)
    write_checkpoint({'state_dict': trainer.module.state_dict(), 'optimizer': state}, tmp_path / 'a.pth.tar')
    resume(trainer, tmp_path / 'a.pth.tar', info_of(ARGS))
    group = trainer.optimizer.param_groups[0]
    assert (group['momentum'], group['weight_decay']) == (0.7, 0.01)


# The saver


def test_an_epoch_without_a_metric_is_never_the_best(tmp_path):
    trainer, saver = trainer_of(ARGS), saver_in(tmp_path, ARGS)
    for epoch, metric in enumerate([float('nan'), 10.0]):
        saver.save_epoch(trainer, epoch, metric)
    saver.wait()
    assert (saver.best_metric, saver.best_epoch) == (10.0, 1)


def test_what_is_resumed_last_is_the_newest_though_others_went_further(tmp_path):
    trainer = trainer_of(ARGS)
    save_at(tmp_path, trainer, (4, 2), (5, 3))
    save_at(tmp_path, trainer, (4, 3), resumed_from=tmp_path / 'recovery-4-2.pth.tar')
    last = save_at(tmp_path, trainer, (2, 0), resumed_from=tmp_path / 'recovery-5-3.pth.tar')
    assert find_newest(tmp_path) == Path(last) == tmp_path / 'recovery-2-0.pth.tar'


def test_weights_so_large_that_their_sum_overflows_are_saved(tmp_path):
    trainer, saver = trainer_of(ARGS), saver_in(tmp_path, ARGS)
    next(trainer.module.parameters()).data.fill_(3e38)
    saver.save_recovery(trainer)
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ['recovery-0-0.pth.tar']


def test_the_folder_of_another_run_is_left_as_it_is(tmp_path):
    own, other = tmp_path / 'own', tmp_path / 'other'
    for folder in own, other:
        folder.mkdir()
    saver = saver_in(other, ARGS)
    saver.save_epoch(trainer_of(ARGS), 0, 1.0)
    saver.wait()
    (other / 'model_best.pth.tar').unlink()
    before = sorted(path.name for path in other.iterdir())
    state = read_checkpoint(other / 'last.pth.tar')['saver']
    state['dropped'] = ['../other/checkpoint-0.pth.tar', str(other / 'checkpoint-0.pth.tar')]
    state['checkpoint_files'] = [('../other/checkpoint-0.pth.tar', 1.0)]
    saver_in(own, ARGS).load_state_dict(state, other / 'last.pth.tar')
    assert list(own.iterdir()) == []
    (own / 'last.pth.tar').write_bytes((other / 'last.pth.tar').read_bytes())
    again = saver_in(own, ARGS)
    again.load_state_dict(state, own / 'last.pth.tar')
    assert again.state_dict()['checkpoint_files'] == []  # there are none here
    assert sorted(path.name for path in other.iterdir()) == before


def test_a_damaged_file_with_several_names_is_told_once(tmp_path, caplog):
    (tmp_path / 'last.pth.tar').write_bytes(b'torn')
    for name in 'checkpoint-1.pth.tar', 'checkpoint-2.pth.tar':
        (tmp_path / name).hardlink_to(tmp_path / 'last.pth.tar')
    assert find_newest(tmp_path) is None
    assert caplog.text.count('Falling back') == 1

"""The division of an update among processes: other divisions of the same images see the same samples."""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.test_checkpoint import train_epochs, trainer_by_options
from timm_npu_irv2.data.loader import create_train_sampler
from timm_npu_irv2.distributed import World
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.serialization import read_checkpoint, write_checkpoint
from timm_npu_irv2.training.checkpoint import resume, training_state
from timm_npu_irv2.training.engine import Position
from timm_npu_irv2.training.layout import Layout, check_layout, plan_layout, stored_layout
from timm_npu_irv2.training.options import parse_args


def updates_of(
        size: int,
        layout: Layout,
        samples: int,
        aug_repeats: float = 0,
        lengths: tuple[int, ...] = (),
) -> list[list[tuple[int, int]]]:
    """Sorted (index, repeat) of the samples of each update from ``samples`` on, of all processes together."""
    ranks = []
    for rank in range(layout.processes):
        sampler = create_train_sampler(
            size, World(rank, rank, layout.processes), [layout.batch_size], aug_repeats=aug_repeats,
            lengths=lengths, lanes=layout.lanes or 1,
            num_batches=layout.batches_per_epoch if layout.epoch_samples is not None else None)
        sampler.set_epoch(3, layout.batches_done(samples) if samples else 0)
        ranks.append([[(key.index, key.repeat) for key in batch.samples] for batch in sampler])
    batches = [[key for batch in each for key in batch] for each in zip(*ranks, strict=True)]
    starts = range(0, len(batches), layout.grad_accum_steps)
    return [sorted(itertools.chain(*batches[start:start + layout.grad_accum_steps])) for start in starts]


@st.composite
def divisions(draw) -> tuple[Layout, Layout]:
    """Two divisions of the same global batch."""
    images = draw(st.sampled_from([4, 6, 12, 24]))
    fitting = [Layout(a, b, images // a // b) for a in range(1, 7) for b in range(1, 13)
               if a * b <= images and images % (a * b) == 0]
    return draw(st.sampled_from(fitting)), draw(st.sampled_from(fitting))


@settings(max_examples=60, deadline=None)
@given(divisions(), st.integers(24, 130), st.integers(0, 9), st.sampled_from([0, 1.5, 3]))
def test_a_run_goes_on_with_the_same_samples_however_they_are_divided(pair, size, done, aug_repeats):
    first, other = pair
    natural = updates_of(size, first, 0, aug_repeats)
    batches = len(create_train_sampler(
        size, World(0, 0, first.processes), [first.batch_size], aug_repeats=aug_repeats))
    epoch_samples = batches * first.images_per_batch
    other = Layout(other.processes, other.batch_size, other.grad_accum_steps, epoch_samples)
    done = min(done, len(natural) - 1)
    rest = updates_of(size, other, done * first.global_batch_size, aug_repeats)
    assert len(rest) == len(natural) - done, 'the schedule has as many updates'
    assert rest[:-1] == natural[done:-1]
    # The last update of an epoch may be a part of one, which other processes fill up to a whole batch each.
    assert set(natural[-1]) <= set(rest[-1]) and (batches % first.grad_accum_steps or natural[-1] == rest[-1])


@settings(max_examples=40, deadline=None)
@given(divisions(), st.lists(st.integers(0, 30), min_size=1, max_size=9), st.integers(0, 9))
def test_so_does_a_run_over_shards(pair, lengths, done):
    first, other = pair
    lengths = (*lengths, 24)
    first = replace(first, lanes=first.processes)
    natural = updates_of(sum(lengths), first, 0, lengths=lengths)
    seen = [key for update in natural for key in update]
    assert len(seen) == len(set(seen)) > sum(lengths) - first.global_batch_size, 'each sample comes once'
    epoch_samples = len(seen)
    other = replace(other, epoch_samples=epoch_samples, lanes=first.lanes)
    done = min(done, len(natural) - 1)
    rest = updates_of(sum(lengths), other, done * first.global_batch_size, lengths=lengths)
    assert rest[:-1] == natural[done:-1] and set(natural[-1]) <= set(rest[-1])


def plan(folder: Path, before: Layout | None, processes: int, *words: str) -> Layout:
    args = parse_args(['--elastic', '--resume', 'auto', '--experiment', 'x', *words])
    path = None
    if before is not None:
        path = folder / 'a.pth.tar'
        content = training_state(*trainer_by_options(seed=0))
        content['training']['layout'] = before.state_dict()
        write_checkpoint(content, path)
    return plan_layout(args, World(size=processes) if processes == 1 else Alone(size=processes), path)


class Alone(World):
    """One of several processes, without the others."""

    distributed = False


@pytest.mark.parametrize(('processes', 'words', 'expected'), [
    (4, '-b 4', (4, 4, 1)), (2, '-b 4', (2, 4, 2)), (2, '-b 100', (2, 8, 1)), (1, '-b 5', (1, 4, 4)),
    (8, '-b 4', (8, 2, 1)), (2, '-b 2 --grad-accum-steps 4', (2, 2, 4)), (16, '-b 4', (16, 1, 1)),
])
def test_elastic_runs_keep_the_images_of_an_update(tmp_path, processes, words, expected):
    assert plan(tmp_path, Layout(4, 4, 1, 64, 6), processes, *words.split()) == Layout(*expected, 64, 6)


def test_elastic_batches_are_even_for_mixup(tmp_path):
    assert plan(tmp_path, Layout(4, 9, 1, 72), 2, '-b', '9', '--mixup', '0.2') == Layout(2, 6, 3, 72, 4)


def test_processes_that_cannot_share_an_update_are_refused_with_the_numbers_that_can(tmp_path):
    with pytest.raises(UserError, match='3 processes cannot share the 16 images of an update evenly: use 2 or 4'):
        plan(tmp_path, Layout(4, 4, 1, 64), 3)


def test_a_run_says_at_its_start_that_some_number_of_machines_could_not_share_an_update(tmp_path, monkeypatch):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    monkeypatch.setenv('NNODES', '2:4')
    with pytest.raises(UserError, match=r'NNODES=2:4: 6 processes cannot share the 16 images .* --batch-size 6 can'):
        plan(tmp_path, None, 4, '-b', '4')
    assert plan(tmp_path, None, 4, '-b', '6') == Layout(4, 6, 1, lanes=4)
    monkeypatch.setenv('NNODES', '1:64')  # a batch for each of these numbers would have 10^26 images
    with pytest.raises(UserError, match=r'6 processes cannot share .* Let NNODES name fewer numbers of machines\.$'):
        plan(tmp_path, None, 4, '-b', '4')
    monkeypatch.setenv('NNODES', '2')
    assert plan(tmp_path, None, 4, '-b', '4') == Layout(4, 4, 1, lanes=4)


def trained(folder: Path, *words: str) -> tuple[Path, argparse.Namespace]:
    """A checkpoint in the middle of the second epoch."""
    trainer, info = trainer_by_options(*words, seed=0)
    trainer.on_recovery = lambda trainer: write_checkpoint(training_state(trainer, info), folder / 'a.pth.tar')
    train_epochs(trainer, until=2)
    return folder / 'a.pth.tar', info


def test_another_division_in_one_process_goes_on_at_the_same_sample(tmp_path, caplog):
    path, _ = trained(tmp_path, '--batch-size', '4')
    assert read_checkpoint(path)['training']['position'] == {'epoch': 1, 'batch': 2, 'updates': 6, 'samples': 8}
    resumed, info = trainer_by_options('--batch-size', '2', '--grad-accum-steps', '2', seed=0)
    resume(resumed, path, info)
    assert resumed.position == Position(1, 4, 6)
    assert 'continues with the next image, but not with the same bits' in caplog.text


def test_checkpoints_of_earlier_versions_go_on_where_they_are(tmp_path):
    """They count batches, so another division begins the epoch again."""
    path, _ = trained(tmp_path, '--batch-size', '4')
    state = read_checkpoint(path)
    del state['training']['layout'], state['training']['position']['samples']
    write_checkpoint(state, path)
    resumed, info = trainer_by_options('--batch-size', '4', seed=0)
    resume(resumed, path, info)
    assert resumed.position == Position(1, 2, 6)
    other, info = trainer_by_options('--batch-size', '2', '--grad-accum-steps', '2', seed=0)
    resume(other, path, info)
    assert other.position == Position(1, 0, other.updates_per_epoch)


@pytest.mark.parametrize(('words', 'message'), [
    ('--elastic', '--elastic needs --resume auto'),
    ('--elastic --resume auto --experiment x --no-resume-opt', '--elastic does not go with --no-resume-opt'),
])
def test_elastic_needs_what_it_goes_on_from(words, message):
    with pytest.raises(UserError, match=message):
        parse_args(words.split())


def test_the_oldest_checkpoints_tell_the_layout_by_their_options():
    training = {'processes': [{}, {}]}
    assert stored_layout(training, {'batch_size': 8, 'grad_accum_steps': None}) == Layout(2, 8, 1)
    assert stored_layout(training, {'batch_size': 8, 'multiprocessing_distributed': True}) == Layout(2, 4, 1)


def test_batches_of_several_sizes_go_on_with_the_same_numbers_alone():
    check_layout('a', Layout(2, 4, 1), Layout(2, 4, 1, 64), several_sizes=True)
    check_layout('a', Layout(2, 4, 1), Layout(1, 8, 1))
    with pytest.raises(UserError, match='such a run goes on with the same numbers only'):
        check_layout('a', Layout(2, 4, 1), Layout(1, 8, 1), several_sizes=True)

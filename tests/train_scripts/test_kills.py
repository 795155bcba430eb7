"""Runs that are killed at random moments and resumed end in the bits of a run that nobody disturbed.

The ordinary suite kills two; `pytest -m long tests/train_scripts/test_kills.py` kills two for each of 26 runs, and 40
runs with options drawn at random.
"""

from pathlib import Path

import pytest

from tests.failing_server import fail_now_and_then, serve
from tests.kills import SHARDS, check, random_recipe, write_images, write_shards


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp('images'))


def test_a_killed_run_ends_in_the_same_bits(images, tmp_path):
    check(images, tmp_path, 'half weights')


def test_so_does_one_of_two_processes_of_which_one_is_killed(images, tmp_path):
    check(images, tmp_path, 'half weights', processes=2)


@pytest.fixture(scope='module')
def shards(images, tmp_path_factory) -> Path:
    return write_shards(images, tmp_path_factory.mktemp('shards') / 'x')


def test_so_does_a_run_over_shards_that_is_killed_three_times(shards, tmp_path):
    words = f'{SHARDS} --model test_resnet --model-ema --mixup 0.2 --reprob 0.3 --aa rand-m5-mstd1'
    check(shards, tmp_path, words, kills=3)


def test_so_does_one_over_shards_from_a_server_that_fails(shards, tmp_path, monkeypatch):
    check_through_failing_server(shards, tmp_path, monkeypatch, kills=1)


@pytest.mark.long
@pytest.mark.parametrize('processes', [1, 2])
def test_so_does_one_over_shards_from_a_server_that_fails_and_is_killed_ten_times(
        shards, tmp_path, monkeypatch, processes):
    check_through_failing_server(shards, tmp_path, monkeypatch, processes=processes, kills=10)


def check_through_failing_server(shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **options) -> None:
    monkeypatch.setenv('TIMM_NPU_IRV2_FETCH_TIMEOUT', '5')
    words = ('--dataset wds/x --train-split train --val-split val --model test_resnet --model-ema --mixup 0.2 '
             '--reprob 0.3 --aa rand-m5-mstd1')
    with serve(shards, fail_now_and_then) as server:
        check(server.url, folder, words, **options)
        assert all(server.faults[fault] for fault in ('503', 'break', 'stall'))


@pytest.mark.long
@pytest.mark.parametrize('processes', [1, 2])
def test_so_does_one_that_is_killed_ten_times(shards, tmp_path, processes):
    words = f'{SHARDS} --model test_resnet --model-ema --mixup 0.2 --reprob 0.3 --aa rand-m5-mstd1'
    assert check(shards, tmp_path, words, processes=processes, kills=10) >= 1


LONG = [('half weights', 1, 8), ('dynamic scale', 1, 6), ('plateau', 1, 4), ('this network', 1, 2),
        ('half weights', 2, 3), ('plateau', 2, 2), ('this network', 3, 1)]


@pytest.mark.long
@pytest.mark.parametrize(('recipe', 'processes', 'runs'), LONG)
def test_many_killed_runs_end_in_the_same_bits(images, tmp_path, recipe, processes, runs):
    assert check(images, tmp_path, recipe, processes=processes, runs=runs, kills=2) >= runs


@pytest.mark.long
@pytest.mark.parametrize('seed', range(40))
def test_so_does_a_killed_run_with_options_drawn_at_random(images, tmp_path, seed):
    words, processes = random_recipe(seed)
    print(words)
    check(images, tmp_path, words, processes=processes, seed=seed)

"""Runs on an NPU that are killed at random moments and resumed end in the bits of a run that nobody disturbed."""

from pathlib import Path

import pytest

from ..ascend.environment import only_here

only_here()

from ..kills import check, write_images  # noqa: E402


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp('images'))


@pytest.mark.long
@pytest.mark.parametrize('recipe', ['half weights', 'dynamic scale', 'this network'])
def test_a_killed_run_ends_in_the_same_bits(images, tmp_path, recipe):
    assert check(images, tmp_path, recipe, kills=2, device='npu') >= 1

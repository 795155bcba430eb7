"""Splits are what they are called: found by all their usual names, refused where they are not there."""

import tarfile
from pathlib import Path

import pytest
from PIL import Image

from timm_npu_irv2.data.dataset import open_dataset
from timm_npu_irv2.data.splits import find_split
from timm_npu_irv2.errors import UserError


def write_split(folder: Path, *classes: str) -> Path:
    for index, name in enumerate(classes or ('cat', 'dog')):
        (folder / name).mkdir(parents=True)
        Image.new('RGB', (8, 8), (index, 0, 0)).save(folder / name / 'a.png')
    return folder


@pytest.mark.parametrize(('there', 'split'), [
    ('train', 'train'), ('training', 'train'), ('data/train', 'train'), ('Train', 'train'),
    ('val', 'validation'), ('validation', 'val'), ('valid', 'validation'), ('data/val', 'validation'),
    ('eval', 'validation'), ('test', 'test'), ('data/test', 'test'), ('holdout', 'holdout'),
    ('data/holdout', 'holdout'),
])
@pytest.mark.parametrize('kind', ['folder', 'tar'])
def test_a_split_is_found_by_its_usual_names(tmp_path, there, split, kind):
    expected = write_split(tmp_path / there)
    for other in ('train', 'val', 'test'):
        if not (expected.parent / other).exists() and other != split and not split.startswith(other):
            write_split(expected.parent / other)
    if kind == 'tar':
        with tarfile.open(expected.with_suffix('.tar'), 'w') as archive:
            archive.add(expected, '')
        for path in sorted(expected.rglob('*'), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        expected.rmdir()
        expected = expected.with_suffix('.tar')
    assert find_split(tmp_path, split) == expected
    assert len(open_dataset('', str(tmp_path), split)) == 2


def test_the_exact_name_comes_first(tmp_path):
    for name in ('val', 'validation'):
        write_split(tmp_path / name)
    assert find_split(tmp_path, 'val').name == 'val' and find_split(tmp_path, 'validation').name == 'validation'


@pytest.mark.parametrize(('there', 'split', 'message'), [
    (('train', 'val'), 'test', "no split 'test' in '.*', only train, val: name another"),
    (('train',), 'validation', "no split 'validation' in '.*', only train: name another"),
    (('train', 'test'), 'validation', 'only test, train'),
    (('data/train',), 'validation', "in '.*/data', only train"),
    (('train', 'val'), 'train[:10]', 'only train, val'),
    ((), 'test', 'which has no folders train/'),
    ((), 'vaidation', 'which has no folders train/'),
])
def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path, there, split, message):
    for name in there:
        write_split(tmp_path / name)
    if not there:
        write_split(tmp_path)
    with pytest.raises(UserError, match=message):
        open_dataset('', str(tmp_path), split)


@pytest.mark.parametrize('dataset', ['', 'torch/image_folder'])
def test_a_folder_of_class_folders_is_the_split_itself_even_with_a_class_called_train(tmp_path, dataset):
    root = write_split(tmp_path / 'vehicles', 'bus', 'train')
    assert find_split(root, 'validation') == find_split(root, 'train') == root
    assert len(open_dataset(dataset, str(root), 'validation')) == 2


def test_a_named_folder_of_a_split_is_the_split(tmp_path):
    assert find_split(write_split(tmp_path / 'test'), 'test') == tmp_path / 'test'


@pytest.mark.parametrize('dataset', ['torch/image_folder', 'torch/folder'])
def test_torchvisions_folders_have_the_same_splits(tmp_path, dataset):
    write_split(tmp_path / 'train')
    with pytest.raises(UserError, match='only train'):
        open_dataset(dataset, str(tmp_path), 'validation')


def test_data_sets_of_torchvision_have_no_other_splits_than_theirs(tmp_path):
    with pytest.raises(UserError, match="no split 'holdout': use train, validation or test"):
        open_dataset('torch/cifar10', str(tmp_path), 'holdout')

"""Classes are numbered by their names, the same in every process; what merges or is unknown is refused."""

import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from timm_npu_irv2.data.classes import class_order, label_names, read_class_map
from timm_npu_irv2.data.dataset import class_to_idx, open_dataset
from timm_npu_irv2.errors import UserError

NAMES = ['01', '1', '2', '10', 'Cat', 'cat', 'cat 2', 'cat 10', 'Ünder', '²']


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(folder / name / 'a.png')
    return folder


def open_folder(folder: Path, **options):
    return open_dataset('', str(folder), 'validation', **options)


def test_names_are_numbered_naturally_and_then_by_their_spelling(tmp_path):
    found = class_to_idx(open_folder(write(tmp_path, *reversed(NAMES))))
    assert sorted(found, key=found.get) == class_order(NAMES) and set(found) == set(NAMES)
    assert class_order(NAMES)[:8] == ['01', '1', '2', '10', 'Cat', 'cat', 'cat 2', 'cat 10']


def test_the_order_does_not_depend_on_the_hash_seed():
    code = f'from timm_npu_irv2.data.classes import number_classes; print(number_classes({NAMES}))'
    printed = {subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONHASHSEED': seed}, text=True,
                              capture_output=True, check=True).stdout for seed in ('0', '1', '2')}
    assert len(printed) == 1


def test_a_byte_order_mark_and_blanks_are_no_part_of_a_name(tmp_path):
    (tmp_path / 'map.txt').write_text('\ufeffcat \n\tdog\r\n\n', encoding='utf-8')
    assert read_class_map(tmp_path / 'map.txt') == {'cat': 0, 'dog': 1}
    assert class_to_idx(open_folder(write(tmp_path / 'data', ' cat', 'dog '))) == {'cat': 0, 'dog': 1}


def test_the_two_forms_of_an_accent_are_one_name(tmp_path):
    composed, decomposed = 'caf\u00e9 au lait', 'cafe\u0301 au lait'  # as Linux and macOS write it
    expected = class_to_idx(open_folder(write(tmp_path / 'train', composed, 'tee')))
    dataset = open_folder(write(tmp_path / 'val', decomposed, 'tee'), class_to_idx=expected)
    assert [target for _, target in dataset] == [0, 1] and list(expected) == [composed, 'tee']


@pytest.mark.parametrize('kind', ['folder', 'tar'])
@pytest.mark.parametrize(('names', 'message'), [
    (('cat/photos', 'dog/photos', 'eel'), "class 'photos' is in several folders, 'cat/photos', 'dog/photos'"),
    (('cat', 'cat '), "class 'cat' is in several folders, 'cat', 'cat '"),
    (('.', 'cat'), 'images outside of class folders'),
])
def test_classes_that_would_merge_are_refused_with_their_paths(tmp_path, names, message, kind):
    root = tmp_path / 'data'
    root.mkdir()
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(root / name / 'a.png')
    if kind == 'tar':
        with tarfile.open(tmp_path / 'data.tar', 'w') as archive:
            archive.add(root, '.')
        root = tmp_path / 'data.tar'
    with pytest.raises(UserError, match=message):
        open_folder(root)


def test_classes_of_a_network_keep_their_numbers(tmp_path):
    expected = {'ant': 0, 'bee': 1, 'cat': 2}
    dataset = open_folder(write(tmp_path, 'cat', 'ant'), class_to_idx=expected)
    assert [target for _, target in dataset] == [0, 2] and class_to_idx(dataset) == expected
    write(tmp_path, 'dog')
    with pytest.raises(UserError, match="does not know: 'dog'; not in the data: 'bee'"):
        open_folder(tmp_path, class_to_idx=expected)


def test_a_data_set_with_its_own_order_gets_the_numbers_of_the_network(tmp_path):
    expected = {'cat': 0, 'bee': 1, 'ant': 2}
    root = str(write(tmp_path, 'ant', 'bee', 'cat'))
    dataset = open_dataset('torch/image_folder', root, 'validation', class_to_idx=expected)
    assert [target for _, target in dataset] == [2, 1, 0] and class_to_idx(dataset) == expected
    assert [target for _, target in open_dataset('torch/image_folder', root, 'validation')] == [0, 1, 2]
    with pytest.raises(UserError, match="does not know: 'cat'"):
        open_dataset('torch/image_folder', root, 'validation', class_to_idx={'ant': 0, 'bee': 1})


def test_a_class_map_numbers_and_selects(tmp_path):
    (tmp_path / 'map.txt').write_text('cat\nzebra\nant\n')
    dataset = open_folder(write(tmp_path / 'data', 'ant', 'bee', 'cat'), class_map=str(tmp_path / 'map.txt'),
                          class_to_idx={'ant': 0})
    assert [target for _, target in dataset] == [2, 0]


def test_a_pickled_class_map_executes_nothing(tmp_path):
    (tmp_path / 'good.pkl').write_bytes(pickle.dumps({'cat': 3}))
    assert read_class_map(tmp_path / 'good.pkl') == {'cat': 3}
    (tmp_path / 'bad.pkl').write_bytes(pickle.dumps(os.system))
    with pytest.raises(UserError, match=r'bad\.pkl'):
        read_class_map(tmp_path / 'bad.pkl')


def test_a_class_map_with_a_name_twice_is_refused(tmp_path):
    (tmp_path / 'map.txt').write_text('cat\ndog\ncat\n')
    with pytest.raises(UserError, match="'cat' is in several lines"):
        read_class_map(tmp_path / 'map.txt')


def test_outputs_without_a_class_are_called_unused():
    assert label_names({'cat': 0, 'lynx': 0, 'dog': 2}, 4) == ['cat', 'unused_1', 'dog', 'unused_3']


@pytest.mark.parametrize(('table', 'message'), [
    ({'cat': -1}, 'is -1, expected an integer'), ({'cat': 2**40}, 'expected an integer from 0'),
    ({'cat': '0'}, "is '0'"), ({'cat': 0.5}, 'is 0.5'), ({'cat': None}, 'is None'), ({'cat': True}, 'is True'),
    ({('cat',): 0}, 'a name in the table'), (['cat'], 'expected a dict'), ({'c' * 2000: 0}, 'at most 1000 characters'),
])
def test_a_class_map_of_other_values_is_refused(tmp_path, table, message):
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps(table))
    with pytest.raises(UserError, match=message) as caught:
        read_class_map(tmp_path / 'map.pkl')
    assert '\n' not in str(caught.value) and 'map.pkl' in str(caught.value)


@pytest.mark.parametrize('name', [
    'pipe.txt', 'pipe.pkl', 'folder.txt', 'folder.pkl', 'a' * 5000 + '.txt', 'missing.txt'])
def test_a_class_map_that_cannot_be_read_is_one_line(tmp_path, name):
    for ending in 'txt', 'pkl':
        os.mkfifo(tmp_path / f'pipe.{ending}')
        (tmp_path / f'folder.{ending}').mkdir()
    with pytest.raises(UserError, match='--class-map') as caught:
        read_class_map(tmp_path / name)
    assert '\n' not in str(caught.value)


def test_many_names_that_are_there_twice_are_found(tmp_path):
    """The time does not grow with the square of their number, for which this list would take an hour."""
    names = [f'{number}' for number in range(200_000)]
    (tmp_path / 'map.txt').write_text('\n'.join([*names, *names]))
    with pytest.raises(UserError, match="'0' is in several lines"):
        read_class_map(tmp_path / 'map.txt')


def test_a_class_map_with_a_name_that_no_checkpoint_takes_is_refused(tmp_path):
    (tmp_path / 'map.txt').write_text('cat\n' + 'd' * 1001)
    with pytest.raises(UserError, match='at most 1000 characters'):
        read_class_map(tmp_path / 'map.txt')

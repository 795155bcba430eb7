"""CIFAR-10 as people have it: the pickles of Python 2 are found and read, and nothing in them is executed."""

import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from timm_npu_irv2.data.cifar import CifarReader, find_cifar
from timm_npu_irv2.data.dataset import class_to_idx, open_dataset
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.training.loaders import count_classes
from timm_npu_irv2.training.options import parse_args

NAMES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()


def text(value: bytes) -> bytes:
    """A str of Python 2, as its cPickle writes it in protocol 2."""
    return b'T' + struct.pack('<I', len(value)) + value


def dump_as_python_2(content: dict) -> bytes:
    """The form of the files in cifar-10-python.tar.gz: byte strings, and NumPy's array of uint8."""
    out = b'\x80\x02}('
    for key, value in content.items():
        out += text(key.encode())
        if isinstance(value, np.ndarray):
            shape = b''.join(b'J' + struct.pack('<i', side) for side in value.shape)
            out += (b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85' + text(b'b') + b'\x87R(K\x01'
                    b'(' + shape + b't' + b'cnumpy\ndtype\n' + text(b'u1') + b'K\x00K\x01\x87R(K\x03' + text(b'|')
                    + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89' + text(value.tobytes()) + b'tb')
        else:
            items = (text(item.encode()) if isinstance(item, str) else b'K' + bytes([item]) for item in value)
            out += b'](' + b''.join(items) + b'e'
    return out + b'u.'


def write_cifar(root: Path, dump=dump_as_python_2) -> Path:
    folder = root / 'cifar-10-batches-py'
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in [*(f'data_batch_{number}' for number in range(1, 6)), 'test_batch']:
        pixels = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(dump({'data': pixels, 'labels': [9, 0, 3, 3]}))
    (folder / 'batches.meta').write_bytes(dump({'label_names': NAMES}))
    return folder


def dump_as_python_3(content: dict) -> bytes:
    return pickle.dumps(content, protocol=2)


@pytest.mark.parametrize('dump', [dump_as_python_2, dump_as_python_3])
@pytest.mark.parametrize('inside', [False, True])
def test_the_pickles_are_found_and_read(tmp_path, dump, inside):
    folder = write_cifar(tmp_path, dump)
    root = str(folder if inside else tmp_path)
    assert pickle.loads((folder / 'test_batch').read_bytes(), encoding='latin1')['labels'] == [9, 0, 3, 3]
    train, test = open_dataset('', root, 'train'), open_dataset('', root, 'validation')
    assert (len(train), len(test)) == (20, 4)
    assert class_to_idx(train) == {name: index for index, name in enumerate(NAMES)}
    pixels = pickle.loads((folder / 'data_batch_2').read_bytes(), encoding='latin1')['data']
    image, target = train[5]
    assert target == 0 and train.filename(5, absolute=True) == f'{folder}/data_batch_2/1'
    assert np.array_equal(np.asarray(image), pixels[1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert count_classes(parse_args(['--data-dir', root])) == 10


def test_the_classes_of_a_network_number_them(tmp_path):
    folder = write_cifar(tmp_path)
    numbers = {name: index for index, name in enumerate(reversed(NAMES))}
    assert [CifarReader(folder, 'test', numbers)[index][1] for index in range(4)] == [0, 9, 6, 6]
    with pytest.raises(UserError, match="does not know: 'truck'"):
        CifarReader(folder, 'test', {name: index for index, name in enumerate(NAMES[:-1])})


class Code:
    def __reduce__(self):
        return Path.touch, (Path('spoiled'),)


def test_code_in_a_pickle_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_cifar(tmp_path)
    (folder / 'test_batch').write_bytes(pickle.dumps({'data': Code(), 'labels': []}))
    with pytest.raises(UserError, match=r'test_batch cannot be read: it names pathlib'):
        CifarReader(folder, 'validation')
    assert not (tmp_path / 'spoiled').exists()


@pytest.mark.parametrize('content', [
    {}, {'data': [1], 'labels': [1]}, {'data': np.zeros((2, 3072), np.uint8), 'labels': [1]},
    {'data': np.zeros((1, 3072), np.float32), 'labels': [1]}, {'data': np.zeros((1, 3072), np.uint8), 'labels': [10]}])
def test_a_damaged_file_is_named(tmp_path, content):
    folder = write_cifar(tmp_path)
    (folder / 'test_batch').write_bytes(dump_as_python_3(content))
    with pytest.raises(UserError, match='test_batch') as caught:
        CifarReader(folder, 'validation')
    assert '\n' not in str(caught.value)


def test_other_forms_are_refused_with_what_to_do(tmp_path):
    (tmp_path / 'binary' / 'cifar-10-batches-bin').mkdir(parents=True)
    (tmp_path / 'archive').mkdir()
    with tarfile.open(tmp_path / 'archive' / 'cifar-10-python.tar.gz', 'w:gz'):
        pass
    for root, said in (('binary', 'Python version'), ('binary/cifar-10-batches-bin', 'Python version'),
                       ('archive', 'extract it first'), ('archive/cifar-10-python.tar.gz', 'extract it first')):
        with pytest.raises(UserError, match=said):
            open_dataset('', str(tmp_path / root), 'train')
    assert find_cifar(tmp_path) is None


def test_a_split_that_it_does_not_have(tmp_path):
    write_cifar(tmp_path)
    with pytest.raises(UserError, match="no split 'holdout'"):
        open_dataset('', str(tmp_path), 'holdout')

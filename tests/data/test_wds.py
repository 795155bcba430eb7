"""WebDataset shards: the pixels of the other readers, bad images stopped at or named, classes by number or by name."""

import bz2
import gc
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.test_odd_files import FILES, of_evaluation
from timm_npu_irv2.data.dataset import class_to_idx, open_dataset
from timm_npu_irv2.data.loader import create_eval_loader
from timm_npu_irv2.data.pipeline import ImagePipeline
from timm_npu_irv2.data.samplers import order_shards
from timm_npu_irv2.distributed import World
from timm_npu_irv2.errors import UserError

pytest.importorskip('webdataset')
pytestmark = pytest.mark.filterwarnings('ignore')

PIPELINE = ImagePipeline((3, 32, 32), (0.0,) * 3, (1 / 255,) * 3)
GREY = np.random.default_rng(0).integers(0, 65536, (40, 50), dtype=np.uint16)


def encoded(index: int, kind: str = 'PNG') -> bytes:
    file = io.BytesIO()
    Image.new('RGB', (40, 50), (10 * index, 0, 0)).save(file, kind)
    return file.getvalue()


def write(path: Path, samples: list[dict[str, bytes]]) -> None:
    with tarfile.open(path, 'w') as archive:
        for number, sample in enumerate(samples):
            for ending, content in sample.items():
                member = tarfile.TarInfo(f'{number:04}.{ending}')
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def open_loader(root: Path, num_workers: int = 0, split: str = '{0..1}.tar', **options):
    dataset = open_dataset('wds/x', str(root), split, **options)
    return create_eval_loader(dataset, PIPELINE, World(), batch_size=4, num_workers=num_workers,
                              on_bad_image=options.get('on_bad_image', 'stop'))


def targets(loader) -> list[int]:
    return torch.cat([targets for _, targets in loader]).tolist()


@pytest.fixture
def shards(tmp_path) -> Path:
    """Two shards of five images, each with a number."""
    for shard in range(2):
        write(tmp_path / f'{shard}.tar', [{'png': encoded(5 * shard + i), 'cls': str(5 * shard + i).encode()}
                                          for i in range(5)])
    return tmp_path


@pytest.fixture
def damaged(shards) -> Path:
    """The same with a torn image, one without a file that is an image, and an empty one."""
    samples = [{'png': encoded(i), 'cls': str(i).encode()} for i in range(5)]
    samples[1]['png'], samples[3]['png'] = encoded(1)[:-40], b''
    samples[2] = {'heic': b'x', 'cls': b'2'}
    write(shards / '0.tar', samples)
    return shards


@pytest.mark.parametrize('num_workers', [0, 2])
def test_bad_images_are_left_out_and_named(damaged, num_workers, caplog):
    loader = open_loader(damaged, num_workers, on_bad_image='skip')
    assert sorted(targets(loader)) == [0, 4, 5, 6, 7, 8, 9]
    assert [name.rpartition('/')[2] for name in sorted(loader.bad_images)] == ['0001', '0002', '0003']
    assert all(f'Skipped image {damaged}/0.tar/000{i}, which' in caplog.text for i in (1, 2, 3))
    assert sorted(targets(loader)) == [0, 4, 5, 6, 7, 8, 9] and len(loader.bad_images) == 3  # the next epoch


@pytest.mark.parametrize('num_workers', [0, 1])
def test_a_bad_image_stops_the_run_in_a_line_that_names_it(damaged, num_workers):
    with pytest.raises(UserError, match=r'^image .*0\.tar/0001 cannot be read: [^\n]*$'):
        list(open_loader(damaged, num_workers))


def test_a_torn_shard_is_no_silent_end(shards):
    content = (shards / '0.tar').read_bytes()
    (shards / '0.tar').write_bytes(content[:1000])
    with pytest.raises(UserError, match=r'0\.tar cannot be read'):
        list(open_loader(shards))
    loader = open_loader(shards, on_bad_image='skip')
    assert targets(loader) == [5, 6, 7, 8, 9]
    assert loader.bad_images[str(shards / '0.tar')] == 'unexpected end of data'


def test_names_that_repeat_from_shard_to_shard_are_different_images(tmp_path):
    for shard in range(2):
        write(tmp_path / f'{shard}.tar', [{'png': encoded(shard), 'cls': str(shard).encode()}])
    assert targets(open_loader(tmp_path)) == [0, 1]


def test_pixels_are_those_of_the_other_readers(tmp_path):
    file = io.BytesIO()
    Image.fromarray(GREY).save(file, 'PNG')
    write(tmp_path / '0.tar', [{'png': file.getvalue(), 'cls': b'0'}, {'jpeg': encoded(7, 'JPEG'), 'cls': b'1'}])
    (images, _), = open_loader(tmp_path, split='0.tar')
    expected = PIPELINE.transform()(Image.fromarray((GREY >> 8).astype(np.uint8)).convert('RGB'))
    assert torch.equal(images[0].round().to(torch.uint8), torch.as_tensor(expected))
    assert len(images) == 2


def test_odd_files_have_the_pixels_that_they_have_in_folders(tmp_path):
    (tmp_path / 'val' / 'odd').mkdir(parents=True)
    for name, content in FILES.items():
        (tmp_path / 'val' / 'odd' / name).write_bytes(content)
    write(tmp_path / '0.tar', [{name.rpartition('.')[2]: content, 'cls': str(index).encode()}
                               for index, (name, content) in enumerate(FILES.items())])
    expected = of_evaluation(tmp_path / 'val', PIPELINE)
    batches = list(open_loader(tmp_path, split='0.tar'))
    assert torch.cat([targets for _, targets in batches]).tolist() == list(range(len(FILES)))
    for name, image in zip(FILES, torch.cat([images for images, _ in batches]), strict=True):
        assert torch.equal(image.round().to(torch.uint8), expected[name]), name


def test_classes_by_name(tmp_path):
    names = ['dog', 'cat ', 'dog']
    write(tmp_path / '0.tar', [{'png': encoded(0), 'json': json.dumps({'label': name}).encode()} for name in names])
    options = dict(split='0.tar', target_key='label')
    loader = open_loader(tmp_path, class_to_idx={'cat': 0, 'cow': 1, 'dog': 2}, **options)
    assert targets(loader) == [2, 0, 2] and loader.class_to_idx['cow'] == 1
    (tmp_path / 'map.txt').write_text('\ufeffdog\r\ncat\r\n')
    loader = open_loader(tmp_path, class_map=str(tmp_path / 'map.txt'), class_to_idx={'cat': 0}, **options)
    assert targets(loader) == [0, 1, 0] and class_to_idx(loader.samples) == {'dog': 0, 'cat': 1}
    with pytest.raises(UserError, match="is of class 'dog', which the network does not know"):
        list(open_loader(tmp_path, class_to_idx={'cat': 0}, **options))
    with pytest.raises(UserError, match="is of class 'dog', which has no number: give one with --class-map"):
        list(open_loader(tmp_path, **options))


@pytest.mark.parametrize(('label', 'options', 'message'), [
    ({'cls': b'7'}, dict(num_classes=7), 'has class 7, and the network has 7'),
    ({'cls': b'seven'}, {}, "has the class 'seven', which is no number"),
])
def test_wrong_labels_are_one_line_whatever_is_done_about_images(tmp_path, label, options, message):
    write(tmp_path / '0.tar', [{'png': encoded(0), **label}])
    with pytest.raises(UserError, match=message):
        list(open_loader(tmp_path, split='0.tar', on_bad_image='skip', **options))


@pytest.mark.parametrize(('label', 'options', 'message'), [
    ({'txt': b'7'}, {}, r'cannot be read: it has no class, as there is no \.cls file'),
    ({'json': b'{"a": 1}'}, dict(target_key='b'), 'cannot be read: it has no class, as there is no b'),
])
def test_an_image_without_a_label_cannot_be_read(tmp_path, label, options, message):
    write(tmp_path / '0.tar', [{'png': encoded(0), **label}, {'png': encoded(1), 'cls': b'1', 'json': b'{"b": 1}'}])
    with pytest.raises(UserError, match=message):
        list(open_loader(tmp_path, split='0.tar', **options))
    assert targets(open_loader(tmp_path, split='0.tar', on_bad_image='skip', **options)) == [1]


def indices_of(lengths, lanes, seed=None) -> list[int]:
    return order_shards(lengths, lanes, seed).tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 5), st.sampled_from([None, 0, 1, 2]))
def test_an_order_has_each_sample_once(lengths, lanes, seed):
    order = indices_of(lengths, lanes, seed)
    assert sorted(order) == list(range(sum(lengths))) and order == indices_of(lengths, lanes, seed)


def test_each_process_has_shards_of_its_own_and_reads_them_one_after_another():
    order = indices_of([100] * 8, 4, seed=1)
    for rank in range(4):
        assert len({index // 100 for index in order[rank::4]}) == 2
    lengths = [1000] * 40
    order = indices_of(lengths, 1, seed=1)
    shards = list(dict.fromkeys(index // 1000 for index in order))
    assert shards != sorted(shards) and order != indices_of(lengths, 1, seed=2)
    last = {index // 1000: place for place, index in enumerate(order)}
    first = {order[place] // 1000: place for place in reversed(range(len(order)))}
    opened = [sum(first[shard] <= place <= last[shard] for shard in shards) for place in range(len(order))]
    assert max(opened) <= 8192 // 1000 + 2


@pytest.mark.parametrize('processes', [2, 3])
def test_several_processes_evaluate_each_image_once(tmp_path, processes):
    for shard, length in enumerate((7, 1, 3)):
        write(tmp_path / f'{shard}.tar', [{'png': encoded(i), 'cls': b'%d' % (10 * shard + i)} for i in range(length)])
    dataset = open_dataset('wds/x', str(tmp_path), '{0..2}.tar')
    seen = [targets(create_eval_loader(dataset, PIPELINE, World(rank, rank, processes), batch_size=2))
            for rank in range(processes)]
    assert sorted(label for each in seen for label in each) == [*range(7), 10, 20, 21, 22]
    assert max(map(len, seen)) - min(map(len, seen)) <= 1


@pytest.mark.parametrize('end', [512, 1024, 4 * 1024 + 512, -10240])
def test_a_shard_that_is_cut_between_two_files_is_damaged(shards, end):
    content = (shards / '0.tar').read_bytes()
    assert len(content) == 20480
    (shards / '0.tar').write_bytes(content[:end])
    with pytest.raises(UserError, match=r'0\.tar cannot be read: .*(unexpected end|empty)'):
        open_loader(shards)


def test_so_is_one_with_a_broken_header_in_the_middle(shards):
    content = bytearray((shards / '0.tar').read_bytes())
    content[4 * 1024 + 10] ^= 255
    (shards / '0.tar').write_bytes(content)
    with pytest.raises(UserError, match=r'0\.tar cannot be read'):
        open_loader(shards)
    assert targets(open_loader(shards, on_bad_image='skip')) == [0, 5, 6, 7, 8, 9]


def info(folder: Path, **changes) -> None:
    split = {'name': 'train', 'filenames': ['0.tar', '1.tar'], 'shard_lengths': [5, 5], 'num_samples': 10, **changes}
    (folder / '_info.json').write_text(json.dumps({'splits': {'train': split}}))


def test_a_list_of_shards_names_splits_and_is_checked(shards):
    info(shards)
    assert targets(open_loader(shards, split='train')) == list(range(10))
    assert targets(open_loader(shards, split='1.tar')) == [5, 6, 7, 8, 9]
    with pytest.raises(UserError, match=r"there is no split 'val' in .*: use train, or name the shards"):
        open_loader(shards, split='val')
    info(shards, shard_lengths=[4, 5])
    with pytest.raises(UserError, match=r'0\.tar has 5 samples, not 4 as _info\.json says'):
        list(open_loader(shards, split='train', on_bad_image='skip'))
    info(shards, shard_lengths=[6, 5])
    with pytest.raises(UserError, match=r'0\.tar/#5 cannot be read: the shard has only 5 samples'):
        list(open_loader(shards, split='train'))
    info(shards, shard_lengths=[5])
    with pytest.raises(UserError, match=r'_info\.json is refused: splits\.train has 1 shard_lengths for 2 files'):
        open_loader(shards, split='train')


@pytest.mark.parametrize('name', [
    'pipe:touch acted', '/0.tar', '../0.tar', 'inside/../../0.tar', '..', 'file:0.tar', 'http://127.0.0.1:9/0.tar', ''])
def test_a_list_of_shards_names_files_beside_it_alone(shards, monkeypatch, name):
    monkeypatch.chdir(shards)
    info(shards, filenames=[name, '1.tar'])
    with pytest.raises(UserError, match=r'_info\.json is refused: splits\[\'train\'\]\.filenames\[0\] is'):
        open_loader(shards, split='train')
    assert not (shards / 'acted').exists()


@pytest.mark.parametrize('name', ['0.tar', '_info.json'])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(shards, name):
    (shards / name).unlink(missing_ok=True)
    os.mkfifo(shards / name)
    with pytest.raises(UserError, match=f'{name} cannot be read: it is a folder, a pipe or a device'):
        open_loader(shards, split='{0..1}.tar')


def test_numbers_become_those_of_the_network_where_the_list_has_their_names(shards):
    info(shards)
    listed = json.loads((shards / '_info.json').read_text())
    names = [f'class{number}' for number in range(10)]
    listed['class_to_idx'] = {name: number for number, name in enumerate(names)}
    (shards / '_info.json').write_text(json.dumps(listed))
    assert open_loader(shards, split='train').class_to_idx == listed['class_to_idx']
    backwards = {name: 9 - number for number, name in enumerate(names)}
    assert targets(open_loader(shards, split='train', class_to_idx=backwards)) == list(range(9, -1, -1))
    with pytest.raises(UserError, match=r"classes that the network does not know: 'class9'"):
        open_loader(shards, split='train', class_to_idx={name: number for name, number in backwards.items() if number})


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"without _info\.json name the shards, such as 'train-\{0000\.\.0003\}\.tar'"):
        open_loader(tmp_path, split='train')
    with pytest.raises(UserError, match=r'0\.tar cannot be read: No such file or directory'):
        open_loader(tmp_path, split='0.tar')
    with pytest.raises(UserError, match=r"data folder '\S+/none' does not exist: check --data-dir"):
        open_loader(tmp_path / 'none', split='train')


@pytest.mark.parametrize('opener', [gzip.open, bz2.open, lzma.open])
def test_compressed_shards(shards, opener):
    content = (shards / '0.tar').read_bytes()
    with opener(shards / '0.tar', 'wb') as file:
        file.write(content)
    assert targets(open_loader(shards)) == list(range(10))


def test_an_image_of_class_minus_one_is_left_out(tmp_path):
    write(tmp_path / '0.tar', [{'png': encoded(i), 'cls': label} for i, label in enumerate((b'3', b'-1', b'4'))])
    loader = open_loader(tmp_path, split='0.tar')
    assert targets(loader) == [3, 4] and loader.indices == [0, 2] and not loader.bad_images


def test_an_open_data_set_can_be_sent_to_a_process_that_is_not_forked(shards):
    dataset = open_dataset('wds/x', str(shards), '{0..1}.tar')
    assert dataset[3][1] == 3  # its shard is open now
    assert pickle.loads(pickle.dumps(dataset))[3][1] == 3


def test_nothing_is_left_on_the_disk(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    (tmp_path / 'timm_npu_irv2-shards-dead').mkdir()
    (tmp_path / 'timm_npu_irv2-shards-dead' / 'owner').touch()  # of a process that was killed
    loader = open_loader(shards, num_workers=1)
    other = open_loader(shards)
    assert targets(loader) == list(range(10)) and len(list(tmp_path.glob('timm_npu_irv2-shards-*'))) == 2
    loader.close()
    del loader, other
    gc.collect()
    assert not list(tmp_path.glob('timm_npu_irv2-shards-*'))

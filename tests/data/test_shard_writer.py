"""timm-npu-irv2 shards: what it makes is what the folder holds, whenever it is killed, and damage is found."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data.readers.reader_wds import ReaderWds

from tests.conftest import ROOT
from timm_npu_irv2.cli.script import run_script
from timm_npu_irv2.data.dataset import class_to_idx, open_dataset
from timm_npu_irv2.data.shard_writer import RECORD
from train_scripts import make_shards

pytest.importorskip('webdataset')


@pytest.fixture
def images(tmp_path) -> Path:
    """train/ with 11 images and val/ with 5 of two classes, some of them JPEG files."""
    generator = np.random.default_rng(0)
    for split, count in (('train', 11), ('val', 5)):
        for number in range(count):
            name = f'{number}.{"png" if number % 3 else "JPEG"}'
            path = tmp_path / 'images' / split / ('dog', 'Cat')[number % 2] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(path)
    return tmp_path / 'images'


def main(words: list[str]) -> int:
    return run_script('make_shards.py', make_shards.main, words)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != RECORD}


def make(images: Path, out: Path, *words: str) -> Path:
    assert main([str(images), str(out), '--images-per-shard', '3', *words]) == 0
    return out


def test_shards_hold_the_images_of_the_folder(images, tmp_path, capsys):
    out = make(images, tmp_path / 'out')
    assert capsys.readouterr().out == f'{out}: 6 shards, of which 6 were written now\n'
    for split, folder in (('train', 'train'), ('validation', 'val')):
        shards, files = open_dataset('wds/x', str(out), split), open_dataset('', str(images), split)
        assert class_to_idx(shards) == class_to_idx(files) == {'Cat': 0, 'dog': 1}
        found = sorted((np.asarray(image).tobytes(), target) for image, target in shards)
        assert found == sorted((np.asarray(image).tobytes(), target) for image, target in files)
        timms = [target for _, target in ReaderWds(str(out), split=split)]
        assert timms == [target for _, target in shards] and len(timms) == len(list((images / folder).glob('*/*')))
    assert [target for _, target in open_dataset('wds/x', str(out), 'train')] != sorted(timms), 'shuffled'
    named = open_dataset('wds/x', str(out), 'train', target_key='label')
    assert [target for _, target in named] == [target for _, target in open_dataset('wds/x', str(out), 'train')]


def test_a_killed_run_goes_on_to_the_same_bytes(images, tmp_path):
    expected = contents(make(images, tmp_path / 'expected', '--images-per-shard', '1'))
    out = tmp_path / 'out'
    command = [sys.executable, '-m', 'timm_npu_irv2', 'shards', str(images), str(out), '--images-per-shard', '1']
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    with subprocess.Popen(command, env={**os.environ, 'PYTHONPATH': path}, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(out.glob('*.tar')):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    with (out / RECORD).open('a') as record:
        record.write('{"name": "train-0')  # a line that was being written
    kept = {path: path.stat().st_ino for path in out.glob('*.tar')}
    assert contents(make(images, out, '--images-per-shard', '1')) == expected
    unrecorded = [path for path, inode in kept.items() if path.stat().st_ino != inode]
    assert kept and len(unrecorded) <= 1, 'only a shard without a record is written twice'
    assert contents(make(images, out, '--images-per-shard', '1')) == expected


@pytest.mark.parametrize('damage', ['flip', 'cut', 'remove'])
def test_a_damaged_shard_is_found_and_written_again(images, tmp_path, capsys, damage):
    out = make(images, tmp_path / 'out')
    expected, victim = contents(out), out / 'train-00001.tar'
    assert main(['--check', str(out)]) == 0
    content = bytearray(victim.read_bytes())
    content[700] ^= 1
    victim.unlink() if damage == 'remove' else victim.write_bytes(content if damage == 'flip' else content[:1024])
    capsys.readouterr()
    assert main(['--check', str(out)]) == 2
    line = '1 of 6 shards are damaged or missing, such as'
    assert capsys.readouterr().err.startswith(f'make_shards.py: error: {line} {victim}: ')
    make(images, out)
    assert capsys.readouterr().out.endswith('6 shards, of which 1 were written now\n') and contents(out) == expected


def test_a_damaged_shard_of_images_that_have_changed_is_not_mixed_with_the_others(images, tmp_path, capsys):
    out = make(images, tmp_path / 'out')
    (out / 'validation-00001.tar').unlink()
    (images / 'val' / 'dog' / '4.png').write_bytes(b'other')
    assert main([str(images), str(out), '--images-per-shard', '3']) == 2
    assert 'images in it have changed since it was made' in capsys.readouterr().err


@pytest.mark.parametrize(('words', 'message'), [
    (['{images}'], 'name the folder of the shards with --check'),
    (['{images}', '{out}', '--images-per-shard', '0'], '--images-per-shard 0: must be at least 1'),
    (['{images}/none', '{out}'], "data folder '{images}/none' does not exist"),
    (['{images}', '{images}/out'], '{images}/out is inside of {images}'),
    (['{empty}', '{out}'], '{empty}: no images in this folder'),
    (['{images}', '{made}', '--images-per-shard', '4'], '{made} was begun with --images-per-shard 3: do as then'),
    (['{images}', '{made}', '--images-per-shard', '3', '--seed', '1'], '{made} was begun with --seed 42'),
    (['{images}/val', '{made}', '--images-per-shard', '3'], '{made} was begun with other images'),
    (['{images}', '{foreign}'], '{foreign} has tar files, but no _shards.jsonl'),
    (['--check', '{foreign}'], '_info.json cannot be read as JSON: No such file'),
])
def test_wrong_input_is_one_line(images, tmp_path, capsys, words, message):
    places = dict(images=images, out=tmp_path / 'out', empty=tmp_path / 'empty', made=tmp_path / 'made',
                  foreign=tmp_path / 'foreign')
    for name in 'empty', 'foreign':
        places[name].mkdir()
    (places['foreign'] / '0.tar').touch()
    make(images, places['made'])
    before = contents(places['made'])
    capsys.readouterr()
    assert main([word.format(**places) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and message.format(**places) in error
    assert contents(places['made']) == before


@pytest.mark.parametrize(('kind', 'message'), [
    ('link', '_shards.jsonl is a symbolic link: remove it'),
    ('pipe', '_shards.jsonl is not a file of its own: remove it'),
    ('binary', 'has tar files, but no _shards.jsonl that says what they are of'),
    ('nested', 'has tar files, but no _shards.jsonl that says what they are of'),
])
def test_a_record_that_is_not_its_own_is_one_line_and_nothing_is_lost(images, tmp_path, capsys, kind, message):
    out, victim = make(images, tmp_path / 'out'), tmp_path / 'victim'
    victim.write_text('precious')
    record = out / '_shards.jsonl'
    record.unlink()
    {'link': lambda: record.symlink_to(victim), 'pipe': lambda: os.mkfifo(record),
     'binary': lambda: record.write_bytes(bytes(range(256))),
     'nested': lambda: record.write_text('[' * 100_000)}[kind]()
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    capsys.readouterr()
    assert main([str(images), str(out), '--images-per-shard', '3']) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and message in error
    assert victim.read_text() == 'precious'
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_a_list_without_checksums_is_one_line(images, tmp_path, capsys):
    out = make(images, tmp_path / 'out')
    info = json.loads((out / '_info.json').read_text())
    del info['splits']['train']['sha256']
    (out / '_info.json').write_text(json.dumps(info))
    assert main(['--check', str(out)]) == 2
    assert 'has no checksums: make the shards with timm-npu-irv2 shards' in capsys.readouterr().err

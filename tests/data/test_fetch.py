"""Shards from servers and pipes that fail: asked again, complete or refused in one line, and none skipped."""

import hashlib
import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.test_wds import PIPELINE, encoded, open_loader, targets, write
from tests.failing_server import fail_now_and_then, serve
from timm_npu_irv2.data import fetch as fetching
from timm_npu_irv2.data import wds
from timm_npu_irv2.data.dataset import open_dataset
from timm_npu_irv2.data.fetch import Missing, fetch
from timm_npu_irv2.data.loader import create_eval_loader
from timm_npu_irv2.data.samplers import order_shards
from timm_npu_irv2.distributed import World
from timm_npu_irv2.errors import UserError

pytest.importorskip('webdataset')


@pytest.fixture(autouse=True)
def _impatience(monkeypatch):
    monkeypatch.setattr(fetching, 'FIRST_PAUSE', 0.01)
    monkeypatch.setenv('TIMM_NPU_IRV2_FETCH_TIMEOUT', '120')


@pytest.fixture
def short_timeout(monkeypatch):
    """For servers that stall. A slow machine may ask such a server more often."""
    monkeypatch.setenv('TIMM_NPU_IRV2_FETCH_TIMEOUT', '2')


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / 'served').mkdir()
    path = tmp_path / 'served' / 'file'
    path.write_bytes(torch.arange(50000).numpy().tobytes())
    return path


@pytest.mark.parametrize('ranges', [True, False])
@pytest.mark.parametrize('fault', ['503', 'break', 'stall'])
def test_a_file_is_complete_after_three_faults(file, tmp_path, request, fault, ranges):
    if fault == 'stall':
        request.getfixturevalue('short_timeout')
    with serve(file.parent, lambda path, number: fault if number < 3 else '', ranges=ranges) as server:
        fetch(f'{server.url}/file', tmp_path / 'got')
        assert (tmp_path / 'got').read_bytes() == file.read_bytes()
        assert server.requests['file'] == 4 or fault == 'stall'
        if ranges and server.requests['file'] == 4:
            assert server.sent['file'] == file.stat().st_size, 'no byte is sent twice'


def test_a_file_that_changes_meanwhile_is_fetched_from_its_beginning(file, tmp_path):
    def change(path: str, number: int) -> str:
        if number == 1:
            file.write_bytes(b'new' * 1000)
        return '' if number else 'break'

    with serve(file.parent, change) as server:
        fetch(f'{server.url}/file', tmp_path / 'got')
    assert (tmp_path / 'got').read_bytes() == b'new' * 1000


@pytest.mark.parametrize(('fault', 'reason'), [
    ('503', 'HTTP 503 Service Unavailable'), ('break', r'the connection broke off after \d+ of 400000 bytes')])
def test_a_server_that_goes_on_failing_is_one_line(file, tmp_path, fault, reason):
    with serve(file.parent, lambda path, number: fault, ranges=False) as server:
        with pytest.raises(UserError, match=rf'^{server.url}/file cannot be .* after 6 attempts: {reason}') as error:
            fetch(f'{server.url}/file?key=secret', tmp_path / 'got')
        assert server.requests['file'] == 6 and 'secret' not in str(error.value)


def test_what_is_not_there_is_not_asked_for_again(file, tmp_path):
    with serve(file.parent) as server:
        with pytest.raises(Missing, match='/other cannot be fetched: HTTP 404 Not Found'):
            fetch(f'{server.url}/other', tmp_path / 'got')
        assert server.requests['other'] == 1
    with pytest.raises(UserError, match=r'^http://127\.0\.0\.1:\d+/file cannot be fetched after 6 attempts: '):
        fetch(f'{server.url}/file', tmp_path / 'got')


def test_a_checksum_that_is_not_the_right_one_is_an_error(file, tmp_path):
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    with serve(file.parent) as server:
        fetch(f'{server.url}/file', tmp_path / 'got', right)
        with pytest.raises(UserError, match=r'its checksum is not that of _info\.json'):
            fetch(f'{server.url}/file', tmp_path / 'got', '0' * 64)


def test_a_pipe_that_fails_is_started_again(file, tmp_path):
    once = f'pipe:test -e {tmp_path}/again && cat {file} || {{ touch {tmp_path}/again; head -c 999 {file}; exit 1; }}'
    fetch(once, tmp_path / 'got')
    assert (tmp_path / 'got').read_bytes() == file.read_bytes()
    with pytest.raises(UserError, match=r'cannot be fetched after 6 attempts: .*exit 3'):
        fetch('pipe:exit 3', tmp_path / 'got')
    with pytest.raises(UserError, match='nowhere://x cannot be fetched'):
        fetch('nowhere://x', tmp_path / 'got')


@pytest.fixture
def shards(tmp_path) -> Path:
    """Twelve shards of three images with _info.json."""
    (tmp_path / 'shards').mkdir()
    for shard in range(12):
        write(tmp_path / 'shards' / f'{shard}.tar', [
            {'png': encoded(number % 20), 'cls': b'%d' % number} for number in range(3 * shard, 3 * shard + 3)])
    names = [f'{shard}.tar' for shard in range(12)]
    info = {'splits': {'train': {'filenames': names, 'shard_lengths': [3] * 12}}}
    (tmp_path / 'shards' / '_info.json').write_text(json.dumps(info))
    return tmp_path / 'shards'


@pytest.mark.parametrize('num_workers', [0, 2])
def test_every_image_comes_from_a_server_that_fails_now_and_then(shards, short_timeout, num_workers):
    with serve(shards, fail_now_and_then) as server:
        assert targets(open_loader(server.url, num_workers, 'train')) == list(range(36))
        assert all(server.faults[fault] for fault in ('503', 'break', 'stall'))
        assert targets(open_loader(server.url, num_workers, '{0..11}.tar')) == list(range(36))


def test_several_processes_fetch_different_shards(shards):
    with serve(shards) as server:
        dataset = [open_dataset('wds/x', server.url, 'train') for _ in range(2)]
        seen = [targets(create_eval_loader(dataset[rank], PIPELINE, World(rank, rank, 2), batch_size=5, num_workers=2))
                for rank in range(2)]
        assert sorted(seen[0] + seen[1]) == list(range(36))
        assert all(server.requests[f'{shard}.tar'] == 1 for shard in range(12))


def test_one_process_that_takes_over_from_four_keeps_the_shards_of_all(shards, monkeypatch):
    monkeypatch.setattr(wds, 'SHUFFLE_WINDOW', 0)
    with serve(shards) as server:
        dataset = open_dataset('wds/x', server.url, 'train')
        dataset.reader.keep_for_lanes(4)
        seen = [dataset[index][1] for index in order_shards([3] * 12, 4).tolist()]
        assert sorted(seen) == list(range(36)) and seen != sorted(seen)
        assert all(server.requests[f'{shard}.tar'] == 1 for shard in range(12))


def test_threads_read_what_they_ask_for(shards, monkeypatch):
    monkeypatch.setattr(wds, 'SHUFFLE_WINDOW', 0)  # so that they close each other's files
    dataset = open_dataset('wds/x', str(shards), 'train')
    indices = np.random.default_rng(0).integers(0, 36, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert [target for _, target in pool.map(dataset.__getitem__, indices)] == indices


def test_without_a_list_each_shard_is_counted(shards, short_timeout):
    (shards / '_info.json').unlink()
    with serve(shards, fail_now_and_then) as server:
        assert targets(open_loader(server.url, split='{0..11}.tar')) == list(range(36))
    assert targets(open_loader('', split=f'pipe:cat {shards}/{{0..11}}.tar')) == list(range(36))


@pytest.mark.parametrize('on_bad_image', ['stop', 'skip'])
def test_a_shard_that_does_not_come_is_never_left_out(shards, on_bad_image):
    with serve(shards, lambda path, number: '503' if path == '7.tar' else '') as server:
        loader = open_loader(server.url, 1, 'train', on_bad_image=on_bad_image)
        with pytest.raises(UserError, match=r'^http://\S*/7\.tar cannot be fetched after 6 attempts: HTTP 503'):
            list(loader)
        loader.close()


def test_a_list_that_cannot_be_fetched_is_no_missing_list(shards):
    refused = pytest.raises(UserError, match=r'/_info\.json cannot be fetched after 6 attempts')
    with serve(shards, lambda path, number: '503' if path == '_info.json' else '') as server, refused:
        open_loader(server.url, split='train')


def test_a_full_disk_is_named(shards, monkeypatch):
    def no_room(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(http.client.HTTPResponse, 'read1', no_room)
    with serve(shards) as server, pytest.raises(UserError, match='the disk is full; let TMPDIR name another folder'):
        open_loader(server.url, split='train')

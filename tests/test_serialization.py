"""Files are whole or not there, whatever lies in the folder, and what cannot be written is one message."""

import importlib
import os
import pwd
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from timm_npu_irv2 import serialization
from timm_npu_irv2.cli import environment
from timm_npu_irv2.cli.checks import check_output_file
from timm_npu_irv2.data.decode import read_image
from timm_npu_irv2.data.folder import ImageFile
from timm_npu_irv2.errors import CannotWrite, UserError
from timm_npu_irv2.serialization import atomic_file, atomic_link, atomic_write


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / 'file'
    atomic_write(path, 'old')
    monkeypatch.setattr('pathlib.Path.replace', lambda *_: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(CannotWrite, match='disk full'):
        atomic_write(path, 'new')
    assert names(tmp_path) == ['file'] and path.read_text() == 'old'


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path):
    code = ('import os, sys\nfrom timm_npu_irv2.serialization import atomic_file\n'
            'with atomic_file(sys.argv[1]) as file:\n    file.write(b"half")\n    file.flush()\n    os._exit(1)')
    subprocess.run([sys.executable, '-c', code, str(tmp_path / 'file')], check=False)
    (left,) = names(tmp_path)
    assert left.startswith('.file.') and left.endswith('.part')
    atomic_write(tmp_path / 'file', 'whole')
    assert names(tmp_path) == ['file'] and (tmp_path / 'file').read_text() == 'whole'


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    with atomic_file(tmp_path / 'file') as first:
        first.write(b'first')
        with atomic_file(tmp_path / 'file') as second:
            second.write(b'second')
            assert len(names(tmp_path)) == 2
        assert (tmp_path / 'file').read_bytes() == b'second'
    assert names(tmp_path) == ['file'] and (tmp_path / 'file').read_bytes() == b'first'


def test_links_in_the_folder_are_not_followed(tmp_path):
    """Neither one in the place of the file nor one under the name that temporary files once had."""
    victim = tmp_path / 'victim'
    victim.write_text('precious')
    for name in ('file', '.file.part'):
        (tmp_path / name).symlink_to(victim)
    atomic_write(tmp_path / 'file', 'new')
    serialization.write_checkpoint({'state_dict': {'a': torch.zeros(1)}}, tmp_path / 'file')
    assert victim.read_text() == 'precious' and not (tmp_path / 'file').is_symlink()


def test_the_name_of_a_temporary_file_cannot_be_foreseen(tmp_path):
    seen = set()
    for _ in range(20):
        with atomic_file(tmp_path / 'file'):
            seen |= set(names(tmp_path)) - {'file'}
    assert len(seen) == 20


def test_a_temporary_file_that_somebody_replaces_is_not_published(tmp_path):
    with pytest.raises(CannotWrite, match='replaced the temporary file'), atomic_file(tmp_path / 'file') as file:
        file.write(b'ours')
        (temporary,) = tmp_path.iterdir()
        temporary.unlink()
        temporary.write_text('theirs')
    assert names(tmp_path) == []


def test_a_long_name_can_be_written(tmp_path):
    atomic_write(tmp_path / ('a' * 255), 'content')
    assert names(tmp_path) == ['a' * 255]


def test_another_name_of_a_file_replaces_what_was_there(tmp_path):
    (tmp_path / 'source').write_text('new')
    (tmp_path / 'target').write_text('old')
    for _ in range(2):
        atomic_link(tmp_path / 'source', tmp_path / 'target')
        assert (tmp_path / 'target').samefile(tmp_path / 'source') and names(tmp_path) == ['source', 'target']
    with pytest.raises(CannotWrite, match=f'cannot write {tmp_path}/none/target: there is no folder {tmp_path}/none.'):
        atomic_link(tmp_path / 'source', tmp_path / 'none' / 'target')


@pytest.mark.parametrize('name', ['file', 'weights.pth', 'weights.safetensors'])
def test_what_cannot_be_written_is_one_message(tmp_path, name):
    path = tmp_path / 'nowhere' / name
    with pytest.raises(CannotWrite) as caught:
        if name == 'file':
            atomic_write(path, 'content')
        else:
            serialization.save_weights({'a': torch.zeros(1)}, path)
    assert str(caught.value) == f'cannot write {path}: there is no folder {path.parent}.'


WRITES = '''
import sys, torch
from pathlib import Path
from timm_npu_irv2 import serialization
from timm_npu_irv2.cli.checks import check_output_file
weights = {'a': torch.randn(1_000_000)}
for write in (lambda path: serialization.write_checkpoint({'state_dict': weights}, path / 'last.pth.tar'),
              lambda path: serialization.save_weights(weights, path / 'a.safetensors'),
              lambda path: serialization.save_weights(weights, path / 'a.pth'),
              lambda path: serialization.atomic_write(path / 'a', bytes(4_000_000))):
    try:
        write(Path(sys.argv[1]))
    except serialization.CannotWrite as error:
        print(error)
'''


def test_the_message_for_a_full_disk_names_the_disk(tmp_path):
    mount = ['unshare', '--map-root-user', '--mount', 'sh', '-c', 'mount -t tmpfs -o size=1m none "$0" && exec "$@"']
    if subprocess.run([*mount, tmp_path, 'true'], capture_output=True, check=False).returncode:
        pytest.skip('this user may not mount a small disk')
    done = subprocess.run([*mount, tmp_path, sys.executable, '-c', WRITES, tmp_path], capture_output=True, text=True,
                          check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    for line, name in zip(lines, ('last.pth.tar', 'a.safetensors', 'a.pth', 'a'), strict=True):
        assert line.startswith(f'cannot write {tmp_path}/{name}: the disk is full (the one that holds {tmp_path}); '
                               'free some space, or choose another folder.')


@pytest.mark.parametrize('entry', ['archive/data.pkl', 'archive/data/0'])
def test_a_file_that_inflates_a_thousandfold_is_refused_before_it_is_read(tmp_path, entry):
    torch.save({'state_dict': {'a': torch.zeros(10)}}, tmp_path / 'honest.pth')
    with zipfile.ZipFile(tmp_path / 'honest.pth') as honest, \
            zipfile.ZipFile(tmp_path / 'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as bomb:
        for each in honest.namelist():
            name = 'archive/' + each.partition('/')[2]
            bomb.writestr(name, bytes(300_000_000) if name == entry else honest.read(each))
    code = ('import resource, sys\nfrom timm_npu_irv2.serialization import load_weights\n'
            'from timm_npu_irv2.errors import UserError\n'
            'import safetensors.torch, timm\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
            'try:\n    load_weights(sys.argv[1])\nexcept UserError as error:\n    print(error)\n'
            'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)')
    done = subprocess.run([sys.executable, '-c', code, tmp_path / 'bomb.pth'], capture_output=True, text=True,
                          check=False)
    message, grown = done.stdout.splitlines()
    assert 'would inflate to 3' in message and int(grown) < 50_000, done.stderr  # KiB


def test_a_checkpoint_that_was_zipped_again_is_read(tmp_path):
    torch.save({'state_dict': {'a': torch.randn(1000)}}, tmp_path / 'a.pth')
    with zipfile.ZipFile(tmp_path / 'a.pth') as stored, \
            zipfile.ZipFile(tmp_path / 'b.pth', 'w', zipfile.ZIP_DEFLATED) as deflated:
        for each in stored.namelist():
            deflated.writestr(each, stored.read(each))
    one, other = (serialization.load_weights(tmp_path / name)['a'] for name in ('a.pth', 'b.pth'))
    assert torch.equal(one, other)


@pytest.mark.parametrize('content', [b'', b'{', b'[1]', b'\xff', b'[' * 100_000])
def test_json_that_is_none_is_refused_in_a_line(tmp_path, content):
    (tmp_path / 'config.json').write_bytes(content)
    with pytest.raises(UserError, match=r'config\.json') as caught:
        serialization.read_json(tmp_path / 'config.json')
    assert '\n' not in str(caught.value)


def test_weights_are_written_without_gaps(tmp_path):
    strided = torch.randn(4, 4).t()
    for name in ('a.pth', 'a.safetensors'):
        serialization.save_weights({'a': strided}, tmp_path / name)
        loaded = serialization.load_weights(tmp_path / name)['a']
        assert loaded.is_contiguous() and torch.equal(loaded, strided)


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    old = os.umask(0o027)
    try:
        atomic_write(tmp_path / 'file', 'content')
        serialization.save_weights({'a': torch.zeros(1)}, tmp_path / 'model.safetensors')
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


@pytest.mark.timeout(600)
@pytest.mark.parametrize('kind', ['pipe', 'device', 'folder', 'link to a pipe'])
def test_what_would_be_waited_for_is_refused(tmp_path, kind):
    """An image, a config.json or a checkpoint of somebody else may be a pipe, whose writer never comes."""
    path = tmp_path / 'a.png'
    os.mkfifo(tmp_path / 'pipe')
    {'pipe': lambda: os.mkfifo(path), 'device': lambda: path.symlink_to('/dev/zero'), 'folder': path.mkdir,
     'link to a pipe': lambda: path.symlink_to('pipe')}[kind]()
    for read in (serialization.open_regular, lambda path: ImageFile(str(tmp_path), path.name).open(),
                 lambda path: read_image(path, 'RGB')):
        with pytest.raises(OSError, match='a pipe or a device'):
            read(path)
    for read in serialization.read_json, serialization.read_checkpoint:
        with pytest.raises(UserError, match=r'a\.png'):
            read(path)
    assert serialization.peek_checkpoint(path) is None


def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_was_checked(tmp_path, monkeypatch):
    path = tmp_path / 'a.pth'
    for name, value in ('a', 1), ('b', 2):
        torch.save({'state_dict': {'x': torch.full((3,), value)}}, tmp_path / f'{name}.pth')

    def check_and_replace(archive: zipfile.ZipFile) -> None:
        (tmp_path / 'b.pth').replace(path)

    monkeypatch.setattr(zipfile.ZipFile, 'testzip', check_and_replace)
    assert serialization.read_checkpoint(path)['state_dict']['x'].tolist() == [1, 1, 1]
    assert torch.load(path, weights_only=True)['state_dict']['x'].tolist() == [2, 2, 2]


def test_a_link_under_the_name_of_the_temporary_file_is_not_written_to(tmp_path, monkeypatch):
    """Even if somebody guesses the name."""
    victim = tmp_path / 'victim'
    victim.write_text('precious')
    monkeypatch.setattr('secrets.token_hex', lambda count: 'guessed')
    (tmp_path / '.file.guessed.part').symlink_to(victim)
    with pytest.raises(CannotWrite):
        atomic_write(tmp_path / 'file', 'new')
    assert victim.read_text() == 'precious'


@pytest.mark.parametrize('through_a_link', [False, True])
def test_a_file_takes_not_the_place_of_a_device_or_a_pipe(tmp_path, through_a_link):
    """An answer for /dev/null would make it a file, for every program of the machine."""
    place = tmp_path / 'null'
    os.mkfifo(place)
    path = place
    if through_a_link:
        path = tmp_path / 'link'
        path.symlink_to(place)
    with pytest.raises(CannotWrite, match='it is a pipe or a device'):
        atomic_write(path, 'a')
    with pytest.raises(UserError, match=r'--picture: cannot write .*: it is a pipe or a device'):
        check_output_file('--picture', str(path))
    assert place.is_fifo() and path.is_symlink() == through_a_link


def test_a_stream_of_the_program_is_not_replaced_where_it_leads_to_a_file(tmp_path):
    """``--results-file /dev/stdout > file`` would take /dev/stdout from every program of the machine."""
    link = tmp_path / 'stdout'
    with (tmp_path / 'file').open('w') as file:
        link.symlink_to(f'/proc/self/fd/{file.fileno()}')
        for path in link, Path(f'/dev/fd/{file.fileno()}'):
            with pytest.raises(CannotWrite, match='it is one of the streams of the program'):
                atomic_write(path, 'new')
    assert link.is_symlink() and (tmp_path / 'file').read_text() == ''


@pytest.mark.parametrize(('content', 'message'), [
    (None, 'No such file'), (b'caf\xe9', "can't decode byte"), ('pipe', 'a pipe or a device'),
])
def test_a_text_that_cannot_be_read_is_one_line(tmp_path, content, message):
    path = tmp_path / 'a.txt'
    if content == 'pipe':
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f'^--option .*a.txt: .*{message}'):
        serialization.read_text(path, f'--option {path}')


def test_a_text_without_end_is_not_read_to_its_end(tmp_path):
    with (tmp_path / 'a.txt').open('wb') as file:
        file.truncate(2**28)
    with pytest.raises(UserError, match='it has more than'):
        serialization.read_text(tmp_path / 'a.txt', 'the text')


@pytest.mark.parametrize(('weights', 'average'), [('state_dict', 'state_dict_ema'), ('model', 'model_ema'),
                                                  (None, None)])
def test_weights_are_found_under_the_names_of_other_programs(tmp_path, weights, average):
    """Without the prefixes of DDP and torch.compile, and without what is no tensor."""
    def states(value: float) -> dict:
        return {'module._orig_mod.a': torch.full((2,), value), 'epoch': 7}

    torch.save({weights: states(1), average: states(2)} if weights else states(1), tmp_path / 'a.pth')
    found = serialization.read_checkpoint(tmp_path / 'a.pth')
    assert {name: value.tolist() for name, value in found['state_dict'].items()} == {'a': [1, 1]}
    chosen = serialization.load_weights(tmp_path / 'a.pth', use_ema=True)['a']
    assert chosen.tolist() == ([2, 2] if average else [1, 1])


def test_the_checksum_of_weights_covers_names_types_and_shapes():
    bits = torch.arange(4, dtype=torch.float32)
    same_bits = {'a': bits}, {'b': bits}, {'a': bits.view(2, 2)}, {'a': bits.view(torch.int32)}
    assert len({serialization.weights_checksum(each) for each in same_bits}) == 4


def test_what_is_under_a_number_is_no_weight(tmp_path):
    torch.save({'a': torch.ones(2), 7: torch.ones(2)}, tmp_path / 'a.pth')
    assert list(serialization.load_weights(tmp_path / 'a.pth')) == ['a']


def test_json_that_nests_too_deep_is_refused(tmp_path):
    (tmp_path / 'config.json').write_text('{"a": ' + '[' * 60 + ']' * 60 + '}')
    with pytest.raises(UserError, match='it nests more than'):
        serialization.read_json(tmp_path / 'config.json')


def test_a_damaged_image_of_a_long_path_does_not_spoil_the_checkpoint(tmp_path):
    state = {'state_dict': {'a': torch.zeros(1)}, 'bad_images': {'folder/' * 500 + 'a.png': 'it is torn'}}
    serialization.write_checkpoint(state, tmp_path / 'a.pth.tar')
    assert serialization.read_checkpoint(tmp_path / 'a.pth.tar')['bad_images'] == state['bad_images']


def test_a_user_without_a_home_has_no_folder_called_tilde(monkeypatch):
    """As ``docker run --user`` may have none; libraries read HOME themselves, and so would make one."""
    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.delenv('HOME', raising=False)
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.delenv('TIMM_NPU_IRV2_CACHE', raising=False)
    monkeypatch.setattr(pwd, 'getpwuid', unknown)
    assert serialization.cache_folder() == Path('/.cache/timm_npu_irv2')
    importlib.reload(environment)
    assert os.environ['HOME'] == '/'

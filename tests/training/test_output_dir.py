"""The output folder: one run at a time, never two runs' files, and a lock that no killed run leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from timm_npu_irv2.distributed import World
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.training.output_dir import default_name, output_dir

# A run that holds its folder and has forked a worker; both wait for the end of the test, and tell that they met it.
HOLDER = """
import os, sys
from pathlib import Path
from timm_npu_irv2.distributed import World
from timm_npu_irv2.training.output_dir import output_dir
with output_dir(Path(sys.argv[1]), World(), resume='auto'):
    if os.fork():
        print('forked', flush=True)
    sys.stdin.read()
    print('alive', flush=True)
"""


def enter(folder: Path, resume: str = '') -> Path:
    with output_dir(folder, World(), resume=resume):
        return folder


def refusal(folder: Path, resume: str = '') -> str:
    with pytest.raises(UserError) as caught:
        enter(folder, resume)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_a_second_run_is_refused_until_the_first_is_killed_even_if_its_workers_live_on(tmp_path):
    with subprocess.Popen([sys.executable, '-c', HOLDER, str(tmp_path / 'run')], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == 'forked\n'
        said = refusal(tmp_path / 'run', 'auto')
        assert f"another run writes to the output folder '{tmp_path}/run' (process {process.pid} on " in said
        process.kill()
        process.wait()
        assert enter(tmp_path / 'run', 'auto') == tmp_path / 'run'
        process.stdin.close()
        assert process.stdout.read() == 'alive\n'  # the worker


@pytest.mark.parametrize('name', ['last.pth.tar', 'recovery-0-3.pth.tar', 'checkpoint-2.pth.tar'])
def test_the_checkpoints_of_another_run_are_not_mixed_with_ours(tmp_path, name):
    path = tmp_path / 'run' / name
    path.parent.mkdir()
    path.touch()
    assert f'checkpoints of another run ({name})' in refusal(tmp_path / 'run')
    assert 'another run' in refusal(tmp_path / 'run', str(tmp_path / 'other' / 'last.pth.tar'))
    for resume in 'auto', str(path):
        assert enter(tmp_path / 'run', resume) == tmp_path / 'run'
    assert path.exists()


def test_a_restart_by_torchrun_goes_on_in_its_folder(tmp_path, monkeypatch):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'last.pth.tar').touch()
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    assert enter(tmp_path / 'run') == tmp_path / 'run'


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / '.recovery-0-3.pth.tar.part').write_text('half')
    assert [path.name for path in enter(tmp_path / 'run').iterdir()] == ['.lock']


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / 'file').touch()
    said = refusal(tmp_path / 'file' / 'run')
    assert said == f"cannot write to the output folder '{tmp_path}/file/run': Not a directory; choose --output."
    assert "cannot write to the output folder '/proc/run'" in refusal(Path('/proc/run'))


def test_without_a_name_it_is_the_date_the_model_and_the_image_size():
    assert default_name('a.b', 75).endswith('-a_b-75')


@pytest.mark.parametrize('kind', ['symbolic', 'hard', 'pipe'])
def test_a_lock_that_stands_for_another_file_is_refused_and_that_file_stays(tmp_path, kind):
    """Whoever may write to the folder could else have any file of the user's emptied."""
    victim, lock = tmp_path / 'victim', tmp_path / 'run' / '.lock'
    victim.write_text('precious')
    lock.parent.mkdir()
    {'symbolic': lambda: lock.symlink_to(victim), 'hard': lambda: lock.hardlink_to(victim),
     'pipe': lambda: os.mkfifo(lock)}[kind]()
    said = refusal(tmp_path / 'run')
    assert '.lock is a symbolic link: remove it' in said or '.lock is not a file of its own: remove it' in said
    assert victim.read_text() == 'precious'


def test_a_link_in_the_place_of_the_probe_is_not_followed(tmp_path):
    victim = tmp_path / 'victim'
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / '.writable').symlink_to(victim)
    enter(tmp_path / 'run')
    assert not victim.exists()

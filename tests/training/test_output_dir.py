"""The output folder: one run at a time, never two runs' files, and a lock that no killed run leaves behind."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from timm_npu_irv2.distributed import World
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.training.output_dir import output_dir

# A run that holds its folder and has forked a worker; both wait.
HOLDER = """
import argparse, os, sys, time
from timm_npu_irv2.training.distributed import World
from timm_npu_irv2.training.folder import output_dir
args = argparse.Namespace(output=sys.argv[1], experiment='run', model='m', resume='auto')
with output_dir(args, 75, World()):
    worker = os.fork()
    if worker:
        print(worker, flush=True)
    time.sleep(60)
"""


def options(output: Path, resume: str = '', experiment: str = 'run') -> argparse.Namespace:
    return argparse.Namespace(output=str(output), experiment=experiment, model='a.b', resume=resume)


def enter(args: argparse.Namespace, world: World | None = None) -> Path:
    with output_dir(args, 75, world or World()) as folder:
        return folder


def refusal(args: argparse.Namespace) -> str:
    with pytest.raises(UserError) as caught:
        enter(args)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_a_second_run_is_refused_until_the_first_is_killed_even_if_its_workers_live_on(tmp_path):
    process = subprocess.Popen([sys.executable, '-c', HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    try:
        said = refusal(options(tmp_path, 'auto'))
        assert f"another run writes to the output folder '{tmp_path}/run' (process {process.pid} on " in said
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert enter(options(tmp_path, 'auto')) == tmp_path / 'run'
        os.kill(worker, 0)  # it is there all the time
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize('name', ['last.pth.tar', 'recovery-0-3.pth.tar', 'checkpoint-2.pth.tar'])
def test_the_checkpoints_of_another_run_are_not_mixed_with_ours(tmp_path, name):
    path = tmp_path / 'run' / name
    path.parent.mkdir()
    path.touch()
    assert f'checkpoints of another run ({name})' in refusal(options(tmp_path))
    assert 'another run' in refusal(options(tmp_path, resume=str(tmp_path / 'other' / 'last.pth.tar')))
    for resume in 'auto', str(path):
        assert enter(options(tmp_path, resume)) == tmp_path / 'run'
    assert path.exists()


def test_a_restart_by_torchrun_goes_on_in_its_folder(tmp_path, monkeypatch):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'last.pth.tar').touch()
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    assert enter(options(tmp_path)) == tmp_path / 'run'


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / '.recovery-0-3.pth.tar.part').write_text('half')
    assert [path.name for path in enter(options(tmp_path)).iterdir()] == ['.lock']


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / 'file').touch()
    said = refusal(options(tmp_path / 'file'))
    assert said == f"cannot write to the output folder '{tmp_path}/file/run': Not a directory; choose --output."
    assert "cannot write to the output folder '/proc/run'" in refusal(options(Path('/proc')))


def test_only_rank_0_touches_the_folder(tmp_path):
    assert enter(options(tmp_path), World(rank=1, size=2)) == tmp_path / 'run'
    assert not (tmp_path / 'run').exists()


def test_without_a_name_it_is_the_date_the_model_and_the_image_size(tmp_path):
    assert enter(options(tmp_path, experiment='')).name.endswith('-a_b-75')

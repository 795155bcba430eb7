"""Files are whole or not there."""

import pytest

from timm_npu_irv2.serialization import atomic_path, atomic_write


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / 'file'
    atomic_write(path, 'old')
    monkeypatch.setattr('pathlib.Path.replace', lambda *_: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'):
        atomic_write(path, 'new')
    assert [entry.name for entry in tmp_path.iterdir()] == ['file'] and path.read_text() == 'old'


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    with atomic_path(tmp_path / 'file') as temporary:
        temporary.write_text('the name is the same each time')
    temporary.write_text('half of it')
    atomic_write(tmp_path / 'file', 'all of it')
    assert [entry.name for entry in tmp_path.iterdir()] == ['file'] and (tmp_path / 'file').read_text() == 'all of it'

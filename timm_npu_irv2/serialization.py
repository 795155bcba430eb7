"""Files: written whole or not at all, checked when they are read, and never executed.

Everything that this package reads from a checkpoint or a file of weights comes through :func:`read_checkpoint`, and
everything that it writes goes through :func:`atomic_file`.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import safetensors.torch
import torch
from torch import Tensor

from . import rules, schema
from .errors import CannotWrite, UserError, first_line

__all__ = ['EXTENSION', 'atomic_file', 'atomic_link', 'atomic_write', 'cache_folder', 'describe_obstacle',
           'load_weights', 'make_folder', 'open_record', 'open_regular', 'peek_checkpoint', 'read_checkpoint',
           'read_json', 'read_text', 'save_weights', 'stage_checkpoint', 'weights_checksum', 'write_checkpoint']

EXTENSION = '.pth.tar'
MOST_INFLATED = 20  # times the size of the file: torch stores without compression, and random numbers do not compress
LONGEST_TEXT = 64 * 2**20  # bytes of a text file

_SYMLINK_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC


# Writing


class _File(io.BufferedWriter):
    """A file that remembers why it could not be written, since torch replaces the reason by one of its own."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, remedy: str = '') -> Iterator[BinaryIO]:
    """Yield a binary file that takes the place of ``path`` at the end of the block, and is removed after an error.

    It is on the disk before it takes the place, so that not even a power failure leaves half of it. It is created under
    an unpredictable name, and no link is followed: nobody can prepare the place to have another file overwritten.

    Args:
        path: The file to write.
        remedy: A sentence for the end of the error message.

    Raises:
        CannotWrite: The disk is full, or the folder refuses the file. What was there before still is.
    """
    path = Path(path)
    if obstacle := describe_obstacle(path):
        raise CannotWrite(f'cannot write {path}: {obstacle}.')
    with _translate_write_errors(path, remedy):
        file, temporary = _create_temporary(path)
    try:
        with _translate_write_errors(path, remedy, file):
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not os.path.samestat(os.fstat(file.fileno()), os.lstat(temporary)):
                raise OSError(errno.EBUSY, 'another program replaced the temporary file')
            temporary.replace(path)
            with contextlib.suppress(OSError):  # some file systems cannot synchronise a folder, and need not
                _synchronize(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            file.close()


def atomic_write(path: str | os.PathLike, content: str | bytes) -> None:
    r"""Write ``content`` to ``path``: text in UTF-8, with other bytes of file names as \udcff and the like.

    Raises:
        CannotWrite: The disk is full, or the folder refuses the file. What was there before still is.
    """
    with atomic_file(path) as file:
        file.write(content.encode(errors='backslashreplace') if isinstance(content, str) else content)


def atomic_link(source: Path, target: Path) -> None:
    """Make ``target`` another name of ``source``, or a copy where the file system has no hard links.

    Raises:
        CannotWrite: The folder refuses the file. What was there before still is.
    """
    temporary = _temporary_path(target)
    try:
        os.link(source, temporary)
    except OSError:
        with source.open('rb') as content, atomic_file(target) as file:
            shutil.copyfileobj(content, file)
        return
    try:
        with _translate_write_errors(target):
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)  # it is still there if the target was a name of the source already


def describe_obstacle(path: str | os.PathLike) -> str:
    """Return why a path cannot be that of a file to write or read, such as /dev/null; '' if it can be."""
    with contextlib.suppress(OSError, ValueError):  # /dev/stdout and /dev/fd/1 lead to a file where output goes to one
        if any(str(place).startswith('/proc/') for place in (Path(path).parent.resolve(), Path(path).readlink())):
            return 'it is one of the streams of the program'
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir may raise
        return 'it is a folder'
    if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113 - likewise
        return 'it is a pipe or a device'
    return ''


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        CannotWrite: It cannot be made.
    """
    with _translate_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def open_record(path: Path) -> TextIO:
    """Open a text file that is added to, and is created unless it exists. No link is followed to another file.

    Raises:
        UserError: Something lies there that stands for another file, whose content would be lost.
        OSError: The folder refuses the file.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | _SYMLINK_SAFE, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f'{path} is a symbolic link: remove it, or choose another folder.') from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(descriptor)
        raise UserError(f'{path} is not a file of its own: remove it, or choose another folder.')
    return os.fdopen(descriptor, 'r+', encoding='utf-8', errors='replace')


def cache_folder() -> Path:
    """Return this package's folder for what was measured here: $TIMM_NPU_IRV2_CACHE, or one in the user's cache."""
    # A user without a home, as of `docker run --user`, keeps the ~, which is no folder of the working directory.
    users = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache').removeprefix('~')  # noqa: PTH111 - as above
    return Path(os.environ.get('TIMM_NPU_IRV2_CACHE') or Path(users) / 'timm_npu_irv2')


@contextlib.contextmanager
def _translate_write_errors(path: Path, remedy: str = '', file: _File | None = None) -> Iterator[None]:
    """Turn an OSError of the block, also one that a library has hidden, into the one message for it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = (file.error if file is not None else None) or error
        if not isinstance(cause, OSError):
            raise
        raise CannotWrite(f'cannot write {path}: {_reason(path, cause)}. {remedy}'.rstrip()) from error


def _reason(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        full = 'the disk is full' if error.errno == errno.ENOSPC else 'the quota of the disk is used up'
        return f'{full} (the one that holds {path.parent.absolute()}); free some space, or choose another folder'
    if error.errno == errno.ENOENT and not path.parent.is_dir():
        return f'there is no folder {path.parent}'
    return error.strerror or first_line(error)


def _temporary_path(path: Path) -> Path:
    """Return an unpredictable name beside ``path``; what a killed process left under such names is removed."""
    stem = f'.{path.name[:100]}.'
    with contextlib.suppress(OSError):
        for entry in os.scandir(path.parent):
            if entry.name.startswith(stem) and entry.name.endswith('.part') and entry.is_file(follow_symlinks=False):
                _remove_if_stale(Path(entry.path))
    return path.with_name(f'{stem}{secrets.token_hex(8)}.part')


def _remove_if_stale(path: Path) -> None:
    """Remove a temporary file unless a process that lives is writing it: that one holds its lock."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | _SYMLINK_SAFE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)


def _create_temporary(path: Path) -> tuple[_File, Path]:
    while True:
        temporary = _temporary_path(path)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | _SYMLINK_SAFE, 0o666)
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:  # else another writer of this file took it for stale before it was locked
            return _File(io.FileIO(descriptor, 'wb')), temporary
        os.close(descriptor)


def _synchronize(folder: Path) -> None:
    """Wait until the disk has the folder's list of names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Save ``state`` to ``path``: after a crash at any moment the file is the old one or the new one.

    Raises:
        CannotWrite: The disk is full, or the folder refuses the file. The old file is still there.
    """
    stage_checkpoint(state, path)()


def stage_checkpoint(state: dict[str, Any], path: Path) -> Callable[[], None]:
    """Write a file beside ``path``: the first half of :func:`write_checkpoint`, after which ``state`` may change.

    Returns:
        The second half, to be called from any thread: it waits for the disk and puts the file in its place. It raises
        what ``write_checkpoint`` raises.
    """
    with contextlib.ExitStack() as stack:
        torch.save(state, stack.enter_context(atomic_file(path, 'Earlier checkpoints are untouched.')))
        rest = stack.pop_all()
    return rest.close


def save_weights(state_dict: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Write a state dict as .safetensors, or else as a .pth with a ``state_dict`` key.

    Both hold checksums, which :func:`load_weights` compares. The tensors are written contiguously.

    Raises:
        CannotWrite: The disk is full, or the folder refuses the file. What was there before still is.
    """
    contiguous = {key: value.contiguous() for key, value in state_dict.items()}
    with atomic_file(path) as file:
        if Path(path).suffix == '.safetensors':
            metadata = {'format': 'pt', 'sha256': weights_checksum(contiguous)}
            file.write(safetensors.torch.save(contiguous, metadata))
        else:
            torch.save({'state_dict': contiguous}, file)


# Reading


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading. A pipe or a device, which would be waited for, is refused with an OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, 'it is a folder, a pipe or a device', os.fspath(path))
    return os.fdopen(descriptor, 'rb')


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Return what a file of weights or a checkpoint holds, on the CPU; nothing in it is executed.

    Args:
        path: A .safetensors file or a file of torch's, as timm, Cadene, the model zoo or this package writes it.

    Returns:
        The entries of the checkpoint. Whatever program wrote it, the weights are under ``state_dict`` and, if it has
        averaged ones, under ``state_dict_ema``, without the prefixes of DDP and torch.compile; ``args`` is a dict.

    Raises:
        UserError: The file is missing, torn, tampered with, holds no weights, would run code if it were unpickled, or
            is not as :mod:`.schema` describes.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'{path}: {describe_obstacle(path) or "no such file"}.')
    try:
        content = _read_safetensors(path) if path.suffix == '.safetensors' else _read_pickle(path)
    except UserError:
        raise
    except Exception as error:  # torn files fail in as many ways as there are parsers
        raise UserError(f'{path} cannot be read as a checkpoint: {first_line(error)}') from error
    return _checked(content, path)


def _checked(content: Any, path: Path) -> dict[str, Any]:
    """Return the entries of a checkpoint under timm's names, or raise UserError if it cannot be one."""
    if not isinstance(content, dict):
        raise UserError(f'{path} is not a checkpoint: it holds a {type(content).__name__}.')
    with rules.naming(path):
        rules.check_size(content, MOST_INFLATED * path.stat().st_size)
        content = _with_usual_names(content, path)
        schema.check_checkpoint(content)
    return content


def peek_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return the entries of a checkpoint of torch's, without reading its tensors or comparing its checksums.

    This is much faster than :func:`read_checkpoint`, for finding out which file to read. None means that the file is
    damaged, not as :mod:`.schema` describes, or none of torch's.
    """
    if not path.is_file():  # a pipe would have to be waited for
        return None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        return _checked(content, path)
    except Exception:  # torn files fail in as many ways as there are parsers
        return None


def load_weights(path: str | os.PathLike, use_ema: bool = False) -> dict[str, Tensor]:
    """Return the state dict in a .safetensors file or a file of torch's, on the CPU.

    Args:
        path: A file that :func:`read_checkpoint` reads.
        use_ema: Take the averaged weights where the file has both.

    Raises:
        UserError: As :func:`read_checkpoint`.
    """
    content = read_checkpoint(path)
    return content.get('state_dict_ema' if use_ema else 'state_dict') or content['state_dict']


def read_text(path: str | os.PathLike, what: str) -> str:
    """Return the content of a text file in UTF-8, without a byte order mark.

    Args:
        path: File.
        what: Option and file, for the message.

    Raises:
        UserError: The file is missing, too large, not in UTF-8, or a pipe or a device.
    """
    try:
        with open_regular(path) as file:
            content = file.read(LONGEST_TEXT + 1)
        if len(content) > LONGEST_TEXT:
            raise ValueError(f'it has more than {LONGEST_TEXT} bytes')
        return content.decode('utf-8-sig')
    except (OSError, ValueError) as error:
        raise UserError(f'{what}: {getattr(error, "strerror", None) or first_line(error)}.') from error


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds.

    Raises:
        UserError: The file is missing, too large, or not an object in JSON.
    """
    try:
        with open_regular(path) as file:
            content = json.loads(file.read(LONGEST_TEXT))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, 'strerror', None) or first_line(error)
        raise UserError(f'{path} cannot be read as JSON: {reason}') from error
    if not isinstance(content, dict):
        raise UserError(f'{path}: expected an object, not a {type(content).__name__}.')
    with rules.naming(path):
        rules.check_size(content, 0)
    return content


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, 'pt') as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        expected = (file.metadata() or {}).get('sha256')
    if expected not in (None, weights_checksum(tensors)):
        raise UserError(f'{path} is damaged: the checksum of the tensors is wrong. Use an earlier copy.')
    return tensors


def _read_pickle(path: Path) -> Any:
    with open_regular(path) as file:  # once: what is checked is what is read, even if another file takes the place
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                inflated, size = sum(entry.file_size for entry in archive.infolist()), os.fstat(file.fileno()).st_size
                if inflated > MOST_INFLATED * size:
                    raise UserError(f'{path} is refused: its {size} bytes would inflate to {inflated}.')
                if (corrupt := archive.testzip()) is not None:  # torch does not look at the checksums
                    raise UserError(f'{path} is damaged: the checksum of {corrupt} is wrong. Use an earlier '
                                    'checkpoint.')
        file.seek(0)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's own checkpoints hold one
            return torch.load(file, map_location='cpu', weights_only=True)


def _with_usual_names(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the entries of a checkpoint under timm's names for them."""
    weights = content.get('state_dict', content.get('model', content))
    average = content.get('state_dict_ema', content.get('model_ema'))
    rest = {} if weights is content else {key: value for key, value in content.items() if key not in _WEIGHTS}
    rest['state_dict'] = _clean(weights, path)
    if average is not None:
        rest['state_dict_ema'] = _clean(average, path)
    if isinstance(rest.get('args'), argparse.Namespace):
        rest['args'] = vars(rest['args'])
    return rest


_WEIGHTS = ('state_dict', 'state_dict_ema', 'model', 'model_ema')


def _clean(weights: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict, without the prefixes of DDP and torch.compile."""
    from timm.models import clean_state_dict  # noqa: PLC0415 - timm's import may be what imports this package

    names = weights if isinstance(weights, dict) else {}
    tensors = {key: value for key, value in names.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f'{path} holds no weights.')
    return clean_state_dict(tensors)


def weights_checksum(state_dict: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and bits; safetensors has no checksum of its own."""
    digest = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}\n'.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""Files: written whole or not at all, checked when they are read, and never executed."""

import argparse
import contextlib
import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .errors import CannotWrite, UserError, first_line

__all__ = ['EXTENSION', 'atomic_path', 'atomic_write', 'first_corrupt_entry', 'load_weights', 'read_checkpoint',
           'save_weights', 'stage_checkpoint', 'write_checkpoint']

EXTENSION = '.pth.tar'


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, whose file takes ``path``'s place at the end, and is removed after an error.

    The file is on the disk before it takes the place, so not even a power failure leaves half of it.

    Raises:
        OSError: The file can't be put there. What was there before still is.
    """
    # Always the same name, so that what a killed process left is overwritten and not kept beside the next.
    temporary = path.with_name(f'.{path.name}.part')
    try:
        yield temporary
        _synchronize(temporary)
        temporary.replace(path)
        with contextlib.suppress(OSError):  # some file systems can't do this to a folder, and need not
            _synchronize(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _synchronize(path: Path) -> None:
    """Wait until the disk has the file, or the folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write ``content``, text in UTF-8, to ``path``.

    Raises:
        CannotWrite: What was there before still is.
    """
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise CannotWrite(f'cannot write {path}: {error.strerror or error}.') from error


def first_corrupt_entry(path: Path) -> str | None:
    """The first entry of a zip file, such as torch writes, whose checksum is wrong, at which torch does not look.

    None if all are right, or the file is no zip file.

    Raises:
        Exception: Whatever else zipfile raises for a torn file.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Save ``state`` to ``path``: after a crash at any moment the file is the old one or the new one.

    Raises:
        CannotWrite: The disk is full, or the folder cannot be written to. The old file is still there.
    """
    stage_checkpoint(state, path)()


def stage_checkpoint(state: dict[str, Any], path: Path) -> Callable[[], None]:
    """The first half of :func:`write_checkpoint`, after which ``state`` may change: writes a file beside ``path``.

    Returns:
        The second half, to be called from any thread: waits for the disk and puts the file in its place. It raises
        what ``write_checkpoint`` raises.
    """
    with contextlib.ExitStack() as stack, _cannot_write(path):
        torch.save(state, stack.enter_context(atomic_path(path)))
        rest = stack.pop_all()

    def put_in_place() -> None:
        with _cannot_write(path):
            rest.close()

    return put_in_place


@contextlib.contextmanager
def _cannot_write(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save turns some OSErrors into RuntimeErrors
        reason = getattr(error, 'strerror', None) or first_line(error)
        raise CannotWrite(f'cannot save {path}: {reason}. Earlier checkpoints are untouched.') from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint file, on the CPU.

    Raises:
        UserError: The file is missing, torn, tampered with, or would run code if it were unpickled.
    """
    try:
        if (damaged := first_corrupt_entry(path)) is not None:
            raise UserError(f'{path} is damaged: the checksum of {damaged} is wrong. Take an earlier checkpoint.')
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's own checkpoints hold one
            state = torch.load(path, map_location='cpu', weights_only=True)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f'{path}: no such checkpoint.') from error
    except Exception as error:  # torn files fail in as many ways as there are parsers
        raise UserError(f'{path} is not a checkpoint that can be read: {first_line(error)}') from error
    if not isinstance(state, dict):
        raise UserError(f'{path} is not a checkpoint: it holds a {type(state).__name__}.')
    return state


def load_weights(path: str | os.PathLike, use_ema: bool = False) -> dict[str, Tensor]:
    """The state dict in a .safetensors or .pth file, out of its wrappers; nothing in the file is executed.

    Args:
        path: A file as timm, Cadene, the model zoo or this package writes it.
        use_ema: Take the averaged weights where the file has both.

    Raises:
        UserError: No such file, or a file that is not a checkpoint.
    """
    from timm.models import load_state_dict  # noqa: PLC0415 - the rest of this module knows only tensors

    if not Path(path).is_file():
        raise UserError(f'{path}: no such file.')
    try:
        damaged = _damage(Path(path))
        state_dict = load_state_dict(str(path), use_ema=use_ema)
    except Exception as error:  # zip, pickle, safetensors and struct errors all mean the same to the reader
        raise UserError(f"{path} can't be read as weights: {first_line(error)}") from error
    if damaged is not None:
        raise UserError(f'{path} is damaged: the checksum of {damaged} is wrong.')
    tensors = {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f'{path} holds no weights.')
    return tensors


def _damage(path: Path) -> str | None:
    """What in a file has another checksum than was written with it; None if nothing, or if it has no checksums."""
    if path.suffix != '.safetensors':
        return first_corrupt_entry(path)
    with safetensors.safe_open(path, 'pt') as file:
        expected = (file.metadata() or {}).get('sha256')
        if expected is None:
            return None
        found = _sha256({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    return None if found == expected else 'the tensors'


def _sha256(state_dict: Mapping[str, Tensor]) -> str:
    """A checksum of names, types, shapes and every bit; the format has none of its own."""
    digest = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}\n'.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_weights(state_dict: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Write a state dict as .safetensors, or else as a .pth with a ``state_dict`` key; all of it, or nothing.

    Both hold checksums, which :func:`load_weights` compares.

    Raises:
        CannotWrite: There is no such folder, or the disk is full.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise CannotWrite(f"{path} can't be written: there is no folder {path.parent}.")
    try:
        with atomic_path(path) as temporary:
            if path.suffix == '.safetensors':
                contiguous = {key: value.contiguous() for key, value in state_dict.items()}
                metadata = {'format': 'pt', 'sha256': _sha256(contiguous)}
                safetensors.torch.save_file(contiguous, temporary, metadata=metadata)
            else:
                torch.save({'state_dict': dict(state_dict)}, temporary)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch's and safetensors' for a full disk
        reason = getattr(error, 'strerror', None) or first_line(error)
        raise CannotWrite(f"{path} can't be written: {reason}.") from error

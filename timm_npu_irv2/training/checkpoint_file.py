"""A checkpoint file: written whole or not at all, checked when it is read, and never executed."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import CannotWrite, UserError, first_line
from ..files import damaged_entry, replacing

__all__ = ['EXTENSION', 'read', 'write', 'write_aside']

EXTENSION = '.pth.tar'


def write(state: dict[str, Any], path: Path) -> None:
    """Save ``state`` to ``path``: after a crash at any moment the file is the old one or the new one.

    Raises:
        CannotWrite: The disk is full, or the folder cannot be written to. The old file is still there.
    """
    write_aside(state, path)()


def write_aside(state: dict[str, Any], path: Path) -> Callable[[], None]:
    """The first half of :func:`write`, after which ``state`` may change: writes a file beside ``path``.

    Returns:
        The second half, to be called from any thread: waits for the disk and puts the file in its place. It raises
        what ``write`` raises.
    """
    with contextlib.ExitStack() as stack, _cannot_write(path):
        torch.save(state, stack.enter_context(replacing(path)))
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


def read(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint file, on the CPU.

    Raises:
        UserError: The file is missing, torn, tampered with, or would run code if it were unpickled.
    """
    try:
        if (damaged := damaged_entry(path)) is not None:
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

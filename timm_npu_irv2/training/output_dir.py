"""The output folder of a run: locked by one run at a time, never with the files of two runs in it."""

import contextlib
import fcntl
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from timm.models import safe_model_name

from ..distributed import World, agree, restarted
from ..errors import UserError
from ..serialization import open_record
from .saver import checkpoints_in

__all__ = ['default_name', 'output_dir']

_logger = logging.getLogger(__name__)


def default_name(model: str, image_size: int) -> str:
    """Return the name of a run that was given none: date, model and image size."""
    return '-'.join((datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(model), str(image_size)))


@contextlib.contextmanager
def output_dir(folder: Path, world: World, *, resume: str = '') -> Iterator[None]:
    """Create ``folder`` and lock it while the block runs. Rank 0 does this, the others do nothing.

    Args:
        folder: Output folder of the run.
        world: This process among all.
        resume: Checkpoint that the run continues from, 'auto', or '' for a new run.

    Raises:
        UserError: It cannot be created or written to, another run has locked it, or it holds the checkpoints of
            another run.
    """
    with contextlib.ExitStack() as stack:
        agree(lambda: _enter(folder, resume, stack), world)
        yield


def _enter(folder: Path, resume: str, stack: contextlib.ExitStack) -> None:
    """Lock a folder until the end of ``stack``, check that it is this run's, and remove unfinished files."""
    stack.enter_context(_locked(folder))
    continues_here = resume == 'auto' or restarted() or (resume and Path(resume).resolve().parent == folder.resolve())
    if not continues_here and (found := checkpoints_in(folder)):
        raise UserError(f"the output folder '{folder}' has the checkpoints of another run ({found[0].name}): "
                        'continue it with --resume auto, or choose another --experiment.')
    for leftover in folder.glob('.*.part'):  # of a process that was killed while it wrote
        with contextlib.suppress(OSError):
            leftover.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however that ends.

    It is a POSIX lock, which forked workers do not inherit: those may outlive a killed run by seconds.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # the lock may be there, and writable, where no file can be created
            pass
        file = open_record(folder / '.lock')
    except OSError as error:
        raise UserError(f"cannot write to the output folder '{folder}': {error.strerror}; choose --output.") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise UserError(f"another run writes to the output folder '{folder}' ({file.read().strip()}): choose "
                            'another --experiment, or end that run.') from error
        except OSError as error:
            _logger.warning(f"The output folder's file system has no locks ({error.strerror}): see to it that no other "
                            'run writes to it.')
        else:
            file.seek(0)
            file.truncate()
            file.write(f'process {os.getpid()} on {socket.gethostname()}')
            file.flush()
        yield

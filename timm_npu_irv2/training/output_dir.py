"""The output folder of a run: made if need be, held by one run at a time, never with the files of two runs in it."""

import contextlib
import fcntl
import logging
import os
import socket
from argparse import Namespace
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from timm.models import safe_model_name

from ..distributed import World, restarted
from ..errors import UserError
from .saver import checkpoints_in

__all__ = ['output_dir']

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def output_dir(args: Namespace, image_size: int, world: World) -> Iterator[Path]:
    """<--output>/<--experiment>, which rank 0 makes and holds while the block runs.

    Raises:
        UserError: It cannot be made or written to, another run holds it, or it has the checkpoints of another run.
    """
    name = args.experiment or '-'.join(
        (datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(image_size)))
    folder = Path(args.output or './output/train') / name
    if not world.is_primary:
        yield folder
        return
    with _held(folder):
        _check_no_other_run(folder, args)
        for leftover in folder.glob('.*.part'):  # of a process that was killed while it wrote
            leftover.unlink()
        yield folder


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however that ends.

    It is one of POSIX's, which forked workers do not inherit: those may outlive a killed run by seconds.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / '.writable'
        probe.touch()
        probe.unlink()
        file = (folder / '.lock').open('a+')
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
            file.truncate(0)
            file.write(f'process {os.getpid()} on {socket.gethostname()}')
            file.flush()
        yield


def _check_no_other_run(folder: Path, args: Namespace) -> None:
    goes_on_here = args.resume == 'auto' or restarted() or (
        args.resume and Path(args.resume).resolve().parent == folder.resolve())
    if not goes_on_here and (found := checkpoints_in(folder)):
        raise UserError(f"the output folder '{folder}' has the checkpoints of another run ({found[0].name}): go on "
                        'with it by --resume auto, or choose another --experiment.')

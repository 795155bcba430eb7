"""Start and end of a script: its log, its exit code, and one line for an error that the user can correct."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..distributed import World, shutdown
from ..errors import Stopped, UserError
from ..escaping import printable

__all__ = ['leave_at_end', 'run_script', 'start_log']


class _OneLine(logging.Formatter):
    """A format in which names of files and classes can neither begin a line nor control the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is logging's
        return printable(super().formatMessage(record))


def start_log(is_primary: bool = True) -> None:
    """Log plain lines to stderr: all of them in the primary process, warnings in the others."""
    logging.basicConfig(stream=sys.stderr, force=True)
    logging.getLogger().handlers[0].setFormatter(_OneLine('%(message)s'))
    logging.getLogger().setLevel(logging.INFO if is_primary else logging.WARNING)
    logging.captureWarnings(not is_primary)
    # torch says this for each loader, and again when it starts.
    warnings.filterwarnings('once' if is_primary else 'ignore', message='This DataLoader will create')


def run_script(name: str, main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run ``main`` and return the exit code: its own, 2 after a UserError, 128 + number after a signal."""
    try:
        return main(argv)
    except UserError as error:
        _report(name, error)
        return 2
    except Stopped as stopped:
        logging.getLogger(name).info(stopped)
        return 128 + stopped.number
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def leave_at_end(world: World, name: str) -> Iterator[None]:
    """Leave the other processes at the end of the block.

    An error of this one is reported before that, or another one might first report that it lost this one.

    Args:
        world: This process among all.
        name: Name of the script.
    """
    try:
        yield
    except UserError as error:
        _report(name, error)
        raise
    finally:
        shutdown(world)


def _report(name: str, error: UserError) -> None:
    """Print the line of an error, once, and from one of several processes."""
    if not error.is_reported and _is_first_report():
        print(printable(f'{name}: error: {error}'), file=sys.stderr, flush=True)
    error.is_reported = True


def _is_first_report() -> bool:
    """Return True in the first of several processes that asks: most errors occur in all of them."""
    file = os.environ.get('TORCHELASTIC_ERROR_FILE')  # <a new folder>/attempt_<number>/<rank>/error.json
    if not file:
        return True
    try:
        os.close(os.open(Path(file).parents[1] / 'reported', os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True

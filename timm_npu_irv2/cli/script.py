"""Start and end of a script: its log, its exit code, and one line for an error that the user can correct."""

import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import UserError
from ..escaping import printable
from ..program import open_streams, report, run_script, translate_system_errors
from .parser import CommandLine, Subcommands, config_file
from .pretrained import check_pretrained

if TYPE_CHECKING:
    from ..distributed import World

__all__ = ['check_command_line', 'leave_at_end', 'run_script', 'start_log']


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


def check_command_line(command_line: CommandLine | Subcommands, argv: Sequence[str], name: str = '') -> None:
    """Answer --help, report a mistake in the options or published weights that cannot be had; each ends the program.

    A script calls this before it imports torch, which takes seconds, so this module does not import torch. Ctrl-C ends
    the program without a traceback until :func:`run_script` takes over.

    Args:
        command_line: Command line of the script.
        argv: Words after the script's name.
        name: Name of the program in messages, by default that of the script.
    """
    open_streams()
    try:
        config = config_file(argv)
        if config is None or config.is_file() or not config.exists():  # a pipe can be read only once
            args = command_line.parse(argv)
            if 'RANK' not in os.environ:  # one of several processes would only repeat what the launcher has done
                check_pretrained(args)
    except UserError as error:
        report(name or command_line.prog, error)
        sys.exit(2)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def leave_at_end(world: 'World', name: str) -> Iterator[None]:
    """Leave the other processes at the end of the block.

    An error of this one is reported before that, or another one might first report that it lost this one.

    Args:
        world: This process among all.
        name: Name of the script.
    """
    try:
        with translate_system_errors():
            yield
    except UserError as error:
        report(name, error)
        raise
    finally:
        from ..distributed import shutdown  # noqa: PLC0415 - loads torch, see check_command_line

        shutdown(world)

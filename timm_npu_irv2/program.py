"""Start and end of a program: its standard streams, its signals, its exit code, and one line for an error."""

import contextlib
import errno
import io
import logging
import os
import select
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from .errors import Stopped, UserError, first_line
from .escaping import printable

__all__ = ['NOTICES', 'open_streams', 'report', 'run_script', 'translate_system_errors']

# Signals that end a program unless they are ignored (as SIGHUP is with nohup): a terminal is closed, or a cluster gives
# notice before it ends a job (Slurm's --signal=USR1@60, Grid Engine's -notify).
NOTICES = signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2

_REMEDIES = {
    errno.EMFILE: 'raise the limit of open files with `ulimit -n`, or use fewer --workers',
    errno.ENFILE: 'the system has too many open files: end other programs',
    errno.ENOSPC: 'free some space, or choose another folder',
    errno.EDQUOT: 'free some space, or choose another folder',
    errno.EACCES: 'check the permissions',
    errno.EPERM: 'check the permissions',
    errno.EROFS: 'choose a folder that can be written to',
}


def open_streams() -> None:
    """Open the standard streams that the process was started without, and let none fail for a letter it cannot write.

    Otherwise the next file to be opened, a checkpoint perhaps, would get the number of a stream, and with it what
    libraries print.
    """
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        try:
            os.fstat(number)
        except OSError:
            _replace_by_nothing(number)
        if getattr(sys, name) is None:
            mode = 'w' if number else 'r'
            setattr(sys, name, open(number, mode, encoding='utf-8', closefd=False))  # noqa: SIM115 - for the whole program
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper) and stream.errors == 'strict':
            stream.reconfigure(errors='backslashreplace')


def run_script(name: str, main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run ``main`` and return the exit code: its own, 2 after an error of the user or the system, 128 + n for signal n.

    The signals are Ctrl-C, SIGTERM, those of ``NOTICES``, and SIGPIPE where nobody reads the output any more.
    """
    open_streams()
    try:
        with _interruptible(), translate_system_errors():
            code = main(argv)
            sys.stdout.flush()  # at the exit of the interpreter, an error of it could not be told
        return code
    except UserError as error:
        report(name, error)
        return 2
    except Stopped as stopped:
        logging.getLogger(name).info(stopped)
        return 128 + stopped.number
    except KeyboardInterrupt as interrupt:
        return 128 + next(iter(interrupt.args), signal.SIGINT)
    except BrokenPipeError:
        if not _is_without_reader(1):
            raise
        return 128 + signal.SIGPIPE
    finally:
        for number, stream in enumerate((sys.stdout, sys.stderr), 1):
            try:
                stream.flush()
            except OSError:
                _replace_by_nothing(number)  # the interpreter would end with code 120 for what it cannot write


@contextlib.contextmanager
def translate_system_errors() -> Iterator[None]:
    """Turn an error of the system, such as a file that may not be read, into one line with what to do.

    Raises:
        UserError: The system refused something, but for output that nobody reads any more.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        # Without a number it is not the system's: a library raised it for reasons of its own.
        if error.errno is None or (isinstance(error, BrokenPipeError) and _is_without_reader(1)):
            raise
        raise UserError(_describe(error)) from error


def report(name: str, error: UserError) -> None:
    """Print the line of an error, once, and from one of several processes."""
    if not error.is_reported and _is_first_report(error):
        with contextlib.suppress(OSError):  # nobody reads it
            print(printable(f'{name}: error: {error}'), file=sys.stderr, flush=True)
    error.is_reported = True


def _describe(error: OSError) -> str:
    """Return an error of the system in one line, with what to do."""
    places = ' and '.join(os.fsdecode(place) for place in (error.filename, error.filename2)
                          if isinstance(place, str | bytes))
    text = f'{places}: {error.strerror}' if places else error.strerror or first_line(error)
    remedy = _REMEDIES.get(error.errno or 0)
    if not places and error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = ('free some space where the output goes and in the folder for temporary files, '
                  f'{tempfile.gettempdir()} (TMPDIR chooses another one)')
    return f'{text}: {remedy}.' if remedy else f'{text}.'


def _is_first_report(error: UserError) -> bool:
    """Return True in the first of several processes that asks: most errors occur in all of them.

    Without torchrun, it is True in every process that has found the error itself.
    """
    file = os.environ.get('TORCHELASTIC_ERROR_FILE')  # <a new folder>/attempt_<number>/<rank>/error.json
    if not file:
        return not error.is_echo
    try:
        os.close(os.open(Path(file).parents[1] / 'reported', os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and ``NOTICES`` raise an exception in the block, so that nothing temporary is left behind.

    A second signal of the same kind ends the program at once. Processes of a launcher, which may wait for each other in
    a library when SIGTERM comes, and signals that are ignored (nohup) stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # of check_command_line
        signal.signal(signal.SIGINT, signal.default_int_handler)
    numbers = () if 'LOCAL_RANK' in os.environ else (signal.SIGTERM, *NOTICES)
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:  # a child of a fork
            os.kill(os.getpid(), number)
        raise KeyboardInterrupt(number)

    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _is_without_reader(number: int) -> bool:
    """Return True if a file descriptor is a pipe or a socket that nobody reads any more."""
    poll = select.poll()
    poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _replace_by_nothing(number: int) -> None:
    """Let a file descriptor be that of a file that swallows everything and holds nothing."""
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing == number:
        os.set_inheritable(number, True)
    else:
        os.dup2(nothing, number)
        os.close(nothing)

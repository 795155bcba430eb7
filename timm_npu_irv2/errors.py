"""Errors that a user can cause. Their text is one line: what was wrong, and what to do."""

import re
import signal

__all__ = ['CannotWrite', 'DeviceUnavailable', 'Stopped', 'UnknownDialect', 'UserError', 'first_line', 'one_line',
           'text_of']


class UserError(Exception):
    """An error that the user can put right. Scripts print its text without a traceback, and exit with 2.

    Attributes:
        is_reported: True once its text has been printed.
        is_echo: True for an error of another process, which reports it.
    """

    is_reported = False
    is_echo = False

    def __str__(self) -> str:
        """Return the text; of a word that is far too long for a line only the two ends."""
        return re.sub(r'\S{400,}', lambda word: f'{word[0][:200]}…{word[0][-100:]}', super().__str__())

    @classmethod
    def echo(cls, text: str) -> 'UserError':
        """Return an error that another process reports."""
        error = cls(text)
        error.is_echo = True
        return error


class DeviceUnavailable(UserError):
    """A device that is not there, or whose software is incomplete."""


class CannotWrite(UserError, OSError):
    """A file that cannot be written: the disk is full, or the folder refuses it.

    :mod:`.serialization` raises it, and makes its text.
    """


class UnknownDialect(UserError, RuntimeError):
    """A state dict that belongs to no known dialect of Inception-ResNet-v2.

    It is a RuntimeError too, since that is what ``Module.load_state_dict`` raises for weights that do not fit.
    """


class Stopped(Exception):
    """A request to stop, which all processes have followed after saving their state.

    Attributes:
        number: The number of the signal.
    """

    def __init__(self, number: int, checkpoint: str) -> None:
        super().__init__(f'stopped by {signal.Signals(number).name}; --resume {checkpoint} goes on from there.')
        self.number = number


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, to be quoted in a UserError."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException) -> str:
    """Return another library's whole message in one line of at most 300 characters, to be quoted in a UserError."""
    return ' '.join((str(error) or type(error).__name__).split())[:300]


def text_of(error: BaseException) -> str:
    """Return the message of an error in one line: that of a UserError as it is."""
    return str(error) if isinstance(error, UserError) else one_line(error)

"""The errors a user can cause. Their text is one line: what was wrong, and what to do."""

import signal

__all__ = ['CannotWrite', 'DeviceUnavailable', 'Stopped', 'UnknownDialect', 'UserError', 'first_line']


class UserError(Exception):
    """Something the user can put right. Scripts print its text, without a traceback, and exit with 2."""


class DeviceUnavailable(UserError):
    """The device asked for is not there, or its software is incomplete."""


class CannotWrite(UserError, OSError):
    """A file can't be put where it belongs: the disk is full, or the folder refuses it."""


class UnknownDialect(UserError, RuntimeError):
    """A state dict that belongs to no known dialect of Inception-ResNet-v2.

    It is a RuntimeError too, since that is what ``Module.load_state_dict`` raises for weights that do not fit.
    """


class Stopped(Exception):
    """All processes were asked to stop, and have saved what they had.

    Attributes:
        number: The number of the signal.
    """

    def __init__(self, number: int, checkpoint: str) -> None:
        super().__init__(f'stopped by {signal.Signals(number).name}; --resume {checkpoint} goes on from there.')
        self.number = number


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough to be part of a UserError."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]

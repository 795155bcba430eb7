"""An argument parser whose errors are one line. It needs nothing but Python, so ``doctor`` can use it."""

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import NoReturn

from ..errors import UserError

__all__ = ['Parser', 'suggestion']


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError with a suggestion instead of printing all options and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError.

        Args:
            message: Message of argparse.
        """
        unknown = re.match(r'unrecognized arguments: (--[^\s=]+)', message)
        if unknown:
            message = f'unknown option {unknown[1]}{suggestion(unknown[1], self._option_string_actions)}'
        message = message.removeprefix('argument ')
        raise UserError(message if len(message) <= 500 else f'{message[:500]} …')


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown option: the closest known one, or where all of them are."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f'. Did you mean {close[0]}?' if close else '; --help lists all options.'

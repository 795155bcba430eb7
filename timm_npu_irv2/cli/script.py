"""Start and end of a script: its log, its exit code, and one line for an error that the user can correct."""

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence

from ..errors import Stopped, UserError

__all__ = ['run_script', 'start_log']


def start_log(is_primary: bool = True) -> None:
    """Log plain lines to stderr: all of them in the primary process, warnings in the others."""
    logging.basicConfig(format='%(message)s', stream=sys.stderr, force=True)
    logging.getLogger().setLevel(logging.INFO if is_primary else logging.WARNING)
    logging.captureWarnings(not is_primary)


def run_script(name: str, main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run ``main`` and return the exit code: its own, 2 after a UserError, 128 + number after a signal."""
    try:
        return main(argv)
    except UserError as error:
        if os.environ.get('RANK', '0') != '0':
            time.sleep(10)  # most errors occur in all processes: rank 0 reports first, and torchrun ends the others
        print(f'{name}: error: {error}', file=sys.stderr, flush=True)
        return 2
    except Stopped as stopped:
        logging.getLogger(name).info(stopped)
        return 128 + stopped.number
    except KeyboardInterrupt:
        return 130

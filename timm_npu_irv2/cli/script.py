"""How a script of ``train_scripts/`` starts and ends: the log, the exit code, one line for an error of the user's."""

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence

from ..distributed import World
from ..errors import Stopped, UserError

__all__ = ['run_script', 'start_log']


def start_log(world: World) -> None:
    """Lines without decoration on stderr: all of them from rank 0, warnings from the others."""
    logging.basicConfig(format='%(message)s', stream=sys.stderr, force=True)
    logging.getLogger().setLevel(logging.INFO if world.is_primary else logging.WARNING)
    logging.captureWarnings(not world.is_primary)


def run_script(name: str, main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run ``main`` and return the exit code: its own, 2 for a UserError, 128 + signal where a signal stopped it."""
    try:
        return main(argv)
    except UserError as error:
        if os.environ.get('RANK', '0') != '0':
            time.sleep(10)  # all processes meet most errors: rank 0 has the first word, and torchrun ends the others
        print(f'{name}: error: {error}', file=sys.stderr, flush=True)
        return 2
    except Stopped as stopped:
        logging.getLogger(name).info(stopped)
        return 128 + stopped.number
    except KeyboardInterrupt:
        return 130

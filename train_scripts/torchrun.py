#!/usr/bin/env python3
"""Start processes as torchrun does, with its options, and end with their exit code instead of a traceback.

Usage: python train_scripts/torchrun.py [options of torchrun] SCRIPT [options of the script]

Without --rdzv-backend, the processes of this machine meet where no other machine can reach them. The options of a
rendezvous stand first: --rdzv-backend c10d (torchrun's, for machines that leave and join) or machines (a fixed number).
"""

import logging
import os
import sys
from collections.abc import Sequence

os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'FATAL')  # torch reads it when it is loaded: no stack traces of sockets

# isort: split
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from timm_npu_irv2.cli.script import run_script
from timm_npu_irv2.rendezvous import run_torchrun


def main(argv: Sequence[str]) -> int:
    """Run the processes and return the exit code of the first that failed."""
    del os.environ['TORCH_CPP_LOG_LEVEL']  # the processes are not concerned
    logging.disable(logging.ERROR)  # the processes say themselves what happened
    try:
        run_torchrun(argv)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == '__main__':
    sys.exit(run_script('torchrun.py', main, sys.argv[1:]))

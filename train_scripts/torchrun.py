#!/usr/bin/env python3
"""Start processes as torchrun does, with its options, and end with their exit code instead of a traceback.

Usage: python train_scripts/torchrun.py [options of torchrun] SCRIPT [options of the script]

Without --nnodes as the first option, the processes of this machine meet where no other machine can reach them.
"""

import logging
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from timm_npu_irv2.distributed import run_torchrun


def main(argv: Sequence[str]) -> int:
    """Run the processes and return the exit code of the first that failed."""
    logging.disable(logging.ERROR)  # the processes say themselves what happened
    try:
        if argv[:1] == ['--nnodes']:
            run.main(list(argv))
        else:
            run_torchrun(argv)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

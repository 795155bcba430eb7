"""A module for --device-modules that writes down which samples make which batch, and kills its process at one of them.

Lines 'epoch batch index index …' go to $SAMPLE_LOG-<rank>. $KILL_AT is 'epoch batch'. $KILL_RANK is the rank that is
killed, otherwise all are. What torchrun has started again is not killed again.
"""

import os
import signal
from pathlib import Path

from timm_npu_irv2.data.samplers import TrainBatchSampler

_iterate = TrainBatchSampler.__iter__
RANK = os.environ.get('RANK', '0')
KILLED = os.environ.get('KILL_RANK', RANK) == RANK and os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0'
KILL_AT = os.environ.get('KILL_AT', '') if KILLED else ''
LOG = Path(f"{os.environ['SAMPLE_LOG']}-{RANK}")


def iterate_and_write(self):
    for number, batch in enumerate(_iterate(self), self.start_batch):
        with LOG.open('a') as log:
            print(batch.epoch, number, *(sample.index for sample in batch.samples), file=log)
        if f'{batch.epoch} {number}' == KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


TrainBatchSampler.__iter__ = iterate_and_write

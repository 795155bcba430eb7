"""A module for --device-modules that kills a worker at its first batch of epoch 1."""

import os
import signal

from torch.utils.data import get_worker_info

from timm_npu_irv2.data.worker import BatchDataset

_getitem = BatchDataset.__getitem__


def die_in_epoch_1(self, batch):
    if get_worker_info() is not None and batch.epoch == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return _getitem(self, batch)


BatchDataset.__getitem__ = die_in_epoch_1

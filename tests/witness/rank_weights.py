"""For --device-modules: after each epoch every process writes {weight: digest}, since train.py saves rank 0's only, and
at its end the names of its threads."""

import atexit
import hashlib
import json
import os
from pathlib import Path

from timm_npu_irv2.training import setup

_share_statistics = setup.distribute_batch_norm


def share_statistics_and_tell(task, args, world):
    _share_statistics(task, args, world)
    state = task.get_trainable_module().state_dict()
    digests = {name: hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest() for name, tensor in state.items()}
    Path(f'rank-{world.rank}.json').write_text(json.dumps(digests))


setup.distribute_batch_norm = share_statistics_and_tell


@atexit.register
def tell_threads():
    names = [path.read_text() for path in Path('/proc/self/task').glob('*/comm')]
    Path(f'threads-{os.environ["RANK"]}.txt').write_text(''.join(names))

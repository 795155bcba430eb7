"""killed_in_shard.py COUNT inference.py OPTIONS: a process is killed while it writes a shard after COUNT of them."""

import os
import runpy
import signal
import sys
from pathlib import Path

from timm_npu_irv2.cli import shards
from timm_npu_irv2.serialization import atomic_file

COUNT = int(sys.argv[1])
_write = shards.atomic_write


def write_or_die(path, content):
    if path.name.startswith('part-') and len(list(path.parent.glob('part-*'))) >= COUNT:
        with atomic_file(path) as file:
            file.write(b'half')
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    _write(path, content)


shards.atomic_write = write_or_die
sys.argv = sys.argv[2:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name='__main__')

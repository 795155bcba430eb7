"""Runs of train.py, each in a process of its own with a limit of time, without the seconds of loading torch.

A server process loads everything once and forks for each run. It has no other threads, which a fork would lose.
"""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Outcome(NamedTuple):
    """Exit code (negative for a signal, None after the time limit), and what the run wrote to the terminal."""

    code: int | None
    output: str


class Server:
    """A process that forks runs."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'tests.fuzz.runs'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=ROOT, env={**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'})

    def run(self, words: Sequence[str], folder: Path, limit: float) -> Outcome:
        """Run train.py in a folder, for at most ``limit`` seconds."""
        request = {'words': list(words), 'folder': str(folder), 'limit': limit}
        self._process.stdin.write(json.dumps(request) + '\n')
        self._process.stdin.flush()
        return Outcome(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@contextlib.contextmanager
def server() -> Iterator[Server]:
    running = Server()
    try:
        yield running
    finally:
        running.close()


def _serve() -> None:
    sys.path.insert(0, str(ROOT / 'train_scripts'))
    import torch  # noqa: PLC0415 - only the server needs it
    import train  # noqa: PLC0415

    from timm_npu_irv2.cli.script import run_script  # noqa: PLC0415

    torch.set_num_threads(1)
    run_script('train.py', train.parse_args, ['--aa', 'v0', '--torchcompile', 'eager'])  # loads what is loaded late
    gc.freeze()
    replies = os.fdopen(os.dup(1), 'w')
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as log:
            child = os.fork()
            if child == 0:
                os.setsid()
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.chdir(request['folder'])
                sys.exit(run_script('train.py', train.main, request['words']))
            code = _wait(child, request['limit'])
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            log.seek(0)
            print(json.dumps([code, log.read()[-20_000:].decode(errors='replace')]), file=replies, flush=True)


def _wait(child: int, limit: float) -> int | None:
    """Return the exit code; None for a process that had to be killed since its time was over."""
    deadline = time.monotonic() + limit
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.005)


if __name__ == '__main__':
    _serve()

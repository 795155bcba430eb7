"""The parent's side of a worker of ``benchmark.py tune``."""

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from ..tuning import environment_of
from .tune_worker import Job

__all__ = ['Worker', 'WorkerFailed']

_ERROR = re.compile(r'[\w.]*(Error|Exception|Exhausted|Unavailable|Interrupt)\b')  # at the end of a traceback
_OWN_VARIABLES = ('TIMM_NPU_IRV2_VARIANTS', 'TIMM_NPU_IRV2_KERNELS')  # the job chooses instead


class WorkerFailed(Exception):
    """A worker that ended, or that did not answer in time.

    Attributes:
        worker: The worker.
    """

    def __init__(self, reason: str, worker: 'Worker') -> None:
        super().__init__(reason)
        self.worker = worker


class Worker:
    """A process that runs a job, see :mod:`.tune_worker`.

    Args:
        job: The job.
    """

    def __init__(self, job: Job) -> None:
        self._errors = tempfile.TemporaryFile('w+')  # noqa: SIM115 - close() closes it
        environment = {name: value for name, value in os.environ.items() if name not in _OWN_VARIABLES}
        # Answers have a pipe of their own, since libraries print to stdout while they are imported.
        self._answers, write_end = os.pipe()
        # A session of its own: Ctrl-C is for the parent, which ends its workers.
        self._process: Any = subprocess.Popen(
            [sys.executable, '-m', f'{__package__}.tune_worker', str(write_end)], pass_fds=(write_end,),
            env={**environment, **environment_of(job.settings)}, stdin=subprocess.PIPE, stdout=self._errors,
            stderr=self._errors, start_new_session=True)
        os.close(write_end)
        self._received = b''
        try:
            self._send(job.to_json())
        except BaseException:
            self.close()
            raise

    def start(self, deadline: float) -> tuple[float, str]:
        """Return the median error against the reference, and what is wrong, when the worker has computed it."""
        answer = self._answer(deadline)
        return float(answer['error']), str(answer['wrong'])

    def time(self, steps: int, deadline: float) -> float:
        """Return the seconds of a number of steps."""
        self._send(str(steps))
        return float(self._answer(deadline)['seconds'])

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._errors.close()
        os.close(self._answers)

    def _send(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # why it ended, the answer tells
            self._process.stdin.write(line.encode() + b'\n')
            self._process.stdin.flush()

    def _answer(self, deadline: float) -> dict[str, Any]:
        """Return the next line that the process writes.

        Args:
            deadline: Time on the monotonic clock until which to wait.

        Raises:
            WorkerFailed: There is none.
        """
        started = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b'\n' not in self._received:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise WorkerFailed(f'it did not answer within {time.monotonic() - started:.0f} s', self)
                read = os.read(self._answers, 65536)
                if not read:
                    raise WorkerFailed(self._reason(), self)
                self._received += read
        line, _, self._received = self._received.partition(b'\n')
        return json.loads(line)

    def _reason(self) -> str:
        """Return the line of the error that the process wrote, else the signal or the code with which it ended."""
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read()[-10000:].splitlines() if line.strip()]
        errors = [line for line in lines if _ERROR.match(line)]  # the message of torch_npu has further lines
        if errors:
            return errors[-1][:300]
        if code < 0:  # its last line may be any warning
            return f'it was ended by {signal.Signals(-code).name}'
        silent = f'it could not say why: is there space for temporary files in {tempfile.gettempdir()}?'
        return ': '.join([f'it ended with exit code {code}', *(lines[-1:] or [silent])])[:300]

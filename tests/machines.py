"""Machines for tests: network namespaces of this one, joined by a bridge in a namespace of its own."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[1] / 'train_scripts'
PORT = '29500'  # every test has a network of its own


def obstacle() -> str:
    """Return why there can be no machines here; '' if there can."""
    if os.geteuid() != 0:
        return 'network namespaces need root'
    if shutil.which('ip') is None:
        return 'network namespaces need the command ip (package iproute2)'
    try:
        with Machines(1):
            return ''
    except subprocess.CalledProcessError as error:
        return f'no network namespaces: {error.stderr.strip() or error}'


def remove(name: str) -> None:
    """End the processes in a network namespace, and remove it."""
    # Workers of torchrun have sessions of their own, and do not end with it.
    found = subprocess.run(['ip', 'netns', 'pids', name], capture_output=True, text=True, check=False)
    for pid in found.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(['ip', 'netns', 'del', name], capture_output=True, check=False)


def remove_stale() -> None:
    """Remove the machines of test runs that were killed: the names tell their process ids."""
    listed = subprocess.run(['ip', 'netns', 'list'], capture_output=True, text=True, check=False).stdout
    for name, pid in re.findall(r'^(tn(\d+)x\d+(?:-\d+)?)\b', listed, re.MULTILINE):
        if not Path(f'/proc/{pid}').exists():
            remove(name)


class Machines:
    """Machines 0 to ``count`` − 1 with the addresses 10.213.0.1, 10.213.0.2, …, for the time of a block.

    SIGTERM ends the block; what a killed process leaves behind, the next one removes.
    """

    made = 0

    def __init__(self, count: int) -> None:
        Machines.made += 1
        self.count, self.name = count, f'tn{os.getpid()}x{Machines.made}'
        self.started: list[subprocess.Popen] = []
        self.handler: Any = None

    def __enter__(self) -> 'Machines':
        remove_stale()
        if threading.current_thread() is threading.main_thread():
            self.handler = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            self._ip(f'netns add {self.name}')
            self._ip(f'-n {self.name} link add bridge type bridge')
            self._ip(f'-n {self.name} link set bridge up')
            for index in range(self.count):
                self._join(index)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            process.poll()
        for name in (self.name, *(f'{self.name}-{index}' for index in range(self.count))):
            remove(name)
        for process in self.started:
            process.wait()
        if self.handler is not None:
            signal.signal(signal.SIGTERM, self.handler)

    @staticmethod
    def _ip(words: str) -> None:
        subprocess.run(['ip', *words.split()], check=True, capture_output=True, text=True)

    def _join(self, index: int) -> None:
        name, port = f'{self.name}-{index}', f'port{index}'
        self._ip(f'netns add {name}')
        self._ip(f'-n {name} link set lo up')
        self._ip(f'link add eth0 netns {name} type veth peer name {port} netns {self.name}')
        self._ip(f'-n {self.name} link set {port} master bridge')
        self._ip(f'-n {self.name} link set {port} up')
        self._ip(f'-n {name} address add {self.address(index)}/24 dev eth0')
        self._ip(f'-n {name} link set eth0 up')

    @staticmethod
    def address(index: int) -> str:
        """Return the address of a machine."""
        return f'10.213.0.{index + 1}'

    def link(self, index: int, state: str) -> None:
        """Cut a machine off the network with 'down', and bring it back with 'up'."""
        self._ip(f'-n {self.name} link set port{index} {state}')

    def start(self, index: int, words: list[str], log: Path, **variables: str) -> subprocess.Popen:
        """Start dist_train_npu.sh with two processes on a machine, as its owner would."""
        usual = {**os.environ, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1', 'SOCKET_IFNAME': 'eth0'}
        command = ['ip', 'netns', 'exec', f'{self.name}-{index}', 'bash', str(SCRIPTS / 'dist_train_npu.sh'), '2']
        with log.open('a') as file:
            process = subprocess.Popen([*command, *words], stdout=file, stderr=file, env={**usual, **variables})
        self.started.append(process)
        return process

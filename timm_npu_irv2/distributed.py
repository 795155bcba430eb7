"""The processes of a run: launching them, joining them, and collectives of host data.

Gradients travel over the device's collectives, inside DistributedDataParallel. Everything else that processes exchange
(metrics, random states, stop requests) is host data and goes over a gloo group of its own, so that it never waits for
the device.
"""

import contextlib
import gc
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from . import device as devices
from . import rendezvous
from .errors import UserError, text_of
from .program import NOTICES

__all__ = ['StopRequest', 'World', 'agree', 'barrier', 'device_name', 'from_primary', 'gather_objects', 'initialize',
           'is_launched', 'is_lost_peer', 'launch', 'may_restart', 'on_primary', 'restarted', 'share_array', 'shutdown',
           'sum_over_ranks', 'together']

_logger = logging.getLogger(__name__)
T = TypeVar('T')

LOOPBACK = ('localhost', '127.0.0.1', '::1')
SIGN_OF_LIFE = 5  # seconds


@dataclass
class World:
    """This process among those of the run.

    Attributes:
        rank: Index of this process among all.
        local_rank: Index of this process among those of this machine.
        size: Number of all processes.
        device: Device that this process computes on.
        control: Process group for host data; None for a single process, and after :func:`shutdown`.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device('cpu'))
    control: Any = None

    @property
    def is_primary(self) -> bool:
        """True for the process that writes the log and the files, rank 0."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """True if there are several processes."""
        return self.size > 1


def initialize(
        device_name: str | None,
        *,
        dist_url: str | None = None,
        backend: str | None = None,
        world_size: int | None = None,
        rank: int | None = None,
        addr: str | None = None,
        timeout: timedelta | None = None,
) -> World:
    """Find the device and join the other processes.

    Their number and this one's rank are read from the environment that torchrun, MPI or SLURM sets; without one, from
    ``world_size`` and ``rank``; without those, there is one process.

    Args:
        device_name: 'npu', 'cuda' or 'cpu', with or without an index; None for the best there is.
        dist_url: Meeting point of the processes, 'tcp://host:port' or 'env://' (the default).
        backend: Backend of torch.distributed; None for the device's.
        world_size: Number of processes, where the environment does not say.
        rank: Index of this process, where the environment does not say.
        addr: Address of rank 0's machine, where the environment does not say.
        timeout: Time limit of a collective; None for COLLECTIVE_TIMEOUT, or torch's default.

    Raises:
        DeviceUnavailable: The device does not exist.
        UserError: The processes cannot meet.
    """
    local_rank, env_rank, env_size = rendezvous.world_from_env()
    size = env_size if env_size > 1 else (world_size or 1)
    index = env_rank if env_size > 1 else (rank or 0)
    if size == 1:
        return World(device=devices.resolve_device(device_name))
    kind = _kind(device_name)
    if env_size <= 1:  # no launcher has counted the processes of this machine
        local_rank = index % max(1, devices.device_count(kind))
    device = devices.resolve_device(kind, local_rank)
    if addr or 'MASTER_ADDR' not in os.environ:
        os.environ.setdefault('MASTER_ADDR', addr or rendezvous.first_slurm_host() or '127.0.0.1')
    timeout = timeout or _timeout()
    os.environ.setdefault('MASTER_PORT', '29500')
    _keep_gloo_on_loopback(dist_url or 'env://')
    try:
        store = _open_store(dist_url or 'env://', index, size, timeout or dist.constants.default_pg_timeout)
        dist.init_process_group(
            backend or devices.backend(device).collectives, store=store, rank=index, world_size=size, timeout=timeout)
        control = dist.new_group(backend='gloo', timeout=timeout)
    except (dist.DistError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f'rank {index} of {size} cannot join the others: {str(error).splitlines()[0]}') from error
    return World(index, local_rank, size, device, control)


def _timeout() -> timedelta | None:
    """Return the time limit of a collective that COLLECTIVE_TIMEOUT sets, in seconds; None without it."""
    value = os.environ.get('COLLECTIVE_TIMEOUT')
    if not value:
        return None
    if not value.isdecimal() or not int(value):
        raise UserError(f"COLLECTIVE_TIMEOUT '{value}' is not a number of seconds.")
    return timedelta(seconds=int(value))


def _keep_gloo_on_loopback(url: str) -> None:
    """Let gloo, which otherwise listens on the address of the host name, use loopback if all processes are here."""
    host = urllib.parse.urlsplit(url).hostname or os.environ['MASTER_ADDR']
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith('lo')), None)
    if host in LOOPBACK and loopback is not None:
        os.environ.setdefault('GLOO_SOCKET_IFNAME', loopback)


def _open_store(url: str, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Return the store through which the processes meet; on one machine it listens on the loopback interface only."""
    parsed = urllib.parse.urlsplit(url)
    host = parsed.hostname or os.environ['MASTER_ADDR']
    port = parsed.port or rendezvous.port_number(os.environ['MASTER_PORT'], 'MASTER_PORT')
    store: dist.Store
    if host in LOOPBACK and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        if rank == 0:
            store, _ = rendezvous.serve_on_loopback(port, timeout)
        else:
            store = dist.TCPStore('127.0.0.1', port, is_master=False, timeout=timeout)
    else:
        store, _, _ = next(dist.rendezvous(url, rank, size, timeout=timeout))
    # torchrun's store still has the addresses of the processes before a restart.
    return dist.PrefixStore(f'attempt {os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")}', store)


def shutdown(world: World) -> None:
    """Leave the other processes, at the end of the program."""
    if not world.distributed:
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    # gloo's threads end with the last references to their groups: this one, and those of unused networks. A thread
    # that releases a tensor while the interpreter ends would abort the process.
    world.control = None
    gc.collect()


def barrier(world: World) -> None:
    """Wait until every process has called this."""
    if world.distributed:
        dist.barrier(group=world.control)


def sum_over_ranks(tensor: Tensor, world: World) -> Tensor:
    """Return the element-wise sum of every process's ``tensor``, as a new tensor on the CPU.

    Sums of integers are exact. This waits for the device of ``tensor``.
    """
    total = tensor.detach().cpu().clone()
    if world.distributed:
        dist.all_reduce(total, group=world.control)
    return total


def gather_objects(value: Any, world: World) -> list[Any]:
    """Return every process's ``value`` in the order of ranks on rank 0, and an empty list on the others."""
    if not world.distributed:
        return [value]
    gathered: list[Any] = [None] * world.size if world.is_primary else []
    dist.gather_object(value, gathered if world.is_primary else None, group=world.control)
    return gathered


def from_primary(value: T, world: World) -> T:
    """Return rank 0's ``value`` on every process."""
    values = [value]
    if world.distributed:
        dist.broadcast_object_list(values, src=0, group=world.control)
    return values[0]


def agree(compute: Callable[[], T], world: World) -> T:
    """Return what ``compute`` returns on rank 0 in every process, or raise its error in every process.

    Rank 0 computes in a thread and tells the others every few seconds to go on waiting, so that the time limit of a
    collective is none of ``compute``.
    """
    if not world.distributed:
        return compute()
    outcome: Any = None

    def work() -> None:
        nonlocal outcome
        try:
            outcome = compute()
        except BaseException as error:
            outcome = error

    thread = threading.Thread(target=work, daemon=True)
    if world.is_primary:
        thread.start()
        thread.join(0.1)
    while from_primary(thread.is_alive(), world):
        if world.is_primary:
            thread.join(SIGN_OF_LIFE)
    failed = isinstance(outcome, BaseException)
    told: Any = from_primary(UserError.echo(text_of(outcome)) if failed else outcome, world)
    if failed or isinstance(told, UserError):
        raise outcome if failed else told
    return told


def share_array(array: np.ndarray | None, world: World) -> np.ndarray:
    """Return rank 0's ``array`` of numbers on every process; the others pass None."""
    if not world.distributed:
        assert array is not None
        return array
    shape, dtype = from_primary(None if array is None else (array.shape, array.dtype.str), world) or ((), '')
    array = np.empty(shape, dtype) if array is None else array
    if array.size:
        dist.broadcast(torch.from_numpy(array), src=0, group=world.control)
    return array


def together(compute: Callable[[], T], world: World) -> T:
    """Return what ``compute`` returns in this process, unless it fails in one: then it fails in all.

    So no process waits for one that has failed. ``compute`` must not wait for another process itself.

    Raises:
        UserError: Another process has failed. A failure of this process is raised as it is.
    """
    if not world.distributed:
        return compute()
    result, failure = None, None
    try:
        result = compute()
    except Exception as error:
        failure = error
    reasons: list[str] = [''] * world.size
    dist.all_gather_object(reasons, '' if failure is None else text_of(failure), group=world.control)
    if failure is not None:
        raise failure
    for rank, reason in enumerate(reasons):
        if reason:
            raise UserError.echo(f'rank {rank}: {reason}' if rank else reason)
    return cast(T, result)


def on_primary(work: Callable[[], object], world: World) -> None:
    """Call ``work`` on rank 0, while the others wait; if it fails, all processes fail as :func:`together` does."""
    together(lambda: work() if world.is_primary else None, world)


def is_lost_peer(error: BaseException) -> bool:
    """Return True if an error says that another process has ended."""
    return isinstance(error, dist.DistError) or 'gloo' in str(error)


def may_restart() -> bool:
    """Return True if torchrun will start the processes again when one fails (--max-restarts)."""
    return int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', '0')) > 0


def restarted() -> bool:
    """Return True if torchrun has started the processes again after a failure."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')) > 0


class StopRequest:
    """A handler of SIGTERM, SIGINT and :data:`.NOTICES` that stops all processes after the same step.

    Each process tells the others at every step if it was asked to stop, and acts on the answers of the step before.
    That exchange has then had the time of a whole step, so nothing waits for it.

    A second SIGINT, at least a second after the first (torchrun sends two), is a plain KeyboardInterrupt.
    """

    signals = (signal.SIGTERM, signal.SIGINT, *NOTICES)

    def __init__(self, world: World) -> None:
        self._world = world
        self._received, self._received_at = 0, 0.0
        self._pending: tuple[Tensor, Any] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> 'StopRequest':
        for number in self.signals:
            if number not in NOTICES or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._finish_exchange()

    def _finish_exchange(self) -> None:
        """End the last exchange before the interpreter does: its thread would abort the process otherwise."""
        if self._pending is None:
            return
        (_, work), self._pending = self._pending, None
        with contextlib.suppress(RuntimeError):  # the others may have failed
            work.wait(timedelta(seconds=5))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._received and now - self._received_at > 1:
            raise KeyboardInterrupt
        if not self._received:
            self._received, self._received_at = number, now
            if self._world.is_primary:
                with contextlib.suppress(OSError):  # os.write, since a signal may interrupt a write to sys.stderr
                    os.write(2, f'\n{signal.Signals(number).name}: finishing this step and saving it.\n'.encode())

    def poll(self) -> int:
        """Return the number of the signal to stop for, the same in every process, or 0, once in every step."""
        if not self._world.distributed:
            return self._received
        told = 0
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            told = int(flag)
        flag = torch.tensor(self._received)
        self._pending = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._world.control, async_op=True)
        return told


def device_name(device: str | None, device_list: str | None) -> str | None:
    """Return ``device`` with the index that a list of one card names."""
    if not device_list:
        return device
    return f'{_kind(device)}:{int(device_list.strip(", "))}'


def _kind(name: str | None) -> str:
    """Return the type of a device without its index; that of the best device there is for None."""
    return (name or devices.default_device()).split(':')[0]


def is_launched() -> bool:
    """Return True if a launcher (torchrun, MPI, SLURM) has started this process as one of several."""
    return rendezvous.world_from_env()[2] > 1 or 'LOCAL_RANK' in os.environ


def launch(
        script: str,
        argv: Sequence[str],
        *,
        device: str | None = None,
        device_list: str | None = None,
        nodes: int = 1,
        node_rank: int = 0,
        addr: str | None = None,
        dist_url: str | None = None,
) -> int:
    """Run ``script`` once per card, as torchrun would, and return the exit code.

    Args:
        script: Path of the program.
        argv: Command line of the program.
        device: Type of the devices; None for the best there is.
        device_list: Indices of the cards, such as '0,1'; None for all.
        nodes: Number of machines.
        node_rank: Index of this machine.
        addr: Address of the machine of rank 0.
        dist_url: Meeting point of the machines, 'tcp://host:port'.

    Raises:
        UserError: There are fewer cards than were asked for, or the port is in use.
    """
    count = _select_cards(_kind(device), device_list)
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=nodes, max_nodes=nodes, nproc_per_node=count, max_restarts=0,
        **_meeting_point(nodes, node_rank, addr, dist_url))
    logging.disable(logging.ERROR)  # the launcher's own lines; those of the processes say what happened
    try:
        elastic_launch(config, sys.executable)('-u', script, *argv)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _select_cards(kind: str, device_list: str | None) -> int:
    """Make only the cards of a list such as '0,1' visible to the children, and return their number."""
    available = devices.device_count(kind)
    cards = [int(card) for card in device_list.split(',') if card.strip()] if device_list else list(range(available))
    visible = devices.backend(kind).visible
    if visible is None:
        return len(cards)
    if not cards or max(cards) >= available:
        raise UserError(f'--device-list {device_list or "(all)"}: there are {available} {kind} device(s) here.')
    names = os.environ.get(visible, '').split(',')
    chosen = [names[card] if len(names) == available else str(card) for card in sorted(cards)]
    # ASCEND_RT_VISIBLE_DEVICES must be ascending.
    os.environ[visible] = ','.join(sorted(chosen, key=int) if all(map(str.isdecimal, chosen)) else chosen)
    return len(cards)


def _meeting_point(nodes: int, node_rank: int, addr: str | None, dist_url: str | None) -> dict[str, Any]:
    """Return the arguments of LaunchConfig for the place where the processes meet."""
    url = dist_url.removeprefix('tcp://') if dist_url and dist_url.startswith('tcp://') else None
    endpoint = url or f"{addr or '127.0.0.1'}:{os.environ.get('MASTER_PORT', '29500')}"
    host, _, port = endpoint.rpartition(':')
    if (nodes > 1 or url) and node_rank == 0:
        rendezvous.check_port(port, '--dist-url' if url else 'MASTER_PORT',
                              f'choose another one with --dist-url tcp://{host}:PORT.')
    rendezvous.register_rendezvous()
    if nodes == 1:
        return {'rdzv_backend': 'loopback', 'rdzv_endpoint': f'127.0.0.1:{port if url else 0}',
                'run_id': secrets.token_hex(16)}
    return {'rdzv_backend': 'machines', 'rdzv_endpoint': endpoint, 'run_id': 'train',
            'rdzv_configs': {'rank': node_rank, 'timeout': 900}}

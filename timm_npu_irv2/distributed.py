"""The processes of a run: who this one is, how they are started, and how they agree with one another.

Gradients travel over the device's collectives, inside DistributedDataParallel. What the processes tell one another
besides (metrics, random states, the wish to stop) is host data and goes over a gloo group of its own, so that it never
waits for the device.
"""

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.utils.distributed import world_info_from_env
from torch import Tensor
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from . import device as devices
from .errors import UserError

__all__ = ['StopRequest', 'World', 'barrier', 'device_name', 'from_primary', 'gather_objects', 'initialize',
           'is_lost_peer', 'launch', 'launches', 'may_restart', 'restarted', 'shutdown', 'sum_over_ranks']

_logger = logging.getLogger(__name__)
T = TypeVar('T')


@dataclass
class World:
    """This process among those of the run.

    Attributes:
        rank: Its index among all processes.
        local_rank: Its index among those of this machine.
        size: The number of all processes.
        device: The device it computes on.
        control: The group for host data; None for a single process, and after :func:`shutdown`.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device('cpu'))
    control: Any = None

    @property
    def is_primary(self) -> bool:
        """Whether this process writes the log and the files."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """Whether there are others."""
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

    Who they are is read from the environment that torchrun, MPI or SLURM sets; without one, from ``world_size`` and
    ``rank``; without those, there is one process.

    Args:
        device_name: 'npu', 'cuda', 'cpu', with or without an index; None takes the best there is.
        dist_url: Where the processes meet, 'tcp://host:port' or 'env://' (the default).
        backend: torch.distributed's backend; None takes the device's.
        world_size: Number of processes, where the environment does not say.
        rank: Index of this one, where the environment does not say.
        addr: Address of rank 0's machine, where the environment does not say.
        timeout: How long a collective may take; None leaves torch's choice.

    Raises:
        DeviceUnavailable: The device does not exist.
        UserError: The processes cannot meet.
    """
    local_rank, env_rank, env_size = world_info_from_env()
    size = env_size if env_size > 1 else (world_size or 1)
    index = env_rank if env_size > 1 else (rank or 0)
    if size == 1:
        return World(device=devices.resolve_device(device_name))
    kind = _kind(device_name)
    if env_size <= 1:  # nobody counted the processes of this machine
        local_rank = index % max(1, devices.device_count(kind))
    device = devices.resolve_device(kind, local_rank)
    os.environ.setdefault('MASTER_ADDR', addr or '127.0.0.1')
    os.environ.setdefault('MASTER_PORT', '29500')
    meeting: dict[str, Any] = {'init_method': dist_url or 'env://'}
    try:
        if restarted():
            meeting = {'store': _fresh_store(dist_url or 'env://', index, size)}
        dist.init_process_group(
            backend or devices.backend(device).collectives, **meeting, rank=index, world_size=size, timeout=timeout)
        control = dist.new_group(backend='gloo')
    except (dist.DistError, ValueError, RuntimeError) as error:
        raise UserError(f'rank {index} of {size} cannot join the others: {str(error).splitlines()[0]}') from error
    return World(index, local_rank, size, device, control)


def _fresh_store(url: str, rank: int, size: int) -> dist.Store:
    """Where restarted processes meet: torchrun's own store still has the addresses of those that are gone."""
    store, _, _ = next(dist.rendezvous(url, rank, size))
    return dist.PrefixStore(f'attempt {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)


def shutdown(world: World) -> None:
    """Leave the others. For the end of the program, whatever its reason."""
    if not world.distributed:
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    # gloo's threads end with the last references to their groups: this one, and those of networks nobody needs any
    # more. A thread that is just letting go of a tensor when the interpreter ends would abort the process.
    world.control = None
    gc.collect()


def barrier(world: World) -> None:
    """Wait until every process is here."""
    if world.distributed:
        dist.barrier(group=world.control)


def sum_over_ranks(tensor: Tensor, world: World) -> Tensor:
    """The element-wise sum of every process's ``tensor``; a new tensor on the CPU.

    Sums of integers are exact. A tensor on the device is waited for.
    """
    total = tensor.detach().cpu().clone()
    if world.distributed:
        dist.all_reduce(total, group=world.control)
    return total


def gather_objects(value: Any, world: World) -> list[Any]:
    """Every process's ``value`` in the order of ranks, on rank 0; an empty list on the others."""
    if not world.distributed:
        return [value]
    gathered: list[Any] = [None] * world.size if world.is_primary else []
    dist.gather_object(value, gathered if world.is_primary else None, group=world.control)
    return gathered


def from_primary(value: T, world: World) -> T:
    """Rank 0's ``value``, on every process."""
    values = [value]
    if world.distributed:
        dist.broadcast_object_list(values, src=0, group=world.control)
    return values[0]


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process has gone."""
    return isinstance(error, dist.DistError) or 'gloo' in str(error)


def may_restart() -> bool:
    """Whether torchrun would start the processes again if one fails (--max-restarts)."""
    return int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', '0')) > 0


def restarted() -> bool:
    """Whether torchrun has done so."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')) > 0


class StopRequest:
    """Turns SIGTERM and SIGINT into a wish that all processes act on after the same step.

    Each process tells the others at every step whether it was asked to stop, and acts on what they told it one step
    before. That exchange has then had a whole step's time, so nothing waits for it.

    A second SIGINT, at least a second after the first (torchrun sends two), is a plain KeyboardInterrupt.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, world: World) -> None:
        self._world = world
        self._received = 0
        self._received_at = 0.0
        self._pending: tuple[Tensor, Any] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> 'StopRequest':
        self._previous = {number: signal.signal(number, self._receive) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._finish_exchange()

    def _finish_exchange(self) -> None:
        """Let go of the last exchange while the interpreter is whole: its thread aborts the process otherwise."""
        if self._pending is None:
            return
        _, work = self._pending
        self._pending = None
        with contextlib.suppress(RuntimeError):  # the others may have failed
            work.wait(timedelta(seconds=5))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._received and now - self._received_at > 1:
            raise KeyboardInterrupt
        if not self._received:
            self._received, self._received_at = number, now
            if self._world.is_primary:  # os.write, since a signal may interrupt a write to sys.stderr
                os.write(2, f'\n{signal.Signals(number).name}: finishing this step and saving it.\n'.encode())

    def poll(self) -> int:
        """The number of the signal to stop for, the same in every process, or 0. Called once in every step."""
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


def device_name(args: Namespace) -> str | None:
    """--device, with the index that a --device-list of one card names."""
    if not args.device_list or args.multiprocessing_distributed:
        return args.device
    return f'{_kind(args.device)}:{int(args.device_list.strip(", "))}'


def _kind(name: str | None) -> str:
    """The type of a device without its index; that of the best device there is for None."""
    return (name or devices.default_device()).split(':')[0]


def launches(args: Namespace) -> bool:
    """Whether this process is to start the others instead of training itself."""
    return args.multiprocessing_distributed and world_info_from_env()[2] <= 1 and 'LOCAL_RANK' not in os.environ


def launch(args: Namespace, script: str, argv: Sequence[str]) -> int:
    """Run ``script`` once per card of ``args.device_list``, as torchrun would; the exit code.

    Args:
        args: The options: device, device_list, and for several machines world_size, rank and addr or dist_url.
        script: The program.
        argv: Its command line.

    Raises:
        UserError: There are fewer cards than were asked for, or the port is taken.
    """
    kind = _kind(args.device)
    count = _select_cards(kind, args.device_list)
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=args.world_size or 1, max_nodes=args.world_size or 1, nproc_per_node=count, max_restarts=0,
        run_id='train', **_meeting_point(args))
    logging.disable(logging.ERROR)  # the launcher's own lines: those of the processes say what happened
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
    """Let the children see the cards of a list such as '0,1' only; their number."""
    available = devices.device_count(kind)
    cards = [int(card) for card in device_list.split(',') if card.strip()] if device_list else list(range(available))
    visible = devices.backend(kind).visible
    if visible is None:
        return len(cards)
    if not cards or max(cards) >= available:
        raise UserError(f'--device-list {device_list or "(all)"}: there are {available} {kind} device(s) here.')
    names = os.environ.get(visible, '').split(',')
    os.environ[visible] = ','.join(names[card] if len(names) == available else str(card) for card in cards)
    return len(cards)


def _meeting_point(args: Namespace) -> dict[str, Any]:
    """Where the machines meet: on one machine a free port, else what the options say."""
    url = args.dist_url.removeprefix('tcp://') if (args.dist_url or '').startswith('tcp://') else None
    if (args.world_size or 1) == 1 and url is None:
        return {'rdzv_backend': 'c10d', 'rdzv_endpoint': 'localhost:0'}
    endpoint = url or f"{args.addr or '127.0.0.1'}:{os.environ.get('MASTER_PORT', '29500')}"
    host, _, port = endpoint.rpartition(':')
    if (args.rank or 0) == 0 and not _is_free(int(port)):
        raise UserError(f'port {port} is in use: name another one, --dist-url tcp://{host}:PORT.')
    return {
        'rdzv_backend': 'static', 'rdzv_endpoint': endpoint, 'rdzv_configs': {'rank': args.rank or 0, 'timeout': 900}}


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', port))
        except OSError:
            return False
    return True

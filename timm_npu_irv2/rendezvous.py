"""The places where the launchers of a run meet: torchrun's rendezvous, with errors that name the machine.

Whoever reaches the store of a rendezvous can run code in the processes, since they unpickle what it holds. So the store
of one machine listens on the loopback interface only, where torch's own listens on all.
"""

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from timm.utils.distributed import world_info_from_env
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from .errors import UserError, first_line
from .escaping import printable

__all__ = ['check_port', 'first_slurm_host', 'port_number', 'register_rendezvous', 'run_torchrun', 'serve_on_loopback',
           'world_from_env']

MEETING_TIMEOUT = 600  # seconds, as torchrun's


def serve_on_loopback(port: int, timeout: timedelta) -> tuple[dist.TCPStore, int]:
    """Return a store that listens on the loopback interface, and its port; ``port`` 0 takes a free one."""
    listener = socket.create_server(('127.0.0.1', port))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        '127.0.0.1', port, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True,
        master_listen_fd=listener.detach(), use_libuv=torch.__version__ >= '2.8')  # PyTorch 2.5's takes no descriptor
    return store, port


class _LoopbackRendezvous(StaticTCPRendezvous):
    """torchrun's meeting of the processes of one machine, in a store that other machines cannot reach."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        timeout = timedelta(seconds=MEETING_TIMEOUT)
        store, port = serve_on_loopback(int(parameters.endpoint.rpartition(':')[2]), timeout)
        super().__init__('127.0.0.1', port, rank=0, world_size=1, run_id=parameters.run_id, timeout=MEETING_TIMEOUT)
        self._store = store

    def get_backend(self) -> str:
        """Return the name of this rendezvous, as in ``--rdzv-backend``."""
        return 'loopback'


class _MachinesRendezvous(StaticTCPRendezvous):
    """torchrun's static meeting of a fixed number of machines. A machine that is missing is named."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        host, _, port = parameters.endpoint.rpartition(':')
        super().__init__(
            host.strip('[]'), port_number(port, '--rdzv-endpoint'), rank=int(parameters.config['rank']),
            world_size=parameters.max_nodes, run_id=parameters.run_id,
            timeout=int(parameters.config.get('timeout') or MEETING_TIMEOUT))

    def get_backend(self) -> str:
        """Return the name of this rendezvous, as in ``--rdzv-backend``."""
        return 'machines'

    def next_rendezvous(self) -> dist.elastic.rendezvous.RendezvousInfo:
        """Wait until all machines are there, the first time, and return where their processes meet.

        Raises:
            UserError: A machine is missing, or machine 0 cannot be reached.
        """
        if self._store is None:
            self._store = self._meet()
        return super().next_rendezvous()

    def _meet(self) -> dist.Store:
        deadline = time.monotonic() + self.timeout.total_seconds()
        own = f'machine {self.rank} ({socket.gethostname()})'
        host = self.master_addr
        if self.rank == 0:
            if not is_port_free(self.master_port):
                raise UserError(f'{own}: port {self.master_port} is in use: set MASTER_PORT to another one.')
            host = '127.0.0.1'  # a server on all interfaces, and its own client
        else:
            self._wait_for_listener(own, deadline)
        store = dist.TCPStore(
            host, self.master_port, is_master=self.rank == 0, timeout=self.timeout, wait_for_workers=False,
            multi_tenant=True)
        if self.rank == 0:
            # The name of a pod may be known some seconds after its start.
            self._wait_for_listener(own, min(deadline, time.monotonic() + 30))
        store.set(f'{self.run_id}/machine {self.rank}', own)
        if self.rank == 0:
            self._call_the_roll(store, deadline)
        try:
            store.wait([f'{self.run_id}/all'], timedelta(seconds=max(1.0, deadline - time.monotonic() + 5)))
        except (dist.DistError, RuntimeError) as error:
            raise UserError(f'{own} met machine 0, but not all {self.world_size} machines came; machine 0 names those '
                            'that are missing.') from error
        return store

    def _wait_for_listener(self, own: str, deadline: float) -> None:
        """Wait until machine 0 listens. torch's store would print a stack trace if it does not."""
        while True:
            try:
                socket.create_connection((self.master_addr, self.master_port), timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f'{own} cannot reach machine 0 at {self.master_addr}:{self.master_port} ({first_line(error)}): '
                        'check that machine 0 was started, MASTER_ADDR, MASTER_PORT and the firewall.') from error
                time.sleep(0.2)

    def _call_the_roll(self, store: dist.Store, deadline: float) -> None:
        """Wait for the other machines, as machine 0."""
        missing = list(range(1, self.world_size))
        while True:
            missing = [rank for rank in missing if not store.check([f'{self.run_id}/machine {rank}'])]
            if not missing:
                store.set(f'{self.run_id}/all', '')
                return
            if time.monotonic() > deadline:
                raise UserError(
                    f'machine {", ".join(map(str, missing))} of {self.world_size} did not come to '
                    f'{self.master_addr}:{self.master_port} within {self.timeout.total_seconds():.0f} s: start it with '
                    f'NODE_RANK={missing[0]} and the same MASTER_ADDR and MASTER_PORT, or set NNODES to the number of '
                    'machines there are.')
            time.sleep(0.1)


def register_rendezvous() -> None:
    """Make ``--rdzv-backend loopback`` and ``--rdzv-backend machines`` known to torchrun in this process."""
    rendezvous_handler_registry.register('loopback', _LoopbackRendezvous)
    rendezvous_handler_registry.register('machines', _MachinesRendezvous)


def run_torchrun(argv: Sequence[str]) -> None:
    """Run torchrun, with a store on the loopback interface and a random run id unless ``argv`` names a rendezvous.

    Args:
        argv: Command line of torchrun. Options of a rendezvous stand first. Without one the port of this
            machine is MASTER_PORT, or a free one.

    Raises:
        UserError: The machines cannot meet.
    """
    from torch.distributed.run import main  # noqa: PLC0415 - only the launcher needs it

    register_rendezvous()
    options = dict(zip(argv[::2], argv[1::2], strict=False))  # those of the rendezvous stand first
    endpoint = options.get('--rdzv-endpoint', '')
    if not options.keys() & {'--rdzv-backend', '--nnodes'}:
        port = os.environ.get('MASTER_PORT', '0')
        endpoint = f"127.0.0.1:{port_number(port, 'MASTER_PORT') if port != '0' else 0}"
        argv = ['--rdzv-backend', 'loopback', '--rdzv-endpoint', endpoint, '--rdzv-id', secrets.token_hex(16), *argv]
    elif options.get('--rdzv-backend') == 'c10d':
        argv = _meet_again(endpoint, list(argv))
    try:
        main(list(argv))
    except RendezvousError as error:
        raise UserError(
            f'{socket.gethostname()} cannot meet the others at {endpoint}: check that the machine of RDZV_ENDPOINT is '
            f'there, RDZV_ENDPOINT and the firewall ({first_line(error)})') from error


def _meet_again(endpoint: str, argv: list[str]) -> list[str]:
    """Return torchrun's command line with what machines need that leave and join.

    After each change rank 0 opens a store at a port of its own, since the old store has the addresses of processes that
    are gone. Its address is the one from which this machine reaches the endpoint, since not every machine has a name
    that the others know. If that is the endpoint itself, the others meet here.
    """
    os.environ.setdefault('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')
    host, _, port = endpoint.rpartition(':')
    try:
        target = socket.gethostbyname(host)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, int(port)))  # sends nothing
            address = probe.getsockname()[0]
    except (OSError, ValueError):
        return argv
    if '--rdzv-conf' in argv:
        argv[argv.index('--rdzv-conf') + 1] += f',is_host={int(address == target)}'
    return ['--local-addr', address, *argv]


def first_slurm_host() -> str | None:
    """Return the first machine of a SLURM job on several machines; None elsewhere."""
    if os.environ.get('SLURM_NNODES', '1') == '1' or 'SLURM_JOB_NODELIST' not in os.environ:
        return None
    command = ['scontrol', 'show', 'hostnames', os.environ['SLURM_JOB_NODELIST']]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(f"`{' '.join(command)}` names no machine ({first_line(error)}): set MASTER_ADDR.") from error


# timm.utils.distributed.world_info_from_env reads these.
_COUNTS = '''
    LOCAL_RANK MPI_LOCALRANKID SLURM_LOCALID OMPI_COMM_WORLD_LOCAL_RANK RANK PMI_RANK SLURM_PROCID OMPI_COMM_WORLD_RANK
    WORLD_SIZE PMI_SIZE SLURM_NTASKS OMPI_COMM_WORLD_SIZE
'''.split()


def world_from_env() -> tuple[int, int, int]:
    """Return local rank, rank and number of processes that torchrun, MPI or SLURM has set; (0, 0, 1) without them.

    Raises:
        UserError: A variable is no number, or the rank is not below the number of processes.
    """
    for name in _COUNTS:
        if not os.environ.get(name, '0').isdecimal():
            raise UserError(f"{name}='{printable(os.environ[name])[:40]}' is not a number: unset it, or start the "
                            'processes with a launcher.')
    local_rank, rank, size = world_info_from_env()
    if size > 1 and rank >= size:
        raise UserError(f'this process is number {rank} of {size}, from 0 on: start the processes with a launcher.')
    return local_rank, rank, size


def port_number(text: str, name: str) -> int:
    """Return the port that ``text``, the value of ``name``, says.

    Raises:
        UserError: It is not a number from 1 to 65535.
    """
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise UserError(f"{name} '{printable(text)[:40]}' is not a port: use a number from 1 to 65535.")
    return int(text)


def check_port(port: str, name: str, remedy: str) -> None:
    """Raise UserError, which ends with ``remedy``, unless this machine can listen on the port that ``name`` says."""
    if not is_port_free(port_number(port, name)):
        raise UserError(f'port {port} is in use: {remedy}')


def is_port_free(port: int) -> bool:
    """Return True if a process of this machine can listen on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', port))
        except OSError:
            return False
    return True

"""What can be known to be wrong before any process starts, in one line. Called by the launchers.

    python train_scripts/preflight.py LAUNCHER train.py|validate.py PROCESSES [options of the script]
"""

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from timm_npu_irv2 import device as devices
from timm_npu_irv2.cli.script import run_script
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.training.options import parse_args


def main(argv: Sequence[str]) -> int:
    """Raise UserError for wrong options, missing data or devices, and a port that is taken."""
    script, processes, options = argv[0], int(argv[1]), argv[2:]
    if script == 'validate.py':
        import validate  # noqa: PLC0415 (beside this file)

        args = validate.parse(options)
    else:
        args = parse_args(options)
        check_restarts(args.experiment)
    check_devices(args.device, processes)
    if not args.dataset and not args.data_dir:
        raise UserError('no data: name the folder that holds train/ and val/ with --data-dir.')
    if not args.dataset and not Path(args.data_dir).exists():
        raise UserError(f"data folder '{args.data_dir}' does not exist: check --data-dir.")
    check_port()
    return 0


def check_devices(name: str | None, processes: int) -> None:
    """Raise UserError unless there is a device for each process."""
    devices.load_backends()
    kind = (name or devices.default_device()).split(':')[0]
    if kind == 'cpu':
        return
    devices.resolve_device(kind)  # says what is missing if there is none
    available = devices.device_count(kind)
    if processes > available:
        raise UserError(f'{processes} processes need as many devices; this machine has {available} {kind} device(s).')


def check_restarts(experiment: str) -> None:
    """Raise UserError if a restart would not find the folder to go on in."""
    if os.environ.get('MAX_RESTARTS', '0') != '0' and not experiment:
        raise UserError('MAX_RESTARTS needs --experiment, which names the folder that a restart goes on in.')


def check_port() -> None:
    """Raise UserError if this machine is to be the meeting point and its port is taken."""
    port = os.environ.get('MASTER_PORT')
    if port is None or os.environ.get('NODE_RANK', '0') != '0':
        return
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"MASTER_PORT '{port}' is no port: use a number below 65536.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', int(port)))
        except OSError as error:
            raise UserError(f'port {port} is in use: set MASTER_PORT to another one, or leave it unset.') from error


if __name__ == '__main__':
    sys.exit(run_script(sys.argv[1], main, sys.argv[2:]))

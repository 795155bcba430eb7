"""Check options, data, devices and port before any process starts. Called by the launchers.

Usage: python train_scripts/preflight.py LAUNCHER train.py|validate.py PROCESSES [options of the script]
"""

import sys

from timm_npu_irv2.cli.flags import TRAIN
from timm_npu_irv2.cli.script import check_command_line, run_script
from timm_npu_irv2.cli.validate_flags import VALIDATE

if __name__ == '__main__' and len(sys.argv) > 3:
    _command_line = VALIDATE if sys.argv[2] == VALIDATE.prog else TRAIN
    check_command_line(_command_line, sys.argv[4:], sys.argv[1])  # before the imports below, which take seconds

# isort: split
import os
from collections.abc import Sequence

from timm_npu_irv2 import device as devices
from timm_npu_irv2 import rendezvous
from timm_npu_irv2.data.dataset import find_root
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.training.options import parse_args


def main(argv: Sequence[str]) -> int:
    """Raise UserError for wrong options, missing data or devices, or a port in use."""
    script, processes, options = argv[0], int(argv[1]), argv[2:]
    if script == 'validate.py':
        import validate  # noqa: PLC0415 (beside this file)

        args = validate.parse(options)
        splits = [args.split]
    else:
        args = parse_args(options)
        check_restarts(args.experiment)
        if ':' in os.environ.get('NNODES', '') and not args.elastic:
            raise UserError(f'NNODES={os.environ["NNODES"]} needs --elastic, which keeps the images of an update.')
        splits = [split for split in (args.train_split, args.val_split) if split]
    check_devices(args.device, processes)
    for split in splits:
        find_root(args.dataset, args.data_dir, split)
    check_port()
    return 0


def check_devices(name: str | None, processes: int) -> None:
    """Raise UserError unless there is a device for each process."""
    devices.load_backends()
    kind = (name or devices.default_device()).partition(':')[0]
    if kind == 'cpu' and not name and processes > 1:
        raise UserError(f'no NPU or GPU is available here: add --device cpu to run {processes} processes on the CPU.')
    devices.resolve_device(kind, local_rank=processes - 1)


def check_restarts(experiment: str) -> None:
    """Raise UserError if a restart would not find the folder of the run."""
    if os.environ.get('MAX_RESTARTS', '0') != '0' and not experiment:
        raise UserError('MAX_RESTARTS needs --experiment, the folder that a restart continues in.')


def check_port() -> None:
    """Raise UserError if this machine is the meeting point and its port is in use."""
    port = os.environ.get('MASTER_PORT')
    if port is None or os.environ.get('NODE_RANK', '0') != '0':
        return
    rendezvous.check_port(port, 'MASTER_PORT', 'set MASTER_PORT to another one, or leave it unset.')


if __name__ == '__main__':
    if len(sys.argv) < 4:
        print(__doc__)
        sys.exit(0 if {'-h', '--help'} & set(sys.argv) else 2)
    sys.exit(run_script(sys.argv[1], main, sys.argv[2:]))

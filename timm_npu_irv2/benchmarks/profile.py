"""``benchmark.py profile``: the operators of ten training steps and their times, as a table (CSV).

On an NPU torch_npu's profiler writes its own tables, ``operator_details.csv`` and ``kernel_details.csv`` among them.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from .. import device as devices
from ..cli.table import to_csv
from ..errors import UserError, first_line
from ..serialization import atomic_write, make_folder
from .candidates import Workload, candidates
from .tuned import train_precision, tuned_settings

__all__ = ['run']


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Profile, and return the paths of the tables.

    Raises:
        UserError: The profiler does not run here.
    """
    device = devices.resolve_device(args.device)
    if device.type == 'npu' and 'ASCEND_RT_VISIBLE_DEVICES' in os.environ:
        raise UserError('torch_npu cannot profile with ASCEND_RT_VISIBLE_DEVICES: unset it, and use --device npu:N.')
    folder = Path(args.output)
    make_folder(folder)
    devices.configure(device)
    settings = tuned_settings(args.tuned, device, task='train', batch_size=args.batch_size, img_size=args.img_size,
                              precision=train_precision(device, args.amp))
    step = candidates(args.amp, settings=settings)['ours'].create(Workload(device, args.batch_size, args.img_size))
    for _ in range(3):
        step()
    profiler = devices.profiler(device)
    handler = profiler.tensorboard_trace_handler(str(folder)) if device.type == 'npu' else None
    try:
        with profiler.profile(on_trace_ready=handler, record_shapes=True) as profile:
            for _ in range(args.steps):
                step()
            devices.synchronize(device)
    except (RuntimeError, OSError, AttributeError) as error:
        raise UserError(f'the profiler of {device.type} does not run here: {first_line(error)}') from error
    if handler is None:
        _write_operators(profile, folder / 'operator_details.csv')
    tables = sorted(map(str, folder.rglob('*.csv')))
    if not tables:
        raise UserError(f'the profiler wrote no table to {folder}.')
    print('\n'.join(tables))
    return {'title': 'Operators', 'columns': ('file',), 'rows': {path: [path] for path in tables}}


def _write_operators(profile: Any, path: Path) -> None:
    rows = [{'name': each.key, 'calls': each.count, 'host_us': each.self_cpu_time_total,
             'device_us': getattr(each, 'self_device_time_total', 0)} for each in profile.key_averages()]
    rows.sort(key=lambda row: -max(row['host_us'], row['device_us']))
    atomic_write(path, to_csv(rows))

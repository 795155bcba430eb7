#!/usr/bin/env python3
"""Compare this network with others: cost, speed, memory.

    python train_scripts/benchmark.py step            # cost of a training step: calls, bytes, memory (counted)
    python train_scripts/benchmark.py train --amp     # images/s of training, in turn with timm's network
    python train_scripts/benchmark.py infer           # images/s and latency of inference, in turn with others
    python train_scripts/benchmark.py input --data-dir DIR    # images/s of decoding and augmentation, by stage
    python train_scripts/benchmark.py ops             # each fused operator against unfused ones
    python train_scripts/benchmark.py tune --amp      # the fastest settings on this device, for the other scripts
    python train_scripts/benchmark.py profile         # operators of ten training steps and their times
    python train_scripts/benchmark.py busy            # train.py and the launcher beside busy loops
    python train_scripts/benchmark.py growth          # time and memory by images listed, processes, classes
    python train_scripts/benchmark.py table report.json …     # rows for the table in docs/model_zoo.md
"""

import timm_npu_irv2.cli.environment  # noqa: F401 - sets variables that torch reads when it is loaded

# isort: split
import sys

from timm_npu_irv2.cli.benchmark_flags import BENCHMARK
from timm_npu_irv2.cli.script import check_command_line, run_script

if __name__ == '__main__':
    check_command_line(BENCHMARK, sys.argv[1:])  # before the imports below, which take seconds

# isort: split
import importlib
import os
from collections.abc import Sequence

from timm_npu_irv2 import device as devices
from timm_npu_irv2.benchmarks import (
    busy,
    growth,
    inference,
    input,
    operators,
    profile,
    report,
    step,
    table,
    training,
    tune,
)
from timm_npu_irv2.benchmarks.counting import Journal
from timm_npu_irv2.cli.checks import check_installed, check_output_file
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.plots import draw_bar_chart

COMMANDS = {'step': step, 'train': training, 'infer': inference, 'input': input, 'ops': operators,
            'busy': busy, 'growth': growth, 'tune': tune, 'profile': profile, 'table': table}


def find_journal() -> Journal | None:
    """Return the recorder of the stand-in for CANN (tests/ascend), where this process runs on it with its logs on."""
    if not all(os.environ.get(f'ASCEND_STANDIN_{log}') for log in ('OPLOG', 'TRACE')):
        return None
    return importlib.import_module('standin_journal').recording


def main(argv: Sequence[str]) -> int:
    """Run the benchmark, write its figures, and return the exit code."""
    args = BENCHMARK.parse(argv)
    check_output_file('--json', str(args.json or ''))
    check_output_file('--chart', str(args.chart or ''))
    if args.chart:
        check_installed('--chart', 'matplotlib')
    try:
        result = step.run(args, find_journal()) if args.command == 'step' else COMMANDS[args.command].run(args)
    except RuntimeError as error:
        if not devices.is_out_of_memory(error):
            raise
        raise UserError('out of memory: use a smaller --batch-size.') from error
    if args.json:
        report.write_json(args.json, result)
    if args.chart:
        draw_bar_chart(args.chart, result['title'], result['columns'], result['rows'])
    return 0


if __name__ == '__main__':
    sys.exit(run_script(BENCHMARK.prog, main, sys.argv[1:]))

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
import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from timm_npu_irv2 import UserError
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
from timm_npu_irv2.cli.script import run_script
from timm_npu_irv2.plots import draw_bar_chart

COMMANDS = {'step': step, 'train': training, 'infer': inference, 'input': input, 'ops': operators,
            'busy': busy, 'growth': growth, 'tune': tune, 'profile': profile, 'table': table}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the options."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument('--device', default=None, help='npu, cuda or cpu (default: the best one available)')
    shared.add_argument('--img-size', type=int, default=299, help='height and width of the images (default: 299)')
    shared.add_argument('--json', type=Path, metavar='FILE', help='JSON file to write all figures to')
    shared.add_argument('--chart', type=Path, metavar='FILE', help='file to draw the figures into (.png, .svg or .pdf)')
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    for name, module in COMMANDS.items():
        summary = module.__doc__.partition(': ')[2].partition('\n')[0]
        module.add_arguments(commands.add_parser(name, parents=[shared], help=summary, description=summary))
    args = parser.parse_args(argv)
    least = {'img_size': 75, 'warmup': 0, 'host_rounds': 0}
    for name, value in vars(args).items():
        for each in value if isinstance(value, list | tuple) else [value]:
            if type(each) is int and each < least.get(name, 1):
                parser.error(f'--{name.replace("_", "-")} must be at least {least.get(name, 1)}, not {each}')
    return args


def find_journal() -> Journal | None:
    """Return the recorder of the stand-in for CANN (tests/ascend), where this process runs on it with its logs on."""
    if not all(os.environ.get(f'ASCEND_STANDIN_{log}') for log in ('OPLOG', 'TRACE')):
        return None
    return importlib.import_module('standin_journal').recording


def main(argv: Sequence[str]) -> int:
    """Run the benchmark, write its figures, and return the exit code."""
    args = parse_args(argv)
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
    sys.exit(run_script('benchmark.py', main, sys.argv[1:]))

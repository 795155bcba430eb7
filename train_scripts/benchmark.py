#!/usr/bin/env python3
"""Measure this network beside its peers.

    python train_scripts/benchmark.py step            # what a training step costs: calls, bytes, memory (counted)
    python train_scripts/benchmark.py train --amp     # images/s of training, alternated with timm's network
    python train_scripts/benchmark.py infer           # images/s and latency of inference, alternated with others
    python train_scripts/benchmark.py ops             # each fused operator against plain operations
    python train_scripts/benchmark.py table report.json …     # rows for the README from runs of train.py
"""

import argparse
import sys
from pathlib import Path

from timm_npu_irv2 import UserError
from timm_npu_irv2 import device as devices
from timm_npu_irv2.benchmarks import inference, operators, report, step, table, training
from timm_npu_irv2.plots import draw_bar_chart

COMMANDS = {'step': step, 'train': training, 'infer': inference, 'ops': operators, 'table': table}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument('--device', default=None, help='npu, cuda or cpu (default: the best there is)')
    shared.add_argument('--img-size', type=int, default=299, help='height and width of an image (default: 299)')
    shared.add_argument('--json', type=Path, metavar='FILE', help='write all figures there')
    shared.add_argument('--chart', type=Path, metavar='FILE', help='draw them there (.png, .svg or .pdf)')
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


def main() -> int:
    """Measure, print, write; the exit code."""
    args = parse_args()
    try:
        result = COMMANDS[args.command].run(args)
        if args.json:
            report.write_json(args.json, result)
        if args.chart:
            draw_bar_chart(args.chart, result['title'], result['columns'], result['rows'])
    except UserError as error:
        print(f'benchmark.py: error: {error}', file=sys.stderr)
        return 2
    except Exception as error:
        if devices.is_out_of_memory(error):
            print('benchmark.py: error: the memory of the device is exhausted: use a smaller --batch-size.',
                  file=sys.stderr)
            return 2
        raise
    return 0


if __name__ == '__main__':
    sys.exit(main())

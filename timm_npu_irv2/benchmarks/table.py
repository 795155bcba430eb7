"""``benchmark.py table``: rows for the table of figures in docs/model_zoo.md, from report.json files."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import UserError

__all__ = ['run']


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print a row in Markdown for each report and return the rows.

    Raises:
        UserError: A file is not a report.
    """
    rows: dict[str, list[Any]] = {}
    for path in map(Path, args.reports):
        try:
            report = json.loads(path.read_text())
            name = f"this package, {report['world_size']} × {report['device']['type']}"
            rows[name] = [report['top1'], report['images_per_second'], report['epochs'], report['precision']]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path} is not a report of train.py ({type(error).__name__}: {error}).') from error
    for name, (top1, rate, epochs, precision) in rows.items():
        accuracy = '–' if top1 is None else f'{top1:.2f}'  # without validation
        print(f'| {name} | {accuracy} | {rate:.1f} | {epochs} | {precision} |')
    return {'title': 'Training', 'columns': ('top-1', 'images/s', 'epochs', 'precision'), 'rows': rows}

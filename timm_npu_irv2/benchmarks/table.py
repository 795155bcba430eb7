"""``benchmark.py table``: rows for the table of figures in docs/model_zoo.md, from report.json files."""

import argparse
from pathlib import Path
from typing import Any

from .. import rules, schema
from ..escaping import markdown_text
from ..serialization import read_json

__all__ = ['run']

_REPORT = rules.record({
    'world_size': rules.number(), 'device': rules.record({'type': rules.text()}), 'precision': rules.text(),
    'epochs': rules.number(), 'images_per_second': rules.number(), 'top1': rules.optional(rules.number()),
})


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print a row in Markdown for each report and return the rows.

    Raises:
        UserError: A file is not a report.
    """
    rows: dict[str, list[Any]] = {}
    for path in map(Path, args.reports):
        report = read_json(path)
        with rules.naming(path):
            schema.check_report(report)
            _REPORT(report, '')
        name = f"this package, {report['world_size']} × {report['device']['type']}"
        rows[name] = [report[key] for key in ('top1', 'images_per_second', 'epochs', 'precision')]
    for name, (top1, rate, epochs, precision) in rows.items():
        accuracy = '–' if top1 is None else f'{top1:.2f}'  # a run without validation
        print(f'| {markdown_text(name)} | {accuracy} | {rate:.1f} | {epochs} | {markdown_text(precision)} |')
    return {'title': 'Training', 'columns': ('top-1', 'images/s', 'epochs', 'precision'), 'rows': rows}

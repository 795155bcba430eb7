"""Tables for people, JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..serialization import atomic_write

__all__ = ['print_table', 'write_json']


def print_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> None:
    """Print ``rows`` ({name: a value per column}) below ``title``; None is a dash."""
    cells = {name: [_cell(value) for value in values] for name, values in rows.items()}
    widths = [max(len(column), *(len(row[i]) for row in cells.values())) for i, column in enumerate(columns)]
    first = max(map(len, cells))
    print(f'\n{title}')
    print(' ' * (first + 4) + '  '.join(column.rjust(width) for column, width in zip(columns, widths, strict=True)))
    for name, row in cells.items():
        line = '  '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print(f'  {name.ljust(first)}  {line}')


def _cell(value: Any) -> str:
    if value is None:
        return '–'
    if isinstance(value, float):
        return f'{value:.3f}' if abs(value) < 10 else f'{value:.1f}'
    return str(value)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write all figures to a JSON file."""
    atomic_write(path, json.dumps(result, indent=2) + '\n')

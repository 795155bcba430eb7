"""Tables for people, JSON for programs, bar charts for both."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_whole

__all__ = ['bar_chart', 'print_table', 'write_json']


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
    """Write all figures."""
    write_whole(path, (json.dumps(result, indent=2) + '\n').encode())


def bar_chart(path: Path, title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> None:
    """Draw a small chart of bars for each column, a bar for each row.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UserError("--chart needs matplotlib: pip install 'timm-npu-irv2[plot]'.") from error
    drawn = [i for i in range(len(columns)) if any(row[i] is not None for row in rows.values())]
    figure = Figure(figsize=(2.6 * len(drawn) + 1, 3.2), layout='constrained')
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axis, index in zip(axes, drawn, strict=True):
        values = [row[index] or 0 for row in rows.values()]
        bars = axis.bar(range(len(rows)), values, color=[f'C{i}' for i in range(len(rows))])
        axis.bar_label(bars, [_cell(value) for value in values], fontsize=8)
        axis.set_title(columns[index], fontsize=9)
        axis.set_xticks([])
        axis.margins(y=0.15)
        axis.spines[['top', 'right']].set_visible(False)
    figure.legend(bars.patches, list(rows), loc='outside lower center', ncols=len(rows), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)

"""Tables of results: rows as CSV, JSON or Parquet."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError
from ..escaping import csv_cell, json_text, printable

__all__ = ['EXTENSIONS', 'by_key', 'to_csv', 'to_format', 'to_json', 'to_text',
           'utf8_rows']

Row = Mapping[str, Any]

EXTENSIONS = {'csv': '.csv', 'json': '.json', 'json-record': '.json', 'json-split': '.json', 'parquet': '.parquet'}


def to_json(value: Any) -> str:
    """Return indented JSON that keeps letters outside ASCII."""
    return json_text(value, indent=4) + '\n'


def to_csv(rows: Sequence[Row]) -> str:
    """Return rows as CSV. Rows may have different columns; a list in a cell is JSON."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    csv.writer(text, lineterminator='\n').writerow(map(csv_cell, columns))
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def utf8_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    r"""Return rows with bytes of file names that are not UTF-8 written as \udcff and the like."""
    return [{name: _utf8(value) for name, value in row.items()} for row in rows]


def _utf8(value: Any) -> Any:
    if isinstance(value, list):
        return [_utf8(each) for each in value]
    return value.encode(errors='backslashreplace').decode() if isinstance(value, str) else value


def to_text(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Return rows as a table for the terminal, aligned; numbers have at most four digits behind the point.

    Args:
        rows: Rows; a value may be missing.
        columns: Titles of the columns by the names of their values, in their order.
    """
    lines = [list(columns.values()), *([_text(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in columns]
    return '\n'.join('  '.join(
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(line, widths, numeric, strict=True)).rstrip() for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return '-'
    return f'{value:.4f}'.rstrip('0').rstrip('.') if isinstance(value, float) else printable(str(value))


def _cell(value: Any) -> Any:
    return csv_cell(json_text(value) if isinstance(value, list) else value)


def by_key(rows: Sequence[Row], key: str) -> dict[str, dict[str, Any]]:
    """Return rows by their value in the column ``key``, without that column."""
    return {row[key]: {name: value for name, value in row.items() if name != key} for row in rows}


def to_format(rows: Sequence[Row], format: str, key: str) -> str | bytes:
    """Return rows in one of timm's formats.

    Args:
        rows: Rows with the same columns.
        format: One of ``EXTENSIONS``.
        key: Column that names the rows.

    Raises:
        UserError: 'parquet' without pandas and pyarrow.
    """
    if format == 'csv':
        return to_csv(rows)
    if format == 'json':
        return to_json(by_key(rows, key))
    if format == 'json-record':
        return ''.join(json_text(row) + '\n' for row in rows)
    if format == 'json-split':
        columns = list(rows[0]) if rows else []
        return json.dumps({'columns': columns, 'data': [list(row.values()) for row in rows]}, indent=4)
    try:
        import pandas as pd  # noqa: PLC0415 - an optional dependency

        return pd.DataFrame(utf8_rows(rows)).set_index(key).to_parquet()
    except ImportError as error:
        raise UserError('--results-format parquet needs pandas and pyarrow: pip install pandas pyarrow.') from error

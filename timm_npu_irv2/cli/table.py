"""Tables of results: rows as CSV, JSON or Parquet."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError
from ..escaping import csv_cell, json_text

__all__ = ['EXTENSIONS', 'by_key', 'to_csv', 'to_format', 'to_json']

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

        return pd.DataFrame(rows).set_index(key).to_parquet()
    except ImportError as error:
        raise UserError('--results-format parquet needs pandas and pyarrow: pip install pandas pyarrow.') from error

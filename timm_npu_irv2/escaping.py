"""Text from a file or a user, made safe for where it goes: a terminal, a model card, a table.

Names of classes, tensors and files and the values of options may hold anything. Each place has characters that act:
escape sequences and marks of direction in a terminal, backticks and tags in Markdown, a leading = in a spreadsheet.
"""

import json
import re
from typing import Any

__all__ = ['csv_cell', 'json_text', 'markdown_code', 'markdown_fence', 'markdown_text', 'printable']


def printable(text: str) -> str:
    r"""Return ``text`` for a terminal: control characters and marks of direction are written as \x1b and the like.

    These are C0, among them ESC, tab and the ends of lines, DEL, C1, and whatever else Unicode calls not printable,
    such as U+202E, which turns the direction of what follows.
    """
    return ''.join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def json_text(value: Any, indent: int | None = None) -> str:
    """Return JSON that keeps letters outside ASCII, but is :func:`printable`: it may be shown in a terminal."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return ''.join(character if character.isprintable() or character == '\n' else json.dumps(character)[1:-1]
                   for character in text)


def csv_cell(value: Any) -> Any:
    r"""Return a cell that no spreadsheet takes for a formula: a text that begins like one gets an apostrophe before it.

    Numbers stay numbers. A carriage return, which would end the row unquoted, is written as \r.
    See https://owasp.org/www-community/attacks/CSV_Injection.
    """
    if not isinstance(value, str):
        return value
    value = value.replace('\r', '\\r')
    return f"'{value}" if value.startswith(('=', '+', '-', '@', '\t', '\n')) else value


def markdown_text(text: str) -> str:
    """Return ``text`` as words of a Markdown document, in which none of its characters forms markup or HTML."""
    return re.sub(r'([\\`*_{}\[\]<>#&|~$!])', r'\\\1', printable(text))


def markdown_code(text: str) -> str:
    """Return ``text`` as a code span of a Markdown document: between more backticks than it has in a row."""
    text = printable(text)
    fence = _longer_than_in(text, 1)
    blank = ' ' if text.startswith('`') or text.endswith('`') or not text.strip() else ''
    return f'{fence}{blank}{text}{blank}{fence}'


def markdown_fence(text: str, language: str) -> str:
    """Return ``text`` as a block of code of a Markdown document, which no line of it ends."""
    fence = _longer_than_in(text, 3)
    return f'{fence}{language}\n{text.rstrip()}\n{fence}'


def _longer_than_in(text: str, least: int) -> str:
    return '`' * max(least, 1 + max(map(len, re.findall('`+', text)), default=0))

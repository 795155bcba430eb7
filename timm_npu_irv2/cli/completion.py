"""Completion of the console command in a shell, by argcomplete."""

import argparse
from collections.abc import Mapping
from typing import Any

from .command_lines import COMMAND_LINES
from .parser import CommandLine, Subcommands

__all__ = ['complete']


def complete(commands: Mapping[str, tuple[str, tuple[str, ...]]]) -> None:
    """Answer the shell, which asks through argcomplete's variables, and end the program.

    Args:
        commands: Scripts or modules, and the words that come before the user's, by the names of the subcommands.
    """
    import argcomplete  # noqa: PLC0415 - an optional dependency; whoever sets its variables has it

    parser = argparse.ArgumentParser()
    parser.add_argument('--version', action='store_true')
    subparsers = parser.add_subparsers()
    for name, (target, words) in commands.items():
        line = COMMAND_LINES.get(target)
        _add(subparsers, name, line.commands[words[0]] if isinstance(line, Subcommands) and words else line)
    argcomplete.autocomplete(parser)


def _add(subparsers: Any, name: str, line: CommandLine | Subcommands | None) -> None:
    parents = [line.parser()] if isinstance(line, CommandLine) else []
    parser = subparsers.add_parser(name, parents=parents, add_help=not parents)
    if isinstance(line, Subcommands):
        children = parser.add_subparsers()
        for child, own in line.commands.items():
            _add(children, child, own)

"""Options as data, and their parser: command line over YAML file over defaults.

Every mistake raises a :class:`UserError` of one line.
"""

import argparse
import ast
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from .arguments import Parser, suggestion

__all__ = ['CommandLine', 'Flag', 'Group', 'Subcommands', 'as_yaml', 'config_file', 'key_values']

LONGEST_CONFIG = 2**20  # bytes of a YAML file; a device has no end

MAX_INT = 2 ** 32  # what torch, timm and NumPy take as a size, a count or a seed


@dataclass(frozen=True)
class Flag:
    """One option.

    Attributes:
        names: Spellings, separated by blanks. The first long one names the attribute.
        help: Meaning. The parser adds the default.
        type: Function that converts a word to the value; ``bool`` makes a switch, with the default None one of three
            states: --NAME, --no-NAME, neither.
        default: Value if the option is not given.
        within: Interval of its numbers, such as '[1, inf)'. Numbers are finite in any case.
        rest: Further arguments of ``add_argument`` (nargs, const, choices, metavar).
        recipe: True if the option determines the result of a training; model cards list these.
    """

    names: str
    help: str
    type: Callable[[str], Any] = str
    default: Any = None
    within: str = '(-inf, inf)'
    rest: dict[str, Any] = field(default_factory=dict)
    recipe: bool = False

    @property
    def dest(self) -> str:
        """Name of the attribute in the parsed namespace."""
        if 'dest' in self.rest:
            return self.rest['dest']
        first = next((name for name in self.names.split() if name.startswith('--')), self.names.split()[0])
        return first.lstrip('-').replace('-', '_')


@dataclass(frozen=True)
class Group:
    """Options under one heading of ``--help``."""

    title: str
    flags: tuple[Flag, ...]


def key_values(text: str) -> tuple[str, Any]:
    """Split 'name=value'; the value is read as a Python literal where it is one, otherwise as text.

    Raises:
        ArgumentTypeError: The text has another form.
    """
    key, separator, value = text.partition('=')
    if not separator or not key:
        raise argparse.ArgumentTypeError(f"expected name=value, not '{text}'.")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: nested too deeply
        return key, value


@dataclass(frozen=True)
class CommandLine:
    """The command line of a script.

    Attributes:
        prog: Name of the script.
        description: First lines of ``--help``.
        groups: Table of options.
        refused: Known options that are not supported, with the reason.
        takes_config: True if ``-c`` names a YAML file of options.
        usage: First line of ``--help``; None to list all options.
    """

    prog: str
    description: str
    groups: tuple[Group, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    takes_config: bool = True
    usage: str | None = '%(prog)s [DIR] [-c FILE] [options]'

    def parser(self) -> argparse.ArgumentParser:
        """Return the parser of the table, without the rules of :meth:`parse`."""
        return _build_parser(self)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the words after the script's name, over the YAML file that ``-c`` names.

        Raises:
            UserError: The command line or the file has a mistake.
        """
        parser = self.parser()
        arguments = [_hyphens(word) for word in argv]
        for word in itertools.takewhile('--'.__ne__, arguments):  # what follows is no option
            if (name := word.split('=')[0]) in self.refused:
                raise UserError(f'{name}: {self.refused[name]}')
            if name.startswith('--') and name not in parser._option_string_actions:  # told before what is missing
                parser.error(f'unrecognized arguments: {name}')
        args = argparse.Namespace()
        if self.takes_config and (config := config_file(arguments)) is not None:
            args = parser.parse_args(_config_words(parser, config, self.refused), args)
        args = parser.parse_args(arguments, args)
        args.__dict__.pop('config', None)
        for flag in _flags(self.groups):
            if flag.type is key_values:
                setattr(args, flag.dest, dict(getattr(args, flag.dest) or {}))
            _check_range(flag, getattr(args, flag.dest))
        return args


@dataclass(frozen=True)
class Subcommands:
    """A command line whose first word chooses one of several others.

    Attributes:
        prog: Name of the program.
        description: First lines of ``--help``.
        commands: Command lines by that word.
    """

    prog: str
    description: str
    commands: Mapping[str, CommandLine]

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the words after the program's name; ``command`` in the result is the first one.

        Raises:
            UserError: The command line has a mistake.
            SystemExit: After --help.
        """
        name = argv[0] if argv else ''
        if name in ('-h', '--help'):
            print(self.help())
            raise SystemExit(0)
        if name not in self.commands:
            what = f"unknown command '{name}': use" if name else 'add'
            raise UserError(f'{what} one of {", ".join(self.commands)}.')
        args = self.commands[name].parse(argv[1:])
        args.command = name
        return args

    def help(self) -> str:
        """Return the text of ``--help``."""
        width = max(map(len, self.commands))
        lines = [f'  {name:<{width}}  {line.description.partition(". ")[0].rstrip(".")}'
                 for name, line in self.commands.items()]
        return '\n'.join([f'usage: {self.prog} COMMAND [options]', '', self.description, '', *lines, '',
                          f'{self.prog} COMMAND --help lists the options of a command.'])


def as_yaml(args: argparse.Namespace) -> str:
    """Return the options as the text of a YAML file that ``-c`` reads back to the same options."""
    return yaml.dump(vars(args), Dumper=_ConfigDumper, default_flow_style=False)


class _ConfigDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _build_parser(line: CommandLine) -> Parser:
    parser = Parser(
        prog=line.prog, description=line.description, usage=line.usage, allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120))
    if line.takes_config:
        parser.add_argument('-c', '--config', metavar='FILE',
                            help='YAML file of options; options on the command line take precedence')
    for group in line.groups:
        section = parser.add_argument_group(group.title)
        for flag in group.flags:
            _add_flag(section, flag)
    return parser


def _add_flag(section: argparse._ArgumentGroup, flag: Flag) -> None:
    text = flag.help.replace('%', '%%')
    if flag.default not in (None, '', False, [], argparse.SUPPRESS) and '(default' not in text:
        text += f' (default: {_as_words(flag.default)})'
    if not flag.names.startswith('-'):
        section.add_argument(flag.names, help=text, default=flag.default, **flag.rest)
    elif flag.type is bool:
        action: Any = 'store_true' if flag.default is False else argparse.BooleanOptionalAction
        section.add_argument(*flag.names.split(), dest=flag.dest, action=action, default=flag.default, help=text)
    else:
        settings = {'dest': flag.dest, 'type': flag.type, 'default': flag.default, 'help': text, **flag.rest}
        section.add_argument(*flag.names.split(), **settings)


def _flags(groups: Iterable[Group]) -> list[Flag]:
    return [flag for group in groups for flag in group.flags]


def _as_words(value: Any) -> str:
    if isinstance(value, list):
        return ' '.join(_as_words(item) for item in value)
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def _hyphens(word: str) -> str:
    """Return --data_path=a_b as --data-path=a_b."""
    if not word.startswith('--'):
        return word
    name, separator, value = word.partition('=')
    return name.replace('_', '-') + separator + value


def config_file(arguments: Sequence[str]) -> Path | None:
    """Return the file that ``-c`` names in the words after a script's name."""
    finder = Parser(add_help=False, allow_abbrev=False)
    finder.add_argument('-c', '--config', type=Path)
    return finder.parse_known_args(arguments)[0].config


def _config_words(parser: argparse.ArgumentParser, path: Path, refused: Mapping[str, str]) -> list[str]:
    """Return the YAML file as a command line, so that the same rules apply to both."""
    try:
        with path.open('rb') as file:  # perhaps a pipe
            content = file.read(LONGEST_CONFIG + 1)
        if len(content) > LONGEST_CONFIG:
            raise ValueError(f'it has more than {LONGEST_CONFIG} bytes')
        options = yaml.load(content.decode(), _ConfigLoader) or {}
    except RecursionError as error:
        raise UserError(f'cannot read the config {path}: it is nested too deeply.') from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f'cannot read the config {path}: {" ".join(str(error).split())[:300]}') from error
    if not isinstance(options, dict):
        raise UserError(f'config {path}: expected lines of the form `option: value`.')
    words: list[str] = []
    for key, value in options.items():
        name = '--data' if key == 'data' else '--' + str(key).replace('_', '-')
        if name in refused:
            if name == '--naflex-loader' and value:
                raise UserError(f"config {path}: '{key}': {refused[name]}")
        elif name not in parser._option_string_actions or name in ('--config', '--help'):
            raise UserError(f"config {path}: unknown key '{key}'{suggestion(name, parser._option_string_actions)}")
        else:
            words += _as_arguments(path, parser._option_string_actions[name], name, value)
    return words


class _ConfigLoader(yaml.SafeLoader):
    """YAML without its traps: numbers are decimal, a key occurs once, and nothing refers to something else.

    YAML 1.1 reads ``010`` as 8 and ``1:30`` as 90; here they are text, which the type of the option then reads.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, 'references (*) are not supported')
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value).replace('_', '-')
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key.value}' occurs twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


_ConfigLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(':')[2] in ('bool', 'null')]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for _kind, _pattern in (
        ('int', r'[-+]?(?:0|[1-9][0-9]*)'),
        ('float', r'[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?'),
):
    _ConfigLoader.add_implicit_resolver(
        f'tag:yaml.org,2002:{_kind}', re.compile(f'^(?:{_pattern})$'), list('-+.0123456789'))


def _as_arguments(path: Path, action: argparse.Action, name: str, value: Any) -> list[str]:
    """Return one entry of a YAML file as words of a command line."""
    if isinstance(action, argparse.BooleanOptionalAction) and isinstance(value, bool):
        return [name if value else f'--no-{name[2:]}']
    if isinstance(action, argparse._StoreTrueAction):
        if not isinstance(value, bool):
            raise UserError(f"config {path}: '{name[2:]}' is a switch: expected true or false, not {value!r}.")
        return [name] if value else []
    if value is None or (isinstance(value, list | dict) and not value):
        return []
    if isinstance(value, dict) and action.nargs == '*':
        return [name, *(f'{key}={item!r}' for key, item in value.items())]
    if isinstance(value, list) and action.nargs not in (None, '?'):
        return [name, *map(str, value)]
    if isinstance(value, list | dict | bool):
        raise UserError(f"config {path}: '{name[2:]}' cannot be {value!r}.")
    return [name, str(value)] if action.nargs not in (None, '?') else [f'{name}={value}']


def _check_range(flag: Flag, value: Any) -> None:
    """Raise UserError if a number of ``value`` is not finite or not in the flag's interval."""
    low, high = (float(bound) for bound in flag.within[1:-1].split(','))
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if isinstance(number, int) and abs(number) >= MAX_INT:
            raise UserError(f'{_long_name(flag)} {_as_words(number)[:30]}: must be less than {MAX_INT}.')
        above = number >= low if flag.within[0] == '[' else number > low
        below = number <= high if flag.within[-1] == ']' else number < high
        if not (math.isfinite(number) and above and below):
            raise UserError(f'{_long_name(flag)} {_as_words(number)}: must be {_in_words(flag.within, low, high)}.')


def _long_name(flag: Flag) -> str:
    return next((name for name in flag.names.split() if name.startswith('--')), flag.names)


def _in_words(within: str, low: float, high: float) -> str:
    lower = f'{"at least" if within[0] == "[" else "more than"} {low:g}'
    upper = f'{"at most" if within[-1] == "]" else "less than"} {high:.10g}'
    parts = [text for text, bound in ((lower, low), (upper, high)) if math.isfinite(bound)]
    return ' and '.join(parts) or 'a finite number'

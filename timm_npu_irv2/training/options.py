"""Reading the options: command line over YAML file over defaults, then everything that can be wrong with them.

Whatever is wrong ends in one :class:`UserError` of one line; nothing here touches a device or the data.
"""

import argparse
import difflib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..errors import UserError
from .flags import REFUSED, TRAIN_FLAGS, Flag, Group

__all__ = ['as_yaml', 'parse_args', 'parse_flags', 'too_small']

PUBLISHED = ('inception_resnet_v2_npu', 'inception_resnet_v2')  # what hub.py knows how to export
SMALLEST_IMAGE = 75  # Inception-ResNet-v2: its unpadded convolutions leave one pixel of 75, and none of 74


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The options of train.py.

    Args:
        argv: The command line after the program's name.

    Returns:
        A namespace with timm's attribute names. ``data`` has gone into ``data_dir``.

    Raises:
        UserError: An unknown option, a value out of range, a contradiction; one line.
    """
    args = parse_flags(TRAIN_FLAGS, argv, prog='train.py', refused=REFUSED, description=(
        "Train Inception-ResNet-v2, or any timm model, on NPU, CUDA or CPU. The options are those of timm's train.py; "
        "where two names are given, the second is Ascend ModelZoo's. '-' and '_' in names are the same."))
    _settle(args)
    for wrong in _contradictions(args):
        raise UserError(wrong)
    return args


def parse_flags(
        groups: Iterable[Group],
        argv: Sequence[str],
        *,
        prog: str,
        description: str,
        refused: dict[str, str] | None = None,
) -> argparse.Namespace:
    """Parse ``argv`` by a table of options, over the YAML file that ``-c`` names.

    Args:
        groups: The table.
        argv: The command line after the program's name.
        prog: The program's name, for ``--help``.
        description: The first lines of ``--help``.
        refused: Options that are known and not had, with the reason.

    Raises:
        UserError: In one line, anything that is wrong with the command line or the file.
    """
    groups, refused = tuple(groups), refused or {}
    parser = _build_parser(groups, prog, description)
    arguments = [_hyphens(word) for word in argv]
    for word in arguments:
        if (name := word.split('=')[0]) in refused:
            raise UserError(f'{name}: {refused[name]}')
    config = _config_file(arguments)
    args = argparse.Namespace()
    if config is not None:
        args = parser.parse_args(_config_words(parser, config, refused), args)
    args = parser.parse_args(arguments, args)
    del args.config
    for flag in _flags(groups):
        if flag.rest.get('nargs') == '*':
            setattr(args, flag.dest, dict(getattr(args, flag.dest) or {}))
        _check_range(flag, getattr(args, flag.dest))
    return args


def too_small(model: str, sizes: Iterable[int]) -> str:
    """What is wrong with images of these sizes for a model; nothing if nothing is."""
    smallest = min(sizes, default=SMALLEST_IMAGE)
    if not model.startswith('inception_resnet_v2') or smallest >= SMALLEST_IMAGE:
        return ''
    return f'image size {smallest}: Inception-ResNet-v2 needs at least {SMALLEST_IMAGE} pixels.'


def as_yaml(args: argparse.Namespace) -> str:
    """The options as a YAML file that ``-c`` reads back to the same options."""
    return yaml.safe_dump(vars(args), default_flow_style=False)


class _Parser(argparse.ArgumentParser):
    """Raises UserError with a suggestion instead of printing two hundred options and exiting."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r'unrecognized arguments: (--[^\s=]+)', message)
        if unknown:
            message = f'unknown option {unknown[1]}{_suggestion(unknown[1], self._option_string_actions)}'
        raise UserError(message.replace('argument ', '', 1) if message.startswith('argument ') else message)


def _build_parser(groups: Iterable[Group], prog: str, description: str) -> _Parser:
    parser = _Parser(
        prog=prog, description=description, usage='%(prog)s [DIR] [-c FILE] [options]', allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120))
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of options; those of the command line win')
    for group in groups:
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
        section.add_argument(*flag.names.split(), dest=flag.dest, action='store_true', help=text)
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
    """--data_path=a_b as --data-path=a_b."""
    if not word.startswith('--'):
        return word
    name, separator, value = word.partition('=')
    return name.replace('_', '-') + separator + value


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f'; did you mean {close[0]}?' if close else '; --help lists them all'


def _config_file(arguments: Sequence[str]) -> Path | None:
    finder = _Parser(add_help=False, allow_abbrev=False)
    finder.add_argument('-c', '--config', type=Path)
    return finder.parse_known_args(arguments)[0].config


def _config_words(parser: _Parser, path: Path, refused: dict[str, str]) -> list[str]:
    """The YAML file as a command line, so that both are read by the same rules."""
    try:
        options = yaml.safe_load(path.read_text(encoding='utf-8')) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f'cannot read the config {path}: {" ".join(str(error).split())}') from error
    if not isinstance(options, dict):
        raise UserError(f'config {path}: expected lines of the form `option: value`.')
    words: list[str] = []
    for key, value in options.items():
        name = '--data' if key == 'data' else '--' + str(key).replace('_', '-')
        if name in refused:
            if name == '--naflex-loader' and value:
                raise UserError(f"config {path}: '{key}': {refused[name]}")
        elif name not in parser._option_string_actions or name in ('--config', '--help'):
            raise UserError(f"config {path}: unknown key '{key}'{_suggestion(name, parser._option_string_actions)}")
        else:
            words += _as_arguments(path, parser._option_string_actions[name], name, value)
    return words


def _as_arguments(path: Path, action: argparse.Action, name: str, value: Any) -> list[str]:
    """One entry of a YAML file as words of a command line."""
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
        above = number >= low if flag.within[0] == '[' else number > low
        below = number <= high if flag.within[-1] == ']' else number < high
        if not (math.isfinite(number) and above and below):
            name = next((n for n in flag.names.split() if n.startswith('--')), flag.names)
            raise UserError(f'{name} {_as_words(number)}: must be {_in_words(flag.within, low, high)}.')


def _in_words(within: str, low: float, high: float) -> str:
    lower = f'{"at least" if within[0] == "[" else "more than"} {low:g}'
    upper = f'{"at most" if within[-1] == "]" else "less than"} {high:.10g}'
    parts = [text for text, bound in ((lower, low), (upper, high)) if math.isfinite(bound)]
    return ' and '.join(parts) or 'a finite number'


def _settle(args: argparse.Namespace) -> None:
    """Bring several names of one thing together."""
    args.data_dir = args.data or args.data_dir
    del args.data
    if args.opt_level is not None:
        args.amp = args.opt_level != 'O0'
    args.grad_accum_steps = max(1, args.grad_accum_steps)


def _contradictions(args: argparse.Namespace) -> Iterable[str]:
    """What does not fit together, a line each."""
    for group in (_model_contradictions, _loss_contradictions, _precision_contradictions, _process_contradictions,
                  _schedule_contradictions):
        yield from (text for wrong, text in group(args) if wrong)


_Rules = list[tuple[Any, str]]


def _model_contradictions(args: argparse.Namespace) -> _Rules:
    sizes = [size for size in (args.img_size, *(args.input_size or ())[1:], *(args.train_img_sizes or ())) if size]
    channels = args.in_chans or (args.input_size or [3])[0]
    return [
        (too_small(args.model, sizes), too_small(args.model, sizes)),
        (args.img_size and args.input_size and args.input_size[1:] != [args.img_size] * 2,
         '--img-size and --input-size name different sizes: give one of them.'),
        (args.in_chans and args.input_size and args.input_size[0] != args.in_chans,
         '--in-chans and --input-size name different numbers of channels: give one of them.'),
        (args.torchscript and args.torchcompile, '--torchscript and --torchcompile exclude each other.'),
        (args.torchscript and args.sync_bn, '--torchscript cannot script the layers of --sync-bn: leave one out.'),
        (args.torchscript and args.kd_model_name, '--torchscript and --kd-model-name exclude each other.'),
        (args.sync_bn and args.split_bn, '--sync-bn and --split-bn exclude each other.'),
        (args.torchcompile_mode and not args.torchcompile, '--torchcompile-mode needs --torchcompile.'),
        *((values is not None and len(values) not in (1, channels), f'{name}: expected one number, or {channels}.')
          for name, values in (('--mean', args.mean), ('--std', args.std))),
        (args.kd_model_name is None and (args.distill_loss_weight is not None or args.task_loss_weight is not None),
         '--distill-loss-weight and --task-loss-weight need a teacher: --kd-model-name.'),
    ]


def _loss_contradictions(args: argparse.Namespace) -> _Rules:
    ranges = {'--scale': args.scale, '--ratio': args.ratio, '--cutmix-minmax': args.cutmix_minmax}
    mixed = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    return [
        (args.aug_splits == 1, '--aug-splits 1: one split is none; use 0, or at least 2.'),
        (args.jsd_loss and args.aug_splits < 2, '--jsd-loss needs --aug-splits 2 or more.'),
        (args.jsd_loss and args.bce_loss, '--jsd-loss and --bce-loss exclude each other.'),
        (args.split_bn and args.aug_splits < 2 and not args.resplit, '--split-bn needs --aug-splits or --resplit.'),
        (mixed and args.aug_splits > 1, '--mixup and --cutmix do not work with --aug-splits.'),
        *((values is not None and (len(values) != 2 or values[0] > values[1]),
           f'{name}: expected two numbers, the smaller one first.')
          for name, values in ranges.items()),
        (args.train_img_sizes and args.aug_splits > 1, '--train-img-sizes does not work with --aug-splits.'),
        (args.train_img_sizes and args.use_multi_epochs_loader,
         '--train-img-sizes does not work with --use-multi-epochs-loader.'),
    ]


def _precision_contradictions(args: argparse.Namespace) -> _Rules:
    return [
        (args.amp and args.model_dtype not in (None, 'float32'),
         f'--model-dtype {args.model_dtype} is for training without --amp: leave one out.'),
        (args.amp_impl == 'apex' and not args.amp, '--amp-impl apex needs --amp or --opt-level O1 or O2.'),
        (args.loss_scale is not None and not args.amp, '--loss-scale needs --amp or --opt-level O1 or O2.'),
    ]


def _process_contradictions(args: argparse.Namespace) -> _Rules:
    devices = (args.device_list or '').replace(' ', '').strip(',')
    names = devices.split(',') if devices else []
    return [
        (args.device_list is not None and not (all(map(str.isdecimal, names)) and len(set(names)) == len(names) > 0),
         f"--device-list '{args.device_list}': expected different numbers of cards such as '0,1,2,3'."),
        (len(names) > 1 and not args.multiprocessing_distributed,
         '--device-list with several cards needs --multiprocessing-distributed.'),
        ((args.rank or 0) >= (args.world_size or 1) and args.rank,
         f'--rank {args.rank} must be less than --world-size {args.world_size or 1}.'),
        (args.dist_url and not re.fullmatch(r'env://|tcp://[^/:]+:\d+|tcp://\[[^\]]+\]:\d+', args.dist_url),
         f"--dist-url '{args.dist_url}': expected tcp://host:port or env://."),
        (args.wandb_resume_id and not args.resume, '--wandb-resume-id needs --resume.'),
        (args.push_to_hub and args.model.partition('.')[0] not in PUBLISHED,
         f'--push-to-hub publishes {" and ".join(PUBLISHED)}, not {args.model}.'),
        (args.push_to_hub and not args.epochs,
         '--push-to-hub needs a training: `python -m timm_npu_irv2.hub` publishes a checkpoint.'),
        (args.resume == 'auto' and not args.experiment, '--resume auto needs --experiment, the folder to look in.'),
    ]


def _schedule_contradictions(args: argparse.Namespace) -> _Rules:
    sizes = args.train_img_sizes or ()
    return [
        (args.lr_noise is not None and len(args.lr_noise) > 2, '--lr-noise: expected one or two numbers.'),
        (sorted(set(args.decay_milestones)) != args.decay_milestones, '--decay-milestones must be increasing.'),
        *((values is not None and len(values) != len(sizes), f'{name}: expected one for each of --train-img-sizes.')
          for name, values in (
              ('--train-batch-sizes', args.train_batch_sizes), ('--train-size-probs', args.train_size_probs))),
        (args.train_size_schedule == 'progressive' and len(sizes) < 2,
         '--train-size-schedule progressive needs at least two --train-img-sizes.'),
        (args.train_size_probs is not None and sum(args.train_size_probs) <= 0, '--train-size-probs: all are 0.'),
    ]

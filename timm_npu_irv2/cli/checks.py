"""Checks of options that several scripts share."""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg

from .. import device as devices
from ..errors import UserError, one_line
from ..serialization import describe_obstacle
from .flags import OUR_MODEL, TRAIN_FLAGS

__all__ = ['check_compile_backend', 'check_image_size', 'check_installed', 'check_output_file', 'check_rules',
           'dataset_rules', 'given_options', 'name_option', 'translate_compile_errors']

DATASET_TYPES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')


def check_rules(rules: Iterable[tuple[Any, str]]) -> None:
    """Raise UserError with the message of the first rule that is broken.

    Args:
        rules: Pairs of a condition, true if the rule is broken, and a message.
    """
    for broken, message in rules:
        if broken:
            raise UserError(message)


def check_image_size(model: str, sizes: Iterable[int]) -> None:
    """Raise UserError if an image is too small for Inception-ResNet-v2.

    Args:
        model: Name of the model; other models are not checked.
        sizes: Heights and widths in pixels.
    """
    smallest = get_pretrained_cfg(OUR_MODEL).to_dict()['min_input_size'][-1]  # type: ignore[union-attr]  # it exists
    size = min(sizes, default=smallest)
    if model.startswith('inception_resnet_v2') and size < smallest:
        raise UserError(f'image size {size}: Inception-ResNet-v2 needs at least {smallest} pixels.')


def check_compile_backend(name: str | None) -> None:
    """Raise UserError if torch.compile has no backend of this name; None is no backend."""
    if name is None:
        return
    import torch._dynamo  # noqa: PLC0415 - takes seconds, and is needed for torch.compile only

    backends = torch._dynamo.list_backends(exclude_tags=None)
    if name not in backends:
        raise UserError(f"--torchcompile {name}: no such backend; use one of {', '.join(sorted(backends))}.")


def check_installed(option: str, *packages: str) -> None:
    """Raise UserError if a package that an option needs is not installed."""
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        names = ['scikit-learn' if package == 'sklearn' else package for package in missing]
        raise UserError(f'{option} needs {" and ".join(names)}: pip install {" ".join(names)}.')


def check_output_file(option: str, path: str, make_folder: bool = False) -> None:
    """Raise UserError if a file cannot be written, before the work whose result it is for.

    Args:
        option: Option that names the file.
        path: File to write; '' is none.
        make_folder: The folder of the file is made where it is missing.
    """
    if not path:
        return
    folder = Path(path).parent
    if make_folder:
        above = (folder, *folder.absolute().parents)
        folder = next(each for each in above if os.path.exists(each))  # noqa: PTH110 - Path.exists may raise
    if not folder.is_dir():
        raise UserError(f'{option}: cannot write {path}: there is no folder {folder}.')
    if obstacle := describe_obstacle(path):
        raise UserError(f'{option}: cannot write {path}: {obstacle}.')
    if os.path.exists(path) and not os.access(path, os.W_OK):  # noqa: PTH110 - Path.exists may raise
        raise UserError(f'{option}: cannot write {path}: it is read-only.')
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f'{option}: cannot write {path}: no permission for the folder {folder}.')


def dataset_rules(name: str) -> list[tuple[Any, str]]:
    """Return the rules for the name of a data set."""
    kind, slash, rest = name.partition('/')
    known = kind.lower() in DATASET_TYPES if slash else kind in ('', 'folder')
    return [(not known or (slash and not rest),
             f"--dataset '{name}': expected <type>/<name> with one of the types {', '.join(DATASET_TYPES)}, or nothing "
             'for a folder of images.')]


@contextlib.contextmanager
def name_option(option: str) -> Iterator[None]:
    """Turn an error in the construction of an object of timm or torch into one line that names the option.

    Args:
        option: The option that the object is constructed from, with its value.

    Raises:
        UserError: Anything but exhausted memory, whose advice comes from elsewhere.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # timm and torch check arguments by whatever fails first
        if devices.is_out_of_memory(error):
            raise
        raise UserError(f'{option}: {one_line(error)}') from error


def given_options(args: Mapping[str, Any], *titles: str) -> str:
    """Return the options of train.py that have another value than by default, with their values, as on a command line.

    Args:
        args: Values of all options, by the names of their attributes.
        titles: Groups of options to look at, by the headings of ``--help``.
    """
    flags = {flag.dest: flag for group in TRAIN_FLAGS if group.title in titles for flag in group.flags}
    given = {name: args[name] for name, flag in flags.items() if args.get(name, flag.default) != flag.default}
    return ' '.join(f'--{name.replace("_", "-")}' + ('' if value is True else f' {_in_words(value)}')
                    for name, value in given.items())


def _in_words(value: Any) -> str:
    return ' '.join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@contextlib.contextmanager
def translate_compile_errors(backend: str | None) -> Iterator[None]:
    """Turn an error of torch.compile, which compiles in the first call of a model, into one line.

    Args:
        backend: Backend that the options name; None where at most --tuned compiles.

    Raises:
        UserError: The backend cannot compile the model, or lacks something, such as a C++ compiler.
    """
    try:
        yield
    except RuntimeError as error:
        dynamo = sys.modules.get('torch._dynamo.exc')
        if dynamo is None or not isinstance(error, dynamo.TorchDynamoException):
            raise
        option, advice = f'--torchcompile {backend}', 'Use another backend, or leave the option out.'
        if backend is None:
            option, advice = 'the settings of --tuned', '--tuned off ignores them.'
        raise UserError(f'{option}: the model cannot be compiled: {one_line(error)} {advice}') from error

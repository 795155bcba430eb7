"""The class table: which name has which number, the same in every process and in every tool."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from timm.data import CustomDatasetInfo, ImageNetInfo, infer_imagenet_subset
from timm.data.dataset_info import DatasetInfo
from timm.data.readers.class_map import load_class_map

from .. import rules
from ..errors import UserError, first_line
from ..schema import MOST_CLASSES
from ..serialization import open_regular, read_text

__all__ = ['class_indices', 'class_info', 'class_order', 'clean_name', 'label_names', 'map_classes', 'natural_key',
           'natural_prefix', 'number_classes', 'read_class_map']

LONGEST_NAME = 1000  # characters, as in a checkpoint
_NUMBER = re.compile(r'\d+')


def natural_key(text: str) -> str:
    """Return a sort key: numbers by their value and letters without case, then the exact spelling.

    Without the spelling, 'Cat' and 'cat' or '1' and '01' would come in any order. Two NULs, which are in no name, end
    the first part. The key of a number and a list of texts would take ten times the memory.
    """
    return f'{natural_prefix(text)}\0\0{text}'


def natural_prefix(text: str) -> str:
    """Return the first part of a sort key: a number is a NUL, the count of its digits, and these; letters are small."""
    return _NUMBER.sub(_number_key, text.lower())


def _number_key(match: re.Match) -> str:
    digits = (match[0] if match[0].isascii() else str(int(match[0]))).lstrip('0')
    return f'\0{chr(1 + min(len(digits), 0xFFFF))}{digits}'


def clean_name(name: str) -> str:
    """Return the name of a class without a byte order mark and blanks at its ends, in Unicode's form NFC.

    macOS and its archives write letters with accents in another form, which looks the same.
    """
    return unicodedata.normalize('NFC', name.strip('\ufeff \t\r\n\u00a0'))


def class_order(names: Iterable[str]) -> list[str]:
    """Return the different names in the order in which they are numbered."""
    return sorted(set(names), key=natural_key)


def number_classes(folders: Iterable[str]) -> dict[str, int]:
    """Return the numbers of the classes by name, for class folders given by their paths within the data set.

    The name of a class is that of the innermost folder, as in timm.

    Raises:
        UserError: An image is in no class folder, or folders have the same name.
    """
    paths: dict[str, set[str]] = {}
    for folder in set(folders):
        paths.setdefault(clean_name(folder.rpartition('/')[2]), set()).add(folder)
    if '' in paths:
        raise UserError('there are images outside of class folders: move them into a folder for each class.')
    for name, places in paths.items():
        if len(places) > 1:
            raise UserError(f"class '{name}' is in several folders, {_listed(sorted(places))}: rename them, or join "
                            'them into one.')
    return {name: index for index, name in enumerate(class_order(paths))}


def map_classes(found: Iterable[str], expected: Mapping[str, int]) -> None:
    """Raise UserError if a class that was found is none of the network's.

    Args:
        found: Names of the classes in the data.
        expected: Numbers of the network's classes by name.
    """
    unknown = class_order(set(found) - set(expected))
    if unknown:
        missing = class_order(set(expected) - set(found))
        others = f'; not in the data: {_listed(missing)}' if missing else ''
        raise UserError(f'the data has classes that the network does not know: {_listed(unknown)}{others}. Rename the '
                        'folders, or number them with --class-map.')


def read_class_map(path: str | os.PathLike, root: str | os.PathLike = '') -> dict[str, int]:
    """Return the numbers of the classes by name from a file, a name per line, or a pickled dict as timm takes it.

    Args:
        path: File, as it stands or relative to ``root``.
        root: Folder of the data set.

    Raises:
        UserError: No such file, or it is no class map.
    """
    source = path if os.path.exists(path) else os.path.join(root, path)  # noqa: PTH110, PTH118 - Path.exists may raise
    if os.fspath(source).lower().endswith('.txt'):
        table = _read_class_lines(source, path)
    else:
        table = _read_pickled_map(source, path)
    with rules.naming(f'--class-map {path}'):
        key = rules.either(rules.number(integer=True), rules.text(LONGEST_NAME))
        rules.mapping(rules.number(0, MOST_CLASSES, integer=True), key=key)(table, 'the table')
    return {clean_name(name) if isinstance(name, str) else name: index for name, index in table.items()}


def _read_class_lines(source: str | os.PathLike, path: str | os.PathLike) -> dict[str, int]:
    lines = [clean_name(line) for line in read_text(source, f'--class-map {path}').splitlines()]
    if twice := [name for name, count in Counter(filter(None, lines)).items() if count > 1]:
        raise UserError(f"--class-map {path}: '{min(twice)}' is in several lines.")
    return {name: index for index, name in enumerate(lines) if name}


def _read_pickled_map(source: str | os.PathLike, path: str | os.PathLike) -> dict[str, int]:
    try:
        open_regular(source).close()  # a pipe would have to be waited for
        return load_class_map(os.fspath(source))
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        reason = getattr(error, 'strerror', None) or first_line(error)
        raise UserError(f'--class-map {path}: {reason}') from error


def label_names(class_to_idx: Mapping[str, int] | None, num_classes: int) -> list[str] | None:
    """Return the name of each output of a network; None if there are no names.

    Outputs without a class, such as the one that the model zoo's network has more, are called unused_<number>.
    """
    if not class_to_idx:
        return None
    names: dict[int, str] = {}
    for name, index in class_to_idx.items():
        names.setdefault(index, name)
    return [names.get(index, f'unused_{index}') for index in range(num_classes)]


def class_indices(names: Sequence[str] | Mapping[Any, str] | None) -> dict[str, int] | None:
    """Return the class indices by name for the ``label_names`` of a ``pretrained_cfg``; None if there are none."""
    if not names:
        return None
    items = names.items() if isinstance(names, Mapping) else enumerate(names)
    indices: dict[str, int] = {}
    for index, name in items:
        indices.setdefault(clean_name(name), int(index))
    return indices


def class_info(pretrained_cfg: Mapping[str, Any], num_classes: int) -> DatasetInfo | None:
    """Return timm's description of the classes of a network, or None if their names are not known.

    Args:
        pretrained_cfg: Configuration of the network; ``label_names`` in it are the names that were published.
        num_classes: Number of classes; without published names it selects ImageNet-1k, 21k and so on.
    """
    if names := pretrained_cfg.get('label_names'):
        return CustomDatasetInfo(names, pretrained_cfg.get('label_descriptions'))
    subset = infer_imagenet_subset({'num_classes': num_classes})
    return ImageNetInfo(subset) if subset else None


def _listed(names: Sequence[str], limit: int = 3) -> str:
    rest = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(f"'{name}'" for name in names[:limit]) + rest

"""A checkpoint as a folder that is a repository of the Hugging Face Hub in timm's format."""

import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import ImageNetInfo
from timm.models._hub import save_config_for_hf
from torch import nn

from .. import rules, schema
from ..data.classes import clean_name, map_classes, number_classes
from ..data.folder import iterate_images
from ..data.splits import find_split
from ..errors import UserError, one_line
from ..published import CONFIG, WEIGHTS
from ..serialization import atomic_write, make_folder, read_json, read_text, save_weights
from . import card
from .checkpoint import ARCHITECTURES, Checkpoint, read
from .client import CARD, CURVES

__all__ = ['export']


def export(
        checkpoint: str | os.PathLike,
        folder: str | os.PathLike,
        *,
        target: str = 'npu',
        ema: bool = False,
        dtype: str = 'float32',
        class_names: str | os.PathLike | None = None,
        report: str | os.PathLike | None = None,
        license: str = 'apache-2.0',
        datasets: Sequence[str] = (),
        preprocessing: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint as a folder that is a repository of the hub, for :func:`push` or ``local-dir:``.

    Args:
        checkpoint: A file of train.py's, timm's, Cadene's or the model zoo's; .pth or .safetensors.
        folder: Where to write; what else is there stays.
        target: 'npu' for this package's network, 'timm' for a repository that timm loads without this package.
        ema: Take the averaged weights.
        dtype: The type the weights are rounded to: 'float32', 'float16' or 'bfloat16'.
        class_names: A file with one name per line, or a folder or tar file of class folders; else the checkpoint's.
        report: A report.json of train.py or the JSON of validate.py; by default the one beside the checkpoint.
        license: The hub's name of a license.
        datasets: The hub's names of the data sets trained on.
        preprocessing: timm's ``img_size``, ``mean``, ``std``, ``crop_pct``, ``interpolation`` where the checkpoint
            does not say, or is wrong.

    Returns:
        The folder.

    Raises:
        UserError: The file is not there, not a checkpoint, not of this network, or has no averaged weights; or the
            number of names is not that of the logits.
        CannotWrite: The folder cannot be written to.
    """
    source, folder = Path(checkpoint), Path(folder)
    content = read(source, ema)
    model: Any = _build(content, ARCHITECTURES[target], source).to(getattr(torch, dtype))
    content.describe(model.pretrained_cfg)
    trained = model.pretrained_cfg.pop('label_names', None)
    names = _names(Path(class_names) if class_names else None, trained, model.num_classes)
    figures = _figures(source, content, Path(report) if report else None)
    config = _config(model, names, license, preprocessing or {})
    make_folder(folder)
    save_weights(model.state_dict(), folder / WEIGHTS)
    atomic_write(folder / CONFIG, json.dumps(config, indent=2) + '\n')
    curves = source.parent / CURVES
    if figures and curves.is_file():
        atomic_write(folder / CURVES, curves.read_bytes())
    atomic_write(folder / CARD, card.write(
        folder.name or folder.resolve().name, config, target=target, license=license, datasets=datasets,
        recipe=content.args, figures=figures, averaged=content.averaged, dtype=dtype,
        curves=CURVES if (folder / CURVES).is_file() else None))
    return folder


def _build(content: Checkpoint, architecture: str, source: Path) -> nn.Module:
    """Return the network with the weights of a checkpoint, with as many classes and channels as they have."""
    try:
        model = timm.create_model(architecture, **content.model_arguments)
        model.load_state_dict(content.state_dict)  # our network translates it
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f'{source} does not fit {architecture}: {one_line(error)}') from error
    return model.eval()


def _names(source: Path | None, trained: list[str] | None, count: int) -> list[str] | None:
    """Return the names of the classes from --class-names, otherwise those of the training."""
    names = trained if source is None else _read_names(source, trained)
    if names is not None and len(names) != count:
        raise UserError(f'--class-names {source} has {len(names)} names, the network has {count} logits: one name for '
                        'each is needed.')
    return names


def _read_names(source: Path, trained: Sequence[str] | None) -> list[str]:
    """Return the lines of a file, or the classes of a data set, in the order of the training if it had these names."""
    if source.is_dir() or source.suffix.lower() == '.tar':
        found = _class_folders(find_split(source, 'train'))
        if trained is None or set(found).isdisjoint(trained):
            return found
        map_classes(found, {name: index for index, name in enumerate(trained)})
        return list(trained)
    lines = [clean_name(line) for line in read_text(source, f'--class-names {source}').splitlines()]
    return [line for line in lines if line]


def _class_folders(root: Path) -> list[str]:
    """Return the class folders of a folder or tar file in their order; folders without any image are taken, too."""
    try:
        folders = {image.folder for image in iterate_images(root)}
    except UserError:
        if not root.is_dir():
            raise
        folders = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith('.')}
    try:
        return list(number_classes(folders))
    except UserError as error:
        raise UserError(f'--class-names {root}: {error}') from None


def _config(
        model: nn.Module,
        names: list[str] | None,
        license: str,
        data_config: dict[str, Any],
) -> dict[str, Any]:
    """Return what timm writes into config.json."""
    config: dict[str, Any] = {'pretrained_cfg': {'tag': '', 'license': license, 'hf_hub_filename': WEIGHTS}}
    if mode := cast(dict, model.pretrained_cfg).pop('input_img_mode', None):
        config['input_img_mode'] = mode  # outside of pretrained_cfg, in which timm takes no entries but its own
    if names:
        config['label_names'] = names
        known = ImageNetInfo('imagenet-22k')
        if all(re.fullmatch(r'n\d{8}', name) for name in names):
            config['label_descriptions'] = {
                name: known.label_name_to_description(name) for name in names if name in known.label_descriptions()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        save_config_for_hf(model, str(path), model_config=config, data_config=data_config)
        written = json.loads(path.read_text(encoding='utf-8'))
    written['model_args'].pop('num_classes')  # it stands outside, too, and transformers refuses it here
    return written


def _figures(source: Path, content: Checkpoint, report: Path | None) -> dict[str, Any]:
    """Return what report.json says about these weights; nothing if it is about others.

    A report given by name is believed. The one beside a checkpoint is about a whole run, and has the figures of its
    best and of its last epoch.
    """
    given, path = report is not None, report or source.parent / 'report.json'
    if not given and not (path.is_file() and content.epoch is not None):
        return {}
    figures = read_json(path)
    with rules.naming(path):
        schema.check_report(figures)
    if given and figures.get('top1') is None:
        raise UserError(f'{path} is not a report with a top1.')
    if given:
        return figures
    last = figures.get('last_epoch') or {}
    if content.epoch == last.get('epoch'):
        figures |= {key: last.get(f'eval_{key}') for key in ('top1', 'top5', 'loss')}
    elif content.epoch != figures.get('best_epoch'):
        figures |= {'top1': None, 'top5': None, 'loss': None}
    return figures if content.measured else {**figures, 'top1': None, 'top5': None, 'loss': None}

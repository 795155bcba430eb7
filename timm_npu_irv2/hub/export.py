"""A checkpoint as a folder that is a repository of the Hugging Face Hub in timm's format."""

import argparse
import json
import logging
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from .. import serialization, weights
from ..errors import UserError
from ..serialization import atomic_path, atomic_write
from . import card
from .client import CARD, CONFIG, CURVES, WEIGHTS, one_line

__all__ = ['ARCHITECTURES', 'OURS', 'PREPROCESSING', 'Checkpoint', 'export', 'names_in', 'read_checkpoint']

_logger = logging.getLogger(__name__)

OURS = 'inception_resnet_v2_npu'
ARCHITECTURES = {'npu': OURS, 'timm': 'inception_resnet_v2'}
PREPROCESSING = ('img_size', 'input_size', 'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')


@dataclass
class Checkpoint:
    """A file of weights and what it knows about itself; the latter is empty unless train.py, ours or timm's, wrote it.

    Attributes:
        state_dict: The weights, in any dialect.
        args: The options of the training.
        epoch: The last epoch it was trained in, from 0.
        class_to_idx: The names of the classes it was trained on.
        averaged: Whether the weights are the moving average.
        measured: Whether the figures in the run's report are those of these weights.
    """

    state_dict: dict[str, Tensor]
    args: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    class_to_idx: dict[str, int] | None = None
    averaged: bool = False
    measured: bool = True


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
        dtype: 'float32', 'float16' or 'bfloat16': what the weights are rounded to.
        class_names: A file with a name a line, or a folder of class folders; by default the checkpoint's.
        report: A report.json of train.py or the JSON of validate.py; by default the one beside the checkpoint.
        license: The hub's name of a license.
        datasets: The hub's names of the data sets trained on.
        preprocessing: timm's ``img_size``, ``mean``, ``std``, ``crop_pct``, ``interpolation`` where the checkpoint
            does not say, or is wrong.

    Returns:
        The folder.

    Raises:
        UserError: The file is not there, not a checkpoint, not of this network, has no averaged weights; the names
            are not as many as the logits; the folder cannot be written.
    """
    source, folder = Path(checkpoint), Path(folder)
    content = read_checkpoint(source, ema)
    model = _build(content, target, source).to(getattr(torch, dtype))
    names = _read_names(Path(class_names)) if class_names else names_in(content, model.num_classes)
    if names is not None and len(names) != model.num_classes:
        raise UserError(f'--class-names {class_names} has {len(names)} names, {source} has {model.num_classes} logits: '
                        'one name for each is needed.')
    figures = _figures(source, content, Path(report) if report else None)
    settings = {key: content.args.get(key) for key in PREPROCESSING} | (preprocessing or {})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        serialization.save_weights(model.state_dict(), folder / WEIGHTS)
        _write_config(model, folder / CONFIG, names, license, {k: v for k, v in settings.items() if v is not None})
        curves = source.parent / CURVES
        if figures and curves.is_file():
            atomic_write(folder / CURVES, curves.read_bytes())
        atomic_write(folder / CARD, card.write(
            folder.name or folder.resolve().name, json.loads((folder / CONFIG).read_text()), target=target,
            license=license, datasets=datasets, recipe=content.args, figures=figures, averaged=content.averaged,
            dtype=dtype, curves=CURVES if (folder / CURVES).is_file() else None))
    except OSError as error:
        raise UserError(f'{folder} cannot be written: {error.strerror or error}.') from error
    return folder


def read_checkpoint(path: Path, ema: bool | None) -> Checkpoint:
    """A file with or without its averaged weights; with them if it has any for None."""
    state_dict = serialization.load_weights(path, use_ema=ema is not False)
    content: dict[str, Any] = {}
    if path.suffix != '.safetensors':
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's own checkpoints hold one
            content = torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    if 'state_dict' not in content:
        content = {}
    has_average = content.get('state_dict_ema') is not None
    if ema and not has_average:
        raise UserError(f'--ema: {path} holds no averaged weights; train.py --model-ema makes them.')
    if has_average and ema is False:
        _logger.warning(f'{path} also holds averaged weights, which were what was evaluated; --ema takes them.')
    args = content.get('args') or {}
    return Checkpoint(
        state_dict, args if isinstance(args, dict) else vars(args), content.get('epoch'),
        (content.get('training') or {}).get('class_to_idx'), averaged=has_average and ema is not False,
        measured=not has_average or ema is not False)


def _build(content: Checkpoint, target: str, source: Path) -> nn.Module:
    """The target's network with the checkpoint's weights, in as many classes and channels as they have."""
    state_dict = weights.convert(content.state_dict, to='timm')  # which our network translates as it loads
    arguments = {
        'num_classes': len(state_dict['classif.weight']) if 'classif.weight' in state_dict else 0,
        'in_chans': state_dict['conv2d_1a.conv.weight'].shape[1] if 'conv2d_1a.conv.weight' in state_dict else 3,
        'global_pool': content.args.get('gp'),
        **(content.args.get('model_kwargs') or {}),
    }
    try:
        model = timm.create_model(ARCHITECTURES[target], **arguments)
        model.load_state_dict(state_dict)
    except (RuntimeError, TypeError) as error:
        raise UserError(f'{source} does not fit {ARCHITECTURES[target]}: {one_line(error)}') from error
    return model.eval()


def names_in(content: Checkpoint, num_classes: int) -> list[str] | None:
    """The names of the logits, as far as the training had classes for them: the zoo's network has one logit more."""
    if not content.class_to_idx:
        return None
    names = {index: name for name, index in content.class_to_idx.items()}
    return [names.get(index, f'unused_{index}') for index in range(num_classes)]


def _read_names(source: Path) -> list[str]:
    """The lines of a file, or the names of a folder's folders (of its train/ if it has one) as ImageFolder sorts."""
    try:
        if source.is_dir():
            root = source / 'train' if (source / 'train').is_dir() else source
            return sorted(path.name for path in root.iterdir() if path.is_dir())
        return [line.strip() for line in source.read_text(encoding='utf-8').splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'--class-names {source}: {one_line(error)}') from error


def _write_config(
        model: nn.Module,
        path: Path,
        names: list[str] | None,
        license: str,
        data_config: dict[str, Any],
) -> None:
    """timm's config.json, whole."""
    config: dict[str, Any] = {'pretrained_cfg': {'tag': '', 'license': license, 'hf_hub_filename': WEIGHTS}}
    if names:
        config['label_names'] = names
        known = ImageNetInfo('imagenet-22k')
        if all(re.fullmatch(r'n\d{8}', name) for name in names):
            config['label_descriptions'] = {
                name: known.label_name_to_description(name) for name in names if name in known.label_descriptions()}
    with atomic_path(path) as temporary:
        save_config_for_hf(model, temporary, model_config=config, data_config=data_config)


def _figures(source: Path, content: Checkpoint, report: Path | None) -> dict[str, Any]:
    """What report.json says about these very weights; nothing if it is about others.

    A report given by name is taken at its word. The one beside a checkpoint is about a whole run, whose best and last
    epochs it tells.
    """
    given, path = report is not None, report or source.parent / 'report.json'
    if not given and not (path.is_file() and content.epoch is not None):
        return {}
    try:
        figures = json.loads(path.read_text(encoding='utf-8'))
        if given:
            return {**figures, 'top1': float(figures['top1'])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f'{path} is not a report with a top1: {one_line(error)}') from error
    last = figures.get('last_epoch') or {}
    if content.epoch == last.get('epoch'):
        figures |= {key: last.get(f'eval_{key}') for key in ('top1', 'top5', 'loss')}
    elif content.epoch != figures.get('best_epoch'):
        figures |= {'top1': None, 'top5': None, 'loss': None}
    return figures if content.measured else {**figures, 'top1': None, 'top5': None, 'loss': None}

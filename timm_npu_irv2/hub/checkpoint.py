"""A checkpoint to publish or to load: its weights, and what the file knows about them."""

import functools
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import rules, schema, weights
from ..data.pipeline import remember_training
from ..errors import UserError
from ..serialization import read_checkpoint

__all__ = ['ARCHITECTURES', 'OURS', 'PREPROCESSING', 'Checkpoint', 'read']

_logger = logging.getLogger(__name__)

OURS = 'inception_resnet_v2_npu'
ARCHITECTURES = {'npu': OURS, 'timm': 'inception_resnet_v2'}
PREPROCESSING = ('img_size', 'mean', 'std', 'crop_pct', 'interpolation')  # options of `hub export`


@dataclass
class Checkpoint:
    """Weights and what their file knows about them; the latter is empty unless train.py, ours or timm's, wrote it.

    Attributes:
        path: The file.
        state_dict: The weights, in timm's dialect.
        args: The options of the training.
        epoch: The last epoch of the training, from 0.
        class_to_idx: The index of each class, by name.
        pipeline: The image pipeline of the training, as entries of a ``pretrained_cfg``.
        averaged: True if the weights are the moving average.
        measured: True if the figures in the report of the run are those of these weights.
    """

    path: Path
    state_dict: dict[str, Tensor]
    args: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    class_to_idx: dict[str, int] | None = None
    pipeline: dict[str, Any] | None = None
    averaged: bool = False
    measured: bool = True

    @functools.cached_property
    def model_arguments(self) -> dict[str, Any]:
        """Arguments of ``timm.create_model`` for a network that these weights fit, checked by :mod:`.schema`."""
        classifier, stem = (self.state_dict.get(f'{name}.weight') for name in ('classif', 'conv2d_1a.conv'))
        arguments = {
            'global_pool': self.args.get('gp'),
            **(self.args.get('model_kwargs') or {}),
            'num_classes': 0 if classifier is None else len(classifier),
            'in_chans': 3 if stem is None else stem.shape[1],
        }
        with rules.naming(self.path):
            schema.check_model_arguments(arguments, OURS)
        return arguments

    def describe(self, pretrained_cfg: dict[str, Any]) -> None:
        """Put the image pipeline and the names of the classes into a ``pretrained_cfg``."""
        content = {'args': self.args, 'training': {'class_to_idx': self.class_to_idx, 'pipeline': self.pipeline}}
        remember_training(pretrained_cfg, content, self.model_arguments['num_classes'])
        size = pretrained_cfg['input_size'][1:]
        pretrained_cfg['input_size'] = (self.model_arguments['in_chans'], *size)


def read(path: Path, ema: bool | None) -> Checkpoint:
    """Return the checkpoint in a file of weights in any dialect.

    Args:
        path: A file that :func:`.serialization.read_checkpoint` reads.
        ema: True for the averaged weights, False for the others, None for averaged ones if there are any.

    Raises:
        UserError: The file cannot be read, is not of this network, or has no averaged weights.
    """
    content = read_checkpoint(path)
    average = content.get('state_dict_ema')
    if ema and average is None:
        raise UserError(f'--ema: {path} holds no averaged weights; train.py --model-ema makes them.')
    if ema is False and average is not None:
        _logger.warning(f'{path} also holds averaged weights, which are the ones that were evaluated; use --ema to '
                        'export those.')
    averaged = ema is not False and average is not None
    state_dict = content['state_dict' + ('_ema' if averaged else '')]
    training = content.get('training') or {}
    return Checkpoint(
        path, weights.convert(state_dict, to='timm'), content.get('args') or {}, content.get('epoch'),
        training.get('class_to_idx'), training.get('pipeline'), averaged=averaged, measured=averaged or average is None)

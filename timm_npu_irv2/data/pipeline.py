"""The image pipeline: from a decoded image to the input of a network."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.loader import adapt_to_chs
from timm.data.model_config import get_model_input_config, resolve_input_data_config
from timm.layers import apply_test_time_pool
from torch import nn

from ..errors import UserError, first_line
from .classes import label_names
from .fast import FastTransform

__all__ = ['MODES', 'MODE_OF_CHANNELS', 'MOST_CHANNELS', 'ImagePipeline', 'pool_over_positions', 'remember_training',
           'trained_channels']

MODES = ('L', 'LA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV')  # 8 bits a channel, and Pillow converts any image to them

MOST_CHANNELS = 4
MODE_OF_CHANNELS = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}


@dataclass(frozen=True)
class ImagePipeline:
    """Settings that turn an image file into the input of a network, by timm's names.

    They travel in a model's ``pretrained_cfg``: from the checkpoint to the export, the ONNX file and the folder of a
    deployed network.

    Attributes:
        input_size: (channels, height, width).
        mean: Mean of the pixels, from 0 to 1, one per channel.
        std: Standard deviation of the pixels, one per channel.
        interpolation: Resize method.
        crop_pct: Part of the image that the centre crop keeps.
        crop_mode: 'center', 'squash' or 'border'.
        crop_border_pixels: Pixels to cut off the border; None for none.
        input_img_mode: PIL mode that every image is converted to.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = 'bicubic'
    crop_pct: float = 0.875
    crop_mode: str = 'center'
    crop_border_pixels: int | None = None
    input_img_mode: str = 'RGB'

    @classmethod
    def for_model(
            cls,
            model: nn.Module,
            options: Mapping[str, Any] | None = None,
            use_test_size: bool = False,
    ) -> 'ImagePipeline':
        """Return the pipeline that a model's ``pretrained_cfg`` describes, unless options say otherwise.

        Args:
            model: Model of timm's or this package's, with a ``pretrained_cfg``.
            options: Values by timm's names: img_size, input_size, in_chans, mean, std, interpolation, crop_pct,
                crop_mode, crop_border_pixels, input_img_mode; None for those that were not given. Others are ignored.
            use_test_size: Take the size for testing, where the model has one.

        Raises:
            UserError: The options do not fit the model.
        """
        options = dict(options or {})
        cfg = dict(getattr(model, 'pretrained_cfg', None) or {})
        channels = get_model_input_config(model)['input_size'][0]
        cfg |= {key: adapt_to_chs(tuple(cfg[key]), channels) for key in ('mean', 'std') if cfg.get(key)}
        try:
            config = resolve_input_data_config(model, options, cfg, use_test_size)
        except (AssertionError, ValueError) as error:
            raise UserError(f'the images do not fit the model: {first_line(error)}') from error
        config['crop_border_pixels'] = options.get('crop_border_pixels')
        mode = options.get('input_img_mode') or cfg.get('input_img_mode')
        if not options.get('input_img_mode') and mode in MODES and Image.getmodebands(mode) != config['input_size'][0]:
            mode = None  # the model has been adapted to other channels
        return cls.from_config(config, mode)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], input_img_mode: str | None = None) -> 'ImagePipeline':
        """Return the pipeline of a data config of timm, with a mean and a deviation for each channel.

        Args:
            config: Data config as ``timm.data.resolve_data_config`` returns it.
            input_img_mode: PIL mode; None takes the mode of the config, else the usual one for the number of channels.

        Raises:
            UserError: No such mode, or a mode with another number of channels.
        """
        channels = config['input_size'][0]
        mode = input_img_mode or config.get('input_img_mode') or MODE_OF_CHANNELS.get(channels)
        if mode is None:
            raise UserError(f'images have 1 to 4 channels, not {channels}: use another --in-chans.')
        if mode not in MODES:
            raise UserError(f"--input-img-mode '{mode}': expected one of {', '.join(MODES)}.")
        if Image.getmodebands(mode) != channels:
            raise UserError(f"images of mode '{mode}' have {Image.getmodebands(mode)} channels, the network takes "
                            f'{channels}: use another --input-img-mode or --in-chans.')
        return cls(
            input_size=tuple(config['input_size']),
            mean=tuple(adapt_to_chs(tuple(config['mean']), channels)),
            std=tuple(adapt_to_chs(tuple(config['std']), channels)),
            interpolation=config['interpolation'],
            crop_pct=config['crop_pct'],
            crop_mode=config.get('crop_mode') or 'center',
            crop_border_pixels=config.get('crop_border_pixels'),
            input_img_mode=mode,
        )

    def to_config(self) -> dict[str, Any]:
        """Return the entries of a ``pretrained_cfg``; :meth:`from_config` takes them back."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def transform(self, normalize: bool = False, fast: bool = False) -> Callable[[Any], Any]:
        """Return timm's transform for evaluation.

        Args:
            normalize: True for a normalised float tensor, False for an array of uint8; both (C, H, W).
            fast: Take arrays, too, by the input backend 'fast'; only for RGB images.
        """
        transform = create_transform(
            self.input_size,
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            crop_border_pixels=self.crop_border_pixels,
            use_prefetcher=not normalize,
        )
        return FastTransform(transform) if fast else transform


def pool_over_positions(model: Any, pipeline: ImagePipeline) -> tuple[nn.Module, ImagePipeline]:
    """Return a model that averages its logits over several positions, and its pipeline, if the images are larger.

    Otherwise return both as they are. timm's ``apply_test_time_pool`` must know how many positions an image of the
    training had, which a checkpoint does not say.
    """
    cfg = model.pretrained_cfg
    if not cfg.get('pool_size'):
        with torch.inference_mode():
            features = model.eval().forward_features(torch.zeros(1, *pipeline.input_size[:1], *cfg['input_size'][1:]))
        cfg['pool_size'] = tuple(features.shape[-2:])
    model, pooled = apply_test_time_pool(model, {'input_size': pipeline.input_size})
    return model, replace(pipeline, crop_pct=1.0) if pooled else pipeline


# Entries that a file may set; the others of a pretrained_cfg say where weights come from.
_TRAVELLING = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'input_img_mode')


def remember_training(pretrained_cfg: dict[str, Any], content: Mapping[str, Any], num_classes: int) -> None:
    """Put what a checkpoint of a training knows about its images and classes into a ``pretrained_cfg``.

    Args:
        pretrained_cfg: Entries of the model; they are changed.
        content: Content of the checkpoint. A checkpoint of timm's has the options of its training; a file of weights
            has nothing, which changes nothing.
        num_classes: Number of outputs of the network.
    """
    training, args = content.get('training') or {}, content.get('args') or {}
    pipeline = training.get('pipeline') or _pipeline_options(args, pretrained_cfg)
    known = {key: pipeline[key] for key in _TRAVELLING if pipeline.get(key) is not None}
    if known.get('input_size'):
        for key in 'test_input_size', 'test_crop_pct', 'pool_size', 'test_pool_size':
            pretrained_cfg.pop(key, None)
    pretrained_cfg.update(known)
    if names := label_names(training.get('class_to_idx'), num_classes):
        pretrained_cfg.pop('label_descriptions', None)
        pretrained_cfg['label_names'] = names


def trained_channels(content: Mapping[str, Any]) -> int | None:
    """Return the number of image channels that a checkpoint was trained with; None if it does not say."""
    pipeline, args = (content.get('training') or {}).get('pipeline') or {}, content.get('args') or {}
    return (pipeline.get('input_size') or (args.get('in_chans'),))[0] or (args.get('input_size') or (None,))[0]


def _pipeline_options(args: Mapping[str, Any], pretrained_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the options of a training say about the images, for checkpoints without their pipeline."""
    known = {key: args[key] for key in _TRAVELLING[1:] if args.get(key)}
    channels, *size = args.get('input_size') or pretrained_cfg.get('input_size') or (3, 299, 299)
    size = [args['img_size']] * 2 if args.get('img_size') else size
    if any(args.get(key) for key in ('input_size', 'img_size', 'in_chans')):
        known['input_size'] = (args.get('in_chans') or channels, *size)
    return known

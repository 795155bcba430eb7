"""The image pipeline: from a decoded image to the input of a network."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.loader import adapt_to_chs

from ..errors import UserError

__all__ = ['MODES', 'ImagePipeline']

MODES = ('L', 'LA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV')  # 8 bits a channel, and Pillow converts any image to them

_MODE_OF_CHANNELS = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}


@dataclass(frozen=True)
class ImagePipeline:
    """Settings that turn an image file into the input of a network, by timm's names.

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
    def from_config(cls, config: Mapping[str, Any], input_img_mode: str | None = None) -> 'ImagePipeline':
        """Return the pipeline of a data config of timm, with a mean and a deviation for each channel.

        Args:
            config: Data config as ``timm.data.resolve_data_config`` returns it.
            input_img_mode: PIL mode; None takes the mode of the config, else the usual one for the number of channels.

        Raises:
            UserError: No such mode, or a mode with another number of channels.
        """
        channels = config['input_size'][0]
        mode = input_img_mode or config.get('input_img_mode') or _MODE_OF_CHANNELS.get(channels)
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

    def transform(self, normalize: bool = False) -> Callable[[Image.Image], Any]:
        """Return timm's transform for evaluation.

        Args:
            normalize: True for a normalised float tensor, False for an array of uint8; both (C, H, W).
        """
        return create_transform(
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

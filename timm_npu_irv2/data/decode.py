"""Image files to PIL images with the right pixels: the one reader for training, evaluation, inference, calibration."""

import os
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..serialization import open_regular

__all__ = ['read_image', 'to_pil_mode']


def read_image(file: str | os.PathLike | BinaryIO, mode: str) -> Image.Image:
    """Read an image file and convert it to a PIL mode, such as 'RGB'.

    Of several frames the first one is read, and an orientation in the metadata is ignored, as timm does.

    Raises:
        Exception: Any error that Pillow's decoders raise for a damaged file, or :func:`to_pil_mode`.
    """
    if isinstance(file, str | os.PathLike):
        with open_regular(file) as opened:
            return read_image(opened, mode)
    try:
        with Image.open(file) as image:
            return to_pil_mode(image, mode)
    except UnidentifiedImageError as error:  # whose text shows an object of Python
        raise UnidentifiedImageError('it is empty, or in no format that Pillow reads') from error


def to_pil_mode(image: Image.Image, mode: str) -> Image.Image:
    """Decode ``image`` and convert it to a PIL mode.

    Of 16 bits per channel the upper eight are kept, as Pillow does for colour images; grey ones it would clip.

    Raises:
        ValueError: The pixels are integers or floats of unknown range.
        Exception: Any other error that Pillow's decoders raise for a damaged file.
    """
    if image.mode == mode:
        image.load()
        return image
    # Pillow holds the 16 bits of PNG and PGM files in 32, depending on its version.
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise ValueError(f"pixels of mode '{image.mode}' have no known range: convert the image to 8 bits")
    if image.mode == 'LAB':
        image = image.convert('RGB')  # which Pillow converts to anything else
    return image.convert(mode)

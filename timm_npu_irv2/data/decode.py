"""Image files to PIL images with the right pixels."""

import numpy as np
from PIL import Image

__all__ = ['to_pil_mode']


def to_pil_mode(image: Image.Image, mode: str) -> Image.Image:
    """Decode ``image`` and convert it to a PIL mode, such as 'RGB'.

    Of 16 bits per channel the upper eight are kept, as Pillow does for colour images; grey ones it would clip.

    Raises:
        ValueError: The pixels are integers or floats of unknown range.
        Exception: Any other error that Pillow's decoders raise for a damaged file.
    """
    if image.mode == mode:
        image.load()
        return image
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format == 'PNG'):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise ValueError(f"pixels of mode '{image.mode}' have no known range: convert the image to 8 bits")
    return image.convert(mode)

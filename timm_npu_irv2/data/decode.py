"""Image files to PIL images whose pixels mean what they say."""

import numpy as np
from PIL import Image

__all__ = ['to_pil_mode']


def to_pil_mode(image: Image.Image, mode: str) -> Image.Image:
    """Decode ``image`` and bring it to a PIL mode, 'RGB' say.

    Of 16 bits a channel the upper eight are taken, as Pillow does for colour images; for grey ones it would clip.

    Raises:
        ValueError: The pixels are integers or floats whose range is not known.
        Exception: Whatever else Pillow's decoders raise for a damaged file.
    """
    if image.mode == mode:
        image.load()
        return image
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format == 'PNG'):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise ValueError(f"its pixels are of mode '{image.mode}', whose range is not known: convert it to 8 bits")
    return image.convert(mode)

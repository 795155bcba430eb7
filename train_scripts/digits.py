#!/usr/bin/env python3
"""Write scikit-learn's handwritten digits as a folder of images: 1437 for training, the last 360 for validation.

    python train_scripts/digits.py DIR
"""

import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

HELD_OUT = 360
SIDE = 64  # pixels; the digits have 8 x 8


def write_digits(folder: Path) -> None:
    """Write ``folder``/train/<digit>/<number>.png and ``folder``/val/…; existing images are kept."""
    digits = load_digits()
    first_held_out = len(digits.images) - HELD_OUT
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ('val' if number >= first_held_out else 'train') / str(digit) / f'{number:04d}.png'
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * (255 / 16)).astype('uint8'))
        image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)


if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1].startswith('-'):
        print('usage: digits.py DIR')
        sys.exit(0 if sys.argv[1:] in (['-h'], ['--help']) else 2)
    write_digits(Path(sys.argv[1]))

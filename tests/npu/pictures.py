"""A data set of the smallest kind."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(root: Path, train: int = 12, val: int = 4) -> Path:
    """Three classes that differ in their colour, as train/<class>/<image> and val/<class>/<image>; ``root``."""
    random = np.random.default_rng(0)
    for split, count in ('train', train), ('val', val):
        for index in range(3):
            folder = root / split / f'class{index}'
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 80, (80, 90, 3), dtype=np.uint8)
                pixels[..., index] += 150
                Image.fromarray(pixels).save(folder / f'{number}.png')
    return root

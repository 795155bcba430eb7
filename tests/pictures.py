"""Data sets of the smallest kind."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_classes(folder: Path, classes: int = 3, each: int = 4, seed: int | np.random.Generator = 0) -> Path:
    """Folders class0, class1, … with images 0.png, 1.png, …, which differ in their colour; ``folder``."""
    random = np.random.default_rng(seed)
    for index in range(classes):
        (folder / f'class{index}').mkdir(parents=True, exist_ok=True)
        for number in range(each):
            pixels = random.integers(0, 80, (80, 90, 3), dtype=np.uint8)
            pixels[..., index % 3] += 150
            Image.fromarray(pixels).save(folder / f'class{index}' / f'{number}.png')
    return folder


def write_pictures(root: Path, train: int = 12, val: int = 4) -> Path:
    """train/ and val/ with as many images in each of three classes; ``root``."""
    random = np.random.default_rng(0)
    write_classes(root / 'train', 3, train, random)
    write_classes(root / 'val', 3, val, random)
    return root

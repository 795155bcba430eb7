"""Augmentation of training images: timm's transforms, and its random erasing on the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing

from .fast import FastTransform
from .pipeline import ImagePipeline

__all__ = ['Augmentation', 'SplitTransform']


@dataclass(frozen=True)
class Augmentation:
    """Settings of the augmentation, by the names of ``timm.data.create_loader``, whose documentation explains them.

    Attributes:
        interpolation: Resize method of training; '' for that of the pipeline.
        re_split: Leave the first split (without splits, the first half of a batch) free of random erasing.
        num_aug_splits: Copies of each image in a batch, the first one clean; 0 for one augmented copy.
    """

    no_aug: bool = False
    train_crop_mode: str | None = None
    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    color_jitter_prob: float | None = None
    grayscale_prob: float = 0.0
    gaussian_blur_prob: float = 0.0
    auto_augment: str | None = None
    interpolation: str = 'random'
    re_prob: float = 0.0
    re_mode: str = 'pixel'
    re_count: int = 1
    re_split: bool = False
    num_aug_splits: int = 0

    def transform_options(self, pipeline: ImagePipeline, use_prefetcher: bool = True) -> dict[str, Any]:
        """Return the arguments for ``timm.data.create_transform``, or for its ``create_loader``, but for the size."""
        options = {name: value for name, value in vars(self).items() if name not in ('re_split', 'num_aug_splits')}
        resize = pipeline.interpolation if self.no_aug or not self.interpolation else self.interpolation
        return {**options, 'is_training': True, 'interpolation': resize, 'mean': pipeline.mean, 'std': pipeline.std,
                'use_prefetcher': use_prefetcher}

    def transform(
            self,
            pipeline: ImagePipeline,
            size: int | tuple[int, int],
            use_prefetcher: bool = True,
            fast: bool = False,
    ) -> Callable:
        """Return the transform for training images of one size.

        Args:
            pipeline: Resize method, mean and deviation of the images.
            size: Edge of the square images, or (height, width), in pixels.
            use_prefetcher: True for arrays of uint8, False for normalised float tensors.
            fast: Take arrays, too, by the input backend 'fast'; only for RGB images.
        """
        convert = FastTransform if fast else _unchanged
        options = self.transform_options(pipeline, use_prefetcher)
        if not self.num_aug_splits:
            return convert(create_transform(size, **options))
        parts = create_transform(size, **options, separate=True)
        return SplitTransform([convert(part) for part in parts], self.num_aug_splits)

    def random_erasing(self, device: torch.device) -> RandomErasing | None:
        """Return the random erasing of whole batches on ``device``, or None if nothing is erased."""
        if not self.re_prob or self.no_aug:
            return None
        splits = (self.num_aug_splits or 2) if self.re_split else 0
        return RandomErasing(
            self.re_prob, mode=self.re_mode, max_count=self.re_count, num_splits=splits, device=device)


class SplitTransform:
    """A transform to a clean and ``num_splits - 1`` augmented copies, of the three parts of timm's separate one."""

    def __init__(self, transforms: Sequence[Callable], num_splits: int):
        self.base, self.augment, self.finish = transforms
        self.num_splits = num_splits

    def __call__(self, image: Any) -> tuple[Any, ...]:
        """Return the finished copies."""
        image = self.base(image)
        augmented = (self.augment(image) for _ in range(self.num_splits - 1))
        return tuple(self.finish(each) for each in (image, *augmented))


def _unchanged(transform: Callable) -> Callable:
    return transform

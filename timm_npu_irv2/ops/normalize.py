"""Images as they travel (uint8) to images as the network wants them."""

import torch
from torch import Tensor

__all__ = ['normalize_images']


def normalize_images(
        images: Tensor,
        mean: Tensor,
        std: Tensor,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """(images / 255 - mean) / std, computed in float32 and rounded once to ``dtype``.

    Args:
        images: (N, C, H, W) uint8, in 0 … 255.
        mean: (C,) float32 on the images' device, in the units of 0 … 1, as timm's configs give it.
        std: (C,) float32 on the images' device, likewise.
        dtype: The result's type.
        memory_format: The result's layout.

    Returns:
        (N, C, H, W) of ``dtype``.
    """
    shape = (1, -1, 1, 1)
    exact = torch.promote_types(dtype, torch.float32)
    images = images.to(dtype=exact, memory_format=memory_format)
    return images.sub_(mean.view(shape) * 255).div_(std.view(shape) * 255).to(dtype)

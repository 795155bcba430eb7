r"""Images as they are transferred (uint8) to images as the network takes them: $y = (x / 255 - \mu_c) / \sigma_c$."""

import torch
from torch import Tensor

from ._kernels import triton_kernels

__all__ = ['normalize_images', 'normalize_images_reference']


def normalize_images_reference(
        images: Tensor,
        mean: Tensor,
        std: Tensor,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Compute the normalisation in plain tensor operations; the arguments are those of :func:`normalize_images`."""
    shape = (1, -1, 1, 1)
    # The layout comes last: on a CPU it is several times faster to change that of floating-point numbers than of bytes.
    images = images.to(torch.promote_types(dtype, torch.float32))
    return images.sub_(mean.view(shape) * 255).div_(std.view(shape) * 255).to(dtype, memory_format=memory_format)


def normalize_images(
        images: Tensor,
        mean: Tensor,
        std: Tensor,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Compute (images / 255 - mean) / std in float32 and round once to ``dtype``.

    Args:
        images: Batch (N, C, H, W) of uint8, 0 … 255.
        mean: Mean (C,) in float32 on the images' device, in units of 0 … 1, as in timm's configurations.
        std: Standard deviation (C,), likewise.
        dtype: Dtype of the result.
        memory_format: Layout of the result.

    Returns:
        A batch (N, C, H, W) of ``dtype``.
    """
    kernels = triton_kernels()
    if kernels is not None and dtype != torch.float64:
        return kernels.normalize_images(images, mean, std, dtype, memory_format)
    return normalize_images_reference(images, mean, std, dtype, memory_format)

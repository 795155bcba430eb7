r"""Images as they travel (uint8) to images as the network wants them: $y = (x / 255 - \mu_c) / \sigma_c$."""

import torch
from torch import Tensor

from ._library import LIBRARY, triton_kernels

__all__ = ['normalize_images', 'normalize_images_reference']


def normalize_images_reference(
        images: Tensor,
        mean: Tensor,
        std: Tensor,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """The operator in plain tensor operations."""
    shape = (1, -1, 1, 1)
    # The layout comes last: to change that of floating-point numbers is several times faster on a CPU than of bytes.
    images = images.to(torch.promote_types(dtype, torch.float32))
    return images.sub_(mean.view(shape) * 255).div_(std.view(shape) * 255).to(dtype, memory_format=memory_format)


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
    return torch.ops.timm_npu_irv2.normalize_images(images, mean, std, dtype, memory_format)


def _forward(
        images: Tensor,
        mean: Tensor,
        std: Tensor,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
) -> Tensor:
    kernels = triton_kernels()
    if kernels is not None and dtype != torch.float64:
        return kernels.normalize_images(images, mean, std, dtype, memory_format)
    return normalize_images_reference(images, mean, std, dtype, memory_format)


LIBRARY.define('normalize_images(Tensor images, Tensor mean, Tensor std, ScalarType dtype, MemoryFormat memory_format) '
               '-> Tensor')
LIBRARY.impl('normalize_images', _forward, 'CompositeExplicitAutograd')
torch.library.register_fake(
    'timm_npu_irv2::normalize_images',
    lambda images, mean, std, dtype, memory_format: torch.empty_like(images, dtype=dtype, memory_format=memory_format),
    lib=LIBRARY,
)

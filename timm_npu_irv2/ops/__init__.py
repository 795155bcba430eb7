"""Fused operators, a file each: the formula, the reference, the kernels, the gradient. They know nothing of timm."""

from .activation import scaled_relu
from .batch_norm import batch_norm_relu
from .normalize import normalize_images
from .residual import scaled_residual_relu

__all__ = ['batch_norm_relu', 'normalize_images', 'scaled_relu', 'scaled_residual_relu']

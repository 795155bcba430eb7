"""Fused operators, a file each: the formula, the reference, the kernels, the gradient. They know nothing of timm."""

from .residual import scaled_residual_relu

__all__ = ['scaled_residual_relu']

"""Operators, a file each: the formula, a reference, the kernels, the gradient. They know nothing of timm.

They are for eager code alone: a compiler fuses plain operations better than operators that it cannot look into, and
exported or scripted programs must run where this package is not installed. ``shortcuts.py`` tells when to call them.
"""

from .activation import scaled_relu
from .batch_norm import batch_norm_relu
from .normalize import normalize_images
from .pointwise import pointwise_convolution
from .residual import scaled_residual_relu
from .variants import pointwise_form, set_variants, use_variants, variants

__all__ = ['batch_norm_relu', 'normalize_images', 'pointwise_convolution', 'pointwise_form', 'scaled_relu',
           'scaled_residual_relu', 'set_variants', 'use_variants', 'variants']

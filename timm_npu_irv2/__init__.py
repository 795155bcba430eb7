"""Inception-ResNet-v2 for timm, trained, published and deployed on Ascend NPUs, CUDA and CPU.

Importing this package registers the models and optimizers with timm, now or as soon as timm is imported; once it is
installed, ``import torch`` does that by itself. Errors that a user can cause are importable from here; everything else
is imported from its module.
"""

from . import autoload
from .errors import DeviceUnavailable, UnknownDialect, UserError

__all__ = ['DeviceUnavailable', 'UnknownDialect', 'UserError']
__version__ = '0.1.0'

autoload.register()

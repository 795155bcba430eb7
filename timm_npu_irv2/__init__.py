"""Inception-ResNet-v2 for timm, trained, published and deployed on Ascend NPUs, CUDA and CPU.

Importing this package registers the models and optimizers with timm, now or as soon as timm is imported; once it is
installed, ``import torch`` does that by itself. The package's face is loaded on first use, so that it costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import autoload

if TYPE_CHECKING:
    from .errors import DeviceUnavailable, UnknownDialect, UserError
    from .model import InceptionResnetV2Npu, inception_resnet_v2_npu
    from .ops import scaled_residual_relu
    from .weights import convert, detect_dialect

__all__ = [
    'DeviceUnavailable',
    'InceptionResnetV2Npu',
    'UnknownDialect',
    'UserError',
    'convert',
    'detect_dialect',
    'inception_resnet_v2_npu',
    'scaled_residual_relu',
]
__version__ = '0.1.0'

_HOMES = {
    'errors': ('DeviceUnavailable', 'UnknownDialect', 'UserError'),
    'model': ('InceptionResnetV2Npu', 'inception_resnet_v2_npu'),
    'ops': ('scaled_residual_relu',),
    'weights': ('convert', 'detect_dialect'),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f'.{home}', __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


autoload.register()

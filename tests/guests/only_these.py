"""A pytest plugin for timm's own tests: ``list_models`` names timm's Inception-ResNet-v2 and ours, and no others.

timm's tests of intermediate features choose models by the module they come from, so ours counts as one of timm's.
"""

import functools

import timm
from timm.models import _registry

MODELS = ('inception_resnet_v2', 'inception_resnet_v2_npu')
_list_models = _registry.list_models


@functools.wraps(_list_models)
def list_models(filter='', module='', *args, **kwargs):
    modules = [module] if isinstance(module, str) else list(module)
    if MODELS[0] in modules:
        module = [*modules, 'model']
    return [name for name in _list_models(filter, module, *args, **kwargs) if name.split('.')[0] in MODELS]


timm.list_models = timm.models.list_models = list_models

"""Imported for its effect: the models and the optimizers are in timm's registries, torch_npu is loaded."""

from . import device, model, optim

__all__: list[str] = []

device.load_backends()
optim.register_optimizers()
assert model.inception_resnet_v2_npu  # timm's decorator registered it

"""Shared pieces of the tests."""

import pytest
import timm
import torch
from torch import nn

REFERENCE = 'inception_resnet_v2'
OURS = 'inception_resnet_v2_npu'


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random BatchNorm statistics and affine parameters, so that a mixed-up pair of layers can't go unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
    return model


def create_pair(dtype: torch.dtype = torch.float32, **kwargs) -> tuple[nn.Module, nn.Module]:
    """timm's network with random weights, and ours with the same ones."""
    torch.manual_seed(0)
    reference = fill(timm.create_model(REFERENCE, **kwargs)).to(dtype)
    ours = timm.create_model(OURS, **kwargs).to(dtype)
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(scope='session')
def reference_state_dict() -> dict[str, torch.Tensor]:
    """Weights of timm's network with 1000 classes, random everywhere."""
    torch.manual_seed(0)
    return fill(timm.create_model(REFERENCE)).state_dict()

"""timm's network and ours beside each other, with few blocks, so that a test of one client takes seconds."""

import torch
from torch import nn

from ..conftest import create_pair

SIZE = 75


def short_pair(dtype: torch.dtype = torch.float32, blocks: int = 2, **kwargs) -> tuple[nn.Module, nn.Module]:
    """Create timm's network and ours with the same weights and ``blocks`` blocks in each run, in eval mode."""
    models = create_pair(dtype, **{'num_classes': 5, **kwargs})
    for model in models:
        for name in ('repeat', 'repeat_1', 'repeat_2'):
            setattr(model, name, getattr(model, name)[:blocks])
    return models[0].eval(), models[1].eval()


def images(count: int = 2, dtype: torch.dtype = torch.float32, size: int = SIZE) -> torch.Tensor:
    """Random images, the same in each call."""
    return torch.randn(count, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(0))


def not_in_place(model: nn.Module) -> nn.Module:
    """Let no ReLU work in place, which PyTorch refuses beside full backward hooks."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model

"""Preparation of a model for evaluation, as validate.py and inference.py need it."""

import torch
from torch import nn

from .. import device as devices

__all__ = ['describe_precision', 'prepare_model']


def prepare_model(
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        torchscript: bool = False,
) -> nn.Module:
    """Return a model in evaluation mode on its device, in the layout of the device.

    Args:
        model: Network with its weights.
        device: Device of the evaluation.
        dtype: Type of the weights.
        torchscript: Compile the model with torch.jit.script.
    """
    model = model.to(dtype).eval().to(device, memory_format=devices.memory_format(device))  # type: ignore[call-overload]  # torch's stubs lack memory_format with a device
    return torch.jit.script(model) if torchscript else model


def describe_precision(dtype: torch.dtype, autocast: torch.dtype | None = None) -> str:
    """Return the precision in words, such as 'float32' or 'bfloat16 autocast'."""
    return f'{autocast or dtype}{" autocast" if autocast else ""}'.removeprefix('torch.')

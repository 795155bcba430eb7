"""Preparation of a model for evaluation, as validate.py and inference.py need it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import device as devices
from ..errors import UserError

__all__ = ['describe_precision', 'prepare_model', 'select_classes']


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
    layout = devices.memory_format(device)
    model = model.to(dtype).eval().to(device, memory_format=layout)  # type: ignore[call-overload]  # stubs lack it
    return torch.jit.script(model) if torchscript else model


def describe_precision(dtype: torch.dtype, autocast: torch.dtype | None = None) -> str:
    """Return the precision in words, such as 'float32' or 'bfloat16 autocast'."""
    return f'{autocast or dtype}{" autocast" if autocast else ""}'.removeprefix('torch.')


def select_classes(model: nn.Module, path: str, num_classes: int) -> nn.Module:
    """Return a model reduced to the classes that a file of indices names.

    Args:
        model: Network from images to logits.
        path: File with one class index per line.
        num_classes: Number of classes of the model.

    Raises:
        UserError: The file cannot be read, or an index is out of range.
    """
    try:
        labels = [int(line) for line in Path(path).read_text().split()]
    except (OSError, ValueError) as error:
        raise UserError(f'--valid-labels {path}: {error}') from error
    if not labels or not 0 <= min(labels) <= max(labels) < num_classes:
        raise UserError(f'--valid-labels {path}: expected class indices from 0 to {num_classes - 1}, one per line.')
    return _Columns(model, labels)


class _Columns(nn.Module):
    """A model reduced to some of its classes."""

    def __init__(self, model: nn.Module, labels: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer('labels', torch.tensor(labels, device=next(model.parameters()).device))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, len(labels)) of images (N, C, H, W)."""
        return self.model(images)[:, self.labels]

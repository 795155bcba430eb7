"""Preparation of a model for evaluation, as validate.py and inference.py need it."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import get_pretrained_cfg, is_model
from torch import Tensor, nn

from .. import device as devices
from ..errors import UserError
from ..serialization import read_text

__all__ = ['check_deployed', 'classes_in', 'describe_precision', 'engine_options', 'engine_rules', 'prepare_model',
           'select_classes']

def engine_rules(args: Namespace) -> list[tuple[Any, str]]:
    """Return the rules of --engine for ``check_rules``."""
    excluded = {'amp', 'torchscript', 'torchcompile', 'test_pool', 'gradcam'}
    return [
        (args.calibration and not args.engine, '--calibration is for --engine openvino or onnxruntime: name one.'),
        *((args.engine and getattr(args, name, None),
           f'--engine runs the folded network: leave out --{name.replace("_", "-")}.') for name in sorted(excluded)),
    ]


def engine_options(args: Namespace, device: torch.device) -> dict[str, Any]:
    """Return the arguments of ``to_inference`` that the options name.

    Args:
        args: Options of the script.
        device: Device of the images; CANN's engine finds its own, and takes images from any.
    """
    dtype = 'fast' if getattr(args, 'fast', False) else args.model_dtype
    return {'engine': args.engine, 'device': None if args.engine == 'om' else device,
            'dtype': 'int8' if args.calibration else dtype, 'calibration': args.calibration or None}


def check_deployed(args: Namespace, network: Any, place: str) -> None:
    """Raise UserError if the options ask for what a deployed network cannot do.

    Args:
        args: Options of the script.
        network: Deployed network.
        place: File or folder of the network, for messages.
    """
    trained = ('amp', 'model_dtype', 'engine', 'calibration', 'torchscript', 'torchcompile', 'test_pool', 'reparam',
               'gradcam', 'fast')
    given = [name for name in trained if getattr(args, name, None)]
    given += [name for name in ('mean', 'std') if getattr(args, name, None) and getattr(network, 'normalizes', False)]
    if given:
        raise UserError(f'{place} is deployed, with its precision and its layers as they are: leave out '
                        f'{", ".join("--" + name.replace("_", "-") for name in given)}.')
    if args.num_classes not in (None, network.num_classes):
        raise UserError(f'--num-classes {args.num_classes}: {place} has {network.num_classes} classes.')


def classes_in(state_dict: dict[str, Tensor], name: str) -> int | None:
    """Return the number of classes of a checkpoint, from the shape of its classifier; None if that is not found."""
    config = get_pretrained_cfg(name) if is_model(name) else None
    for classifier in (getattr(config, 'classifier', None), 'classif', 'last_linear'):
        for prefix in ('', 'module.'):
            if isinstance(classifier, str) and f'{prefix}{classifier}.weight' in state_dict:
                return len(state_dict[f'{prefix}{classifier}.weight'])
    return None


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
        labels = [int(line) for line in read_text(path, f'--valid-labels {path}').split()]
    except ValueError as error:
        raise UserError(f'--valid-labels {path}: {error}') from error
    if not labels or not 0 <= min(labels) <= max(labels) < num_classes:
        raise UserError(f'--valid-labels {path}: expected class indices from 0 to {num_classes - 1}, one per line.')
    return _Columns(model, labels)


class _Columns(nn.Module):
    """A model reduced to some of its classes."""

    def __init__(self, model: nn.Module, labels: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        place = next((parameter.device for parameter in model.parameters()), None)  # an engine has none
        self.register_buffer('labels', torch.tensor(labels, device=place))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, len(labels)) of images (N, C, H, W)."""
        return self.model(images)[:, self.labels]

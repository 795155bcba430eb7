"""A network for inference as a folder of two files: ``model.safetensors`` and ``config.json``."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from .. import device as devices
from ..errors import UserError, first_line
from ..serialization import atomic_write, load_weights, make_folder, save_weights
from .network import InferenceNetwork

__all__ = ['load', 'save']

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'
FORMAT = 'timm_npu_irv2.inference'


def save(network: InferenceNetwork, folder: str | os.PathLike) -> Path:
    """Write ``network``, its preprocessing and the names of its classes into ``folder``, which is created.

    Raises:
        CannotWrite: The folder cannot be written to.
    """
    folder = Path(folder)
    make_folder(folder)
    config: dict[str, Any] = {
        'format': FORMAT,
        'dtype': str(network.conv2d_1a.weight.dtype).removeprefix('torch.'),
        'arguments': network.arguments,
        'pretrained_cfg': network.pretrained_cfg,
    }
    save_weights(network.state_dict(), folder / WEIGHTS)
    atomic_write(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + '\n')
    return folder


def load(
        folder: str | os.PathLike,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
) -> InferenceNetwork:
    """Return the network that :func:`save` wrote, bit for bit.

    Args:
        folder: The folder.
        device: The device to infer on; None for the best one.
        dtype: The type of weights and output; None for the one that they were saved in.

    Raises:
        UserError: There is no such network, or it is damaged.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        if config['format'] != FORMAT:
            raise UserError(f'{folder} is not a network for inference: its config.json is of another kind.')
        network = InferenceNetwork(**config['arguments'], device='meta')
        state_dict = load_weights(folder / WEIGHTS)
        device = devices.resolve_device(str(device) if device else None)
        dtype = dtype or getattr(torch, config['dtype'])
        state_dict = {key: value.to(device, dtype) for key, value in state_dict.items()}
        network.load_state_dict(state_dict, assign=True)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = getattr(error, 'strerror', None) or first_line(error)
        raise UserError(f'{folder} cannot be loaded as a network for inference: {reason}') from error
    network.pretrained_cfg = config.get('pretrained_cfg') or {}
    return network.freeze()

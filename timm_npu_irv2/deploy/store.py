"""A network for inference as a folder of two files: the weights or an engine's model, and ``config.json``."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from .. import device as devices
from .. import rules, schema
from ..errors import UserError
from ..serialization import atomic_write, load_weights, make_folder, read_json, save_weights
from . import engines
from .engines import EngineNetwork
from .network import InferenceNetwork

__all__ = ['load', 'save']

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'
FORMAT = 'timm_npu_irv2.inference'


def save(network: InferenceNetwork | EngineNetwork, folder: str | os.PathLike) -> Path:
    """Write ``network``, its preprocessing and the names of its classes into ``folder``, which is created.

    Raises:
        CannotWrite: The folder cannot be written to.
    """
    if isinstance(network, EngineNetwork):
        return network.save(folder)
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
        dtype: torch.dtype | str | None = None,
) -> InferenceNetwork | EngineNetwork:
    """Return the network that :func:`save` wrote, bit for bit.

    Args:
        folder: The folder.
        device: The device to infer on; None for the best one, or the engine's own.
        dtype: The type of weights and output, or that an engine computes in; None for the saved network's.

    Raises:
        UserError: There is no such network, it is damaged, or a file is not as :mod:`.schema` describes.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    if config.get('format') == engines.FORMAT:
        return engines.load(folder, config, device, dtype)
    if config.get('format') != FORMAT:
        raise UserError(f'{folder} is not a network for inference: its config.json is of another kind.')
    with rules.naming(folder / CONFIG):
        schema.check_inference_config(config)
    state_dict = load_weights(folder / WEIGHTS)
    network, stored = InferenceNetwork(**config['arguments'], device='meta'), getattr(torch, config['dtype'])
    device = devices.resolve_device(str(device) if device else None)
    kind: torch.dtype = getattr(torch, str(dtype).removeprefix('torch.')) if dtype else stored
    with rules.naming(folder / WEIGHTS):
        expected = {key: value.to(stored) for key, value in network.state_dict().items()}
        rules.check_like(state_dict, expected, '')
    network.load_state_dict({key: value.to(device, kind) for key, value in state_dict.items()}, assign=True)
    network.pretrained_cfg = config.get('pretrained_cfg') or {}
    return network.freeze()

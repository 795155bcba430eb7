"""``to_inference``: a trained network on the engine of choice."""

import difflib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn

from ... import device as devices
from ... import rules, schema
from ...errors import UserError
from ...ops.normalize import normalize_images
from .. import fold, quantization
from .. import onnx as graph
from ..network import InferenceNetwork
from .base import Engine
from .cpu import saturates_int8
from .measured import fastest_engine
from .network import CONFIG, EngineNetwork
from .om import OM
from .onnxruntime import ONNXRuntime
from .openvino import OpenVINO

__all__ = ['ENGINES', 'load', 'to_inference']

_logger = logging.getLogger(__name__)

MOST_IMAGES = 100  # of a folder, for calibration, and as many to choose its method

ENGINES: dict[str, Engine | None] = {
    'torch': None,  # runs the InferenceNetwork itself
    **{engine.name: engine for engine in (OpenVINO(), ONNXRuntime(), OM())},
}


def _engine_named(name: str) -> Engine | None:
    """Return the engine of a name, None for torch itself.

    Raises:
        UserError: There is no such engine.
    """
    if name not in ENGINES:
        close = difflib.get_close_matches(name, ENGINES, 1)
        hint = f'Did you mean {close[0]}?' if close else f'Use one of auto, {", ".join(ENGINES)}.'
        raise UserError(f"there is no engine '{name}'. {hint}")
    return ENGINES[name]


def _measured_engine(device: torch.device, dtype: torch.dtype | str | None) -> str:
    """Return the name of the engine that 'auto' stands for."""
    if device.type != 'cpu':
        _logger.info(f"engine 'auto': using torch, the engine for {device.type}.")
        return 'torch'
    kind = devices.fast_dtype(device) if dtype == 'fast' else dtype or 'float32'
    fastest = fastest_engine(str(kind).removeprefix('torch.'))
    if fastest is None:
        _logger.info("engine 'auto': no engine has been measured on this machine; using torch.")
        return 'torch'
    _logger.info(f"engine 'auto': {fastest} was the fastest here.")
    return fastest


@overload
def to_inference(
        model: nn.Module,
        device: torch.device | str | None = ...,
        dtype: torch.dtype | str | None = ...,
        mean: Sequence[float] | None = ...,
        std: Sequence[float] | None = ...,
        engine: Literal['torch'] = ...,
        calibration: None = ...,
) -> InferenceNetwork: ...


@overload
def to_inference(
        model: nn.Module,
        device: torch.device | str | None = ...,
        dtype: torch.dtype | str | None = ...,
        mean: Sequence[float] | None = ...,
        std: Sequence[float] | None = ...,
        engine: str = ...,
        calibration: str | os.PathLike | Tensor | None = ...,
) -> InferenceNetwork | EngineNetwork: ...


def to_inference(
        model: nn.Module,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        engine: str = 'torch',
        calibration: str | os.PathLike | Tensor | None = None,
) -> InferenceNetwork | EngineNetwork:
    """Convert ``model`` to a network that computes the same and can only infer.

    Args:
        model: Trained network of this package or timm's ``inception_resnet_v2``, with BatchNorm and ReLU. It is not
            changed.
        device: Device of the result; None for the model's, or for the engine's own.
        dtype: Dtype to compute in, as a torch.dtype or its name: 'float32' (None means it), 'bfloat16', 'float16',
            'int8' (see ``calibration``), or 'fast' for the fastest one that is not int8.
        mean: Mean of the normalisation of uint8 images; None for that of the model's ``pretrained_cfg``.
        std: Standard deviation, likewise.
        engine: Runtime: 'torch'; 'openvino' or 'onnxruntime', on CPUs; 'om', CANN's, on Ascend's inference cards; or
            'auto' for the one that ``benchmark.py tune --task eval`` or ``benchmark.py infer`` last measured to be the
            fastest on this machine's CPU for the dtype, else torch.
        calibration: Images for the ranges of int8: a folder of files, or a tensor (N, C, H, W), uint8 or normalised.

    Raises:
        UserError: ``model`` is another network, or has norms or activations that cannot be folded; the engine is not
            installed, or cannot compute in this dtype or on this device.
    """
    if engine == 'auto':
        weight = next(model.parameters(), None)
        engine = _measured_engine(torch.device(device or ('cpu' if weight is None else weight.device)), dtype)
    runtime = _engine_named(engine)
    if runtime is None:
        return fold.to_inference(model, device, _torch_dtype(dtype), mean, std)
    name, place = runtime.resolve_dtype(dtype), runtime.resolve_device(device)
    if name == 'int8' and calibration is None:
        raise UserError("dtype='int8' needs calibration=FOLDER, images like those the model will see.")
    network = fold.to_inference(model, 'cpu', torch.float32, mean, std)
    folder = tempfile.TemporaryDirectory(prefix='timm_npu_irv2-')
    exported = Path(folder.name) / 'exported.onnx'
    graph.export(network, exported, uint8=False, dynamic_size=runtime.dynamic_size)
    runtime.build(exported, Path(folder.name) / runtime.model_file, name)
    exported.unlink(missing_ok=True)
    if name == 'int8':
        _quantize(Path(folder.name) / runtime.model_file, calibration, network.pretrained_cfg)
    return EngineNetwork.in_folder(folder, runtime, name, network.arguments, network.pretrained_cfg, place)


def load(
        folder: Path,
        config: dict[str, Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
) -> EngineNetwork:
    """Return the network that ``EngineNetwork.save`` wrote into ``folder``.

    Args:
        folder: Folder.
        config: Content of its ``config.json``.
        device: Device to infer on; None for the engine's own.
        dtype: Dtype to compute in; None for the saved network's.

    Raises:
        UserError: The engine is unknown or not installed, or cannot run the file; or ``config`` is not as
            :mod:`.schema` describes.
    """
    with rules.naming(folder / CONFIG):
        schema.check_engine_config(config)
    engine = ENGINES.get(config['engine'])
    if engine is None:
        raise UserError(f"{folder} is for the engine '{config['engine']}', which this version does not have.")
    return EngineNetwork.load(engine, folder, config, dtype, device)


def _torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    if dtype is None or dtype == 'fast' or isinstance(dtype, torch.dtype):
        return dtype
    if dtype == 'int8':
        raise UserError("engine 'torch' has no int8: use engine='openvino' or 'onnxruntime'.")
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"there is no dtype '{dtype}': use fast, float32, bfloat16, float16 or int8.")
    return found


def _quantize(model: Path, calibration: str | os.PathLike | Tensor | None, config: dict[str, Any]) -> None:
    """Quantise a file in place, by the recipe that is best on every second image, with all bits that this CPU takes."""
    options = {'reduce_range': saturates_int8()}
    if isinstance(calibration, Tensor):
        batches = _batches(calibration, config)
        recipe = quantization.quantize_best(model, model, batches[::2], batches[1::2] or batches, **options)
    else:
        inputs = quantization.ModelInputs(str(calibration), {**config, 'uint8': False})
        inputs.keep(2 * MOST_IMAGES)
        held_out = inputs.split()
        recipe = quantization.quantize_best(model, model, inputs, held_out, **options)
    _logger.info(f'int8: calibrated by {recipe}.')


def _batches(images: Tensor, config: dict[str, Any]) -> list[tuple[np.ndarray, int]]:
    if not images.is_floating_point():
        images = normalize_images(images.cpu(), torch.tensor(config['mean']), torch.tensor(config['std']))
    return [(image.cpu().float().numpy(), -1) for image in images.split(1)]

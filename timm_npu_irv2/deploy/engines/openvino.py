"""Intel's OpenVINO, on CPUs."""

import functools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import device as devices
from ...errors import UserError, first_line
from ..onnx import optional
from .base import Engine, Session, Size, open_by_size

__all__ = ['OpenVINO']

# OpenVINO's names of what a CPU computes in, and of the hint that chooses it. What int8 leaves in floating point is
# computed in float32.
CAPABILITIES = {'float32': 'FP32', 'bfloat16': 'BF16', 'float16': 'FP16', 'int8': 'INT8'}
HINTS = {'float32': 'f32', 'bfloat16': 'bf16', 'float16': 'f16', 'int8': 'f32'}


class OpenVINO(Engine):
    """OpenVINO's CPU plugin."""

    name = 'openvino'

    def dtypes(self) -> tuple[str, ...]:
        """Return float32, and the others that the CPU has instructions for."""
        capabilities = _core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES')
        found = [name for name, capability in CAPABILITIES.items() if capability in capabilities]
        fast = str(devices.fast_dtype('cpu')).removeprefix('torch.')
        return tuple(sorted(found, key=lambda name: name != fast))

    def open(self, model: Path, dtype: str, device: str | None = None, size: Size | None = None) -> Session:
        """Compile the model for as many threads as torch uses; concurrent calls wait for each other."""
        options = {
            'PERFORMANCE_HINT': 'LATENCY',
            'INFERENCE_NUM_THREADS': torch.get_num_threads(),
            'INFERENCE_PRECISION_HINT': HINTS[dtype],
        }
        return open_by_size(size, functools.partial(_open, model, options))


def _open(model: Path, options: dict[str, Any], size: Size | None) -> Session:
    try:
        network = _core().read_model(str(model))
        if size is not None:
            network.reshape([-1, network.input().partial_shape[1], *size])
        request, lock = _core().compile_model(network, 'CPU', options).create_infer_request(), threading.Lock()
    except RuntimeError as error:
        raise UserError(f'OpenVINO cannot run {model}: {first_line(error)}') from error

    def run(images: np.ndarray) -> np.ndarray:
        with lock:  # a request computes one batch at a time, with all threads
            return request.infer({0: images}, share_inputs=True)[0]

    return run


def _core() -> Any:
    return optional('openvino', 'openvino').Core()

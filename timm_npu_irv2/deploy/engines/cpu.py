"""Facts about this machine's CPU that engines depend on."""

import logging
import platform
from pathlib import Path

import torch

from ..onnx import optional

__all__ = ['saturates_int8', 'warn_of_overflow']

_logger = logging.getLogger(__name__)

SEVEN_BITS = 64  # largest weight of ONNX Runtime's reduce_range


def saturates_int8() -> bool:
    """Return True if sums of two int8 products overflow 16 bits here: on x86 without VNNI.

    There, weights need to be of 7 bits.
    """
    # A private name, but the only one from torch 2.5 on.
    return platform.machine().lower() in ('x86_64', 'amd64') and not torch.cpu._is_vnni_supported()


def warn_of_overflow(model: Path) -> None:
    """Log a warning if an int8 network was made with weights of 8 bits, whose sums overflow on this CPU.

    Args:
        model: ONNX file; damaged ones are left to the runtime.
    """
    if not saturates_int8():
        return
    onnx = optional('onnx')
    try:
        graph = onnx.load(str(model)).graph
    except (OSError, ValueError, optional('google.protobuf.message').DecodeError):
        return
    weights = (onnx.numpy_helper.to_array(each).astype('int16') for each in graph.initializer
               if each.data_type == onnx.TensorProto.INT8)
    if any(abs(each).max(initial=0) > SEVEN_BITS for each in weights):
        _logger.warning(f'{model} has int8 weights of 8 bits, for CPUs with VNNI: sums overflow on this CPU, and '
                        'answers may be wrong. Quantise it again on this CPU, or without --full-range.')

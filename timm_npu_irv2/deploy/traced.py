"""The network as a TorchScript graph that oneDNN Graph fuses: on a CPU the fastest way that needs torch alone."""

import warnings

import torch
from torch import Tensor

from .network import InferenceNetwork

__all__ = ['trace']


@torch.inference_mode()
def trace(network: InferenceNetwork, images: Tensor) -> torch.jit.ScriptModule:
    """Return ``network`` as a graph for images such as ``images``.

    oneDNN Graph keeps what a call of oneDNN needs from one call to the next, so less time is lost around the
    convolutions; no C++ compiler is needed. It is switched on only while this graph is compiled, since it can break
    other graphs of the process: training a scripted network fails under it.

    Args:
        network: Network of ``to_inference``, on a CPU.
        images: Images (N, in_chans, H, W) of the dtype and shape to come; other shapes are computed, too, but slower.
    """
    before = torch.jit.onednn_fusion_enabled()
    torch.jit.enable_onednn_fusion(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that torch.compile is newer
            graph = torch.jit.freeze(torch.jit.trace(network, images, check_trace=False))
        for _ in range(2):  # the first call records shapes, the second one compiles
            graph(images)
    finally:
        torch.jit.enable_onednn_fusion(before)
    return graph

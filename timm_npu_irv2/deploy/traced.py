"""The network as a graph for images of one shape: without an engine the fastest way for few images.

On a CPU it is a TorchScript graph that oneDNN Graph fuses; on a GPU a CUDA graph, which the driver launches as a whole:
a single image needs hundreds of kernels of a few microseconds, and Python takes longer to launch each.
"""

import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .. import device as devices
from ..errors import UserError
from .network import InferenceNetwork

__all__ = ['trace']


@torch.inference_mode()
def trace(network: InferenceNetwork, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Return ``network`` as a graph for images such as ``images``.

    Threads may share it; on a GPU all on one stream, and it needs memory of its own for all intermediate results.

    Args:
        network: Network of ``to_inference``, on a CPU or a GPU; its weights must stay where they are.
        images: Images (N, in_chans, H, W) of the device, dtype, shape and layout to come; others are computed, too, but
            slower.

    Raises:
        UserError: The network is on another device.
    """
    backend = devices.backend(network.device)
    if backend.records_kernels:
        return _CudaGraph(network, images)
    if backend.fused_convolutions:
        return _script(network, images)
    raise UserError(f'trace: a graph exists on a CPU and on a GPU, not on {network.device.type}; call the network.')


def _script(network: InferenceNetwork, images: Tensor) -> torch.jit.ScriptModule:
    """Return a graph in which oneDNN keeps what its calls need from one to the next; no C++ compiler is needed.

    oneDNN Graph is on only while the graph is compiled, since it can break other graphs of the process: training a
    scripted network fails under it.
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


class _CudaGraph:
    def __init__(self, network: InferenceNetwork, images: Tensor) -> None:
        self.network = network
        self.images = images.to(network.device, copy=True)
        self.replay, self.out = devices.record(lambda: network(self.images), network.device)
        self.lock = threading.Lock()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_classes)."""
        if images.shape != self.images.shape or images.dtype != self.images.dtype:
            return self.network(images)
        with self.lock:  # all calls write to the same memory
            self.images.copy_(images)
            self.replay()
            return self.out.clone()

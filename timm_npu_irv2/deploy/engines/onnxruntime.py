"""Microsoft's ONNX Runtime, on CPUs."""

from pathlib import Path

import torch

from .. import onnx as graph
from .base import Engine, Session, Size, open_by_size

__all__ = ['ONNXRuntime']


class ONNXRuntime(Engine):
    """ONNX Runtime's CPU provider, which has no 16-bit convolutions."""

    name = 'onnxruntime'

    def dtypes(self) -> tuple[str, ...]:
        """Return float32 and int8."""
        graph.optional('onnxruntime', 'onnxruntime')
        return 'float32', 'int8'

    def open(self, model: Path, dtype: str, device: str | None = None, size: Size | None = None) -> Session:
        """Load the model for as many threads as torch uses."""
        threads = torch.get_num_threads()

        def open_session(known: Size | None) -> Session:
            session = graph.session(model, threads, known)
            return lambda images: graph.compute(session, images, model)

        return open_by_size(size, open_session)

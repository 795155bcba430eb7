"""The interface of an engine: a runtime of another vendor that runs the exported network."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from ...errors import UserError
from .. import onnx as graph
from .siblings import separate_siblings

__all__ = ['Engine', 'Session', 'Size', 'open_by_size']

Session = Callable[[np.ndarray], np.ndarray]  # (N, C, H, W) float32, normalised -> (N, num_classes) float32
Size = tuple[int, int]


class Engine(ABC):
    """A runtime that runs the network from a file.

    Attributes:
        name: Name for ``to_inference(engine=...)``.
        model_file: Name of the file it reads.
        dynamic_size: Support of images of any size; otherwise they have the size in ``pretrained_cfg``.
    """

    name: ClassVar[str]
    model_file: ClassVar[str] = 'model.onnx'
    dynamic_size: ClassVar[bool] = True

    @abstractmethod
    def dtypes(self) -> tuple[str, ...]:
        """Return the dtypes that it computes in on this machine, first the one that ``dtype='fast'`` means.

        Raises:
            UserError: The runtime is not installed.
        """

    @abstractmethod
    def open(self, model: Path, dtype: str, device: str | None = None, size: Size | None = None) -> Session:
        """Load a file that :meth:`build` wrote and return a function that computes logits, from any thread.

        Args:
            model: File to load.
            dtype: Dtype to compute in, one of :meth:`dtypes`.
            device: Device to compute on; None for the default one.
            size: (height, width) of most images, if it is known.

        Raises:
            UserError: The file or the device cannot be used.
        """

    def build(self, exported: Path, model: Path, dtype: str) -> None:
        """Turn the exported network, ``exported`` (ONNX, float32), into the file ``model`` that the runtime reads.

        By default, siblings become separate convolutions.
        """
        content = graph.optional('onnx', self.name).load(str(exported))
        separate_siblings(content)
        graph.write(content, model)

    def resolve_dtype(self, dtype: torch.dtype | str | None) -> str:
        """Return the name of a dtype: 'float32' for None, the fastest for 'fast'.

        Raises:
            UserError: The engine cannot compute in it on this machine.
        """
        name = str(dtype or 'float32').removeprefix('torch.')
        supported = self.dtypes()
        if name == 'fast':
            return supported[0]
        if name not in supported:
            raise UserError(f"engine '{self.name}' cannot compute in {name} here: use one of {', '.join(supported)}.")
        return name

    def resolve_device(self, device: torch.device | str | None) -> str | None:
        """Return the name of a device; None for the engine's own.

        Raises:
            UserError: The engine does not run on it.
        """
        if device is not None and torch.device(device).type != 'cpu':
            raise UserError(f"engine '{self.name}' runs on a CPU, not on {device}: use device cpu.")
        return None


def open_by_size(usual: Size | None, open_session: Callable[[Size | None], Session]) -> Session:
    """Return a session that keeps one for images of the usual size, and one for all others once they come.

    Runtimes are faster where they know height and width, for example by adding a residual in place.

    Args:
        usual: (height, width); None if it is not known.
        open_session: Function from (height, width), or None for any size, to a session.
    """
    session = functools.cache(open_session)
    session(usual)
    return lambda images: session(usual if images.shape[2:] == usual else None)(images)

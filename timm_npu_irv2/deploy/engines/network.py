"""The network on an engine, with the calls of :class:`.InferenceNetwork`."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UserError, first_line
from ...ops.normalize import normalize_images
from ...serialization import atomic_write, make_folder, open_regular
from .base import Engine, Size
from .cpu import warn_of_overflow

__all__ = ['CONFIG', 'FORMAT', 'EngineNetwork']

CONFIG = 'config.json'
FORMAT = 'timm_npu_irv2.engine'


class EngineNetwork(nn.Module):
    """Inception-ResNet-v2 that can only infer, run by an engine. ``to_inference(engine=...)`` creates it.

    It has no parameters: the weights are in a file that the engine has read. Calls may come from any thread.

    Args:
        engine: Runtime.
        model: File of the runtime; it must stay where it is.
        dtype: Dtype that the engine computes in, 'int8' included.
        arguments: ``num_classes``, ``in_chans`` and ``global_pool`` of the network.
        pretrained_cfg: Preprocessing (timm's names) and ``label_names``.
        device: Device of the engine; None for the default one.

    Attributes:
        device: Device of inputs and outputs, the CPU.

    Input: (N, in_chans, H, W), either uint8 as images come from a file, or floating point and normalised as the trained
    network takes them. Output: (N, num_classes) float32, on the input's device; no gradient flows through it.
    """

    device = torch.device('cpu')

    def __init__(
            self,
            engine: Engine,
            model: Path,
            dtype: str,
            arguments: dict[str, Any],
            pretrained_cfg: dict[str, Any],
            device: str | None = None,
    ) -> None:
        super().__init__()
        self.engine, self.dtype, self.arguments, self.pretrained_cfg = engine, dtype, arguments, pretrained_cfg
        self.num_classes, self.in_chans, self.num_features = arguments['num_classes'], arguments['in_chans'], 1536
        self._mean, self._std = (torch.tensor(pretrained_cfg[name], dtype=torch.float32) for name in ('mean', 'std'))
        self._engine_device, self._model = device, model
        self._folder: tempfile.TemporaryDirectory | None = None  # of the file, if it is this object's own
        self._session = engine.open(model, dtype, device, self._size)
        self.eval()

    @property
    def _size(self) -> Size | None:
        _, *size = self.pretrained_cfg.get('input_size') or (0,)
        return tuple(size) or None  # two, by the schema

    @classmethod
    def in_folder(cls, folder: tempfile.TemporaryDirectory, engine: Engine, *args: Any) -> 'EngineNetwork':
        """Create a network whose file is in a temporary folder, which lives as long as the network."""
        network = cls(engine, Path(folder.name) / engine.model_file, *args)
        network._folder = folder
        return network

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (N, num_classes) of images (N, in_chans, H, W).

        Raises:
            UserError: The input has another shape or type.
        """
        if x.ndim != 4 or x.shape[1] != self.in_chans or not (x.is_floating_point() or x.dtype == torch.uint8):
            raise UserError(f'expected images (N, {self.in_chans}, H, W), uint8 or floating point, got {x.dtype} '
                            f'{tuple(x.shape)}.')
        images = x.detach().cpu()
        images = images.float() if x.is_floating_point() else normalize_images(images, self._mean, self._std)
        logits = self._session(np.ascontiguousarray(images.numpy()))
        return torch.from_numpy(logits).to(x.device)

    def extra_repr(self) -> str:
        """Return the engine and its dtype, for ``repr``."""
        return f'engine={self.engine.name!r}, dtype={self.dtype!r}, num_classes={self.num_classes}'

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the engine's file and a ``config.json`` into ``folder``, which is created.

        Raises:
            CannotWrite: The folder cannot be written to.
        """
        folder, content = Path(folder), self._model.read_bytes()
        make_folder(folder)
        config = {'format': FORMAT, 'engine': self.engine.name, 'dtype': self.dtype, 'arguments': self.arguments,
                  'pretrained_cfg': self.pretrained_cfg, 'sha256': hashlib.sha256(content).hexdigest()}
        atomic_write(folder / self.engine.model_file, content)
        atomic_write(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + '\n')
        return folder

    @classmethod
    def load(
            cls,
            engine: Engine,
            folder: Path,
            config: dict[str, Any],
            dtype: torch.dtype | str | None = None,
            device: torch.device | str | None = None,
    ) -> 'EngineNetwork':
        """Return the network that :meth:`save` wrote into ``folder`` with ``config``.

        Args:
            engine: Runtime that ``config`` names.
            folder: Folder.
            config: Content of its ``config.json``.
            dtype: Dtype to compute in; None for that of the saved network.
            device: Device of the engine; None for the default one.

        Raises:
            UserError: The file is missing or damaged, or the engine cannot run it.
        """
        name, saved = engine.resolve_dtype(dtype or config['dtype']), config['dtype']
        if name != saved and 'int8' in (name, saved):
            raise UserError(f'{folder} was saved in {saved}, which cannot become {name}: leave dtype out.')
        path = folder / engine.model_file
        try:
            with open_regular(path) as file:
                digest = hashlib.sha256(file.read()).hexdigest()
        except OSError as error:
            raise UserError(f'cannot read {path}: {error.strerror or first_line(error)}.') from error
        if digest != config['sha256']:
            raise UserError(f'{path} is damaged: its checksum is wrong.')
        if name == 'int8':
            warn_of_overflow(path)
        return cls(engine, path, name, config['arguments'], config['pretrained_cfg'], engine.resolve_device(device))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with the file's content, so that copies and pickles have their own file."""
        dropped = ('_session', '_model', '_folder')
        state = {key: value for key, value in self.__dict__.items() if key not in dropped}
        return state | {'content': self._model.read_bytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        content = state.pop('content')
        super().__setstate__(state)
        self._folder = tempfile.TemporaryDirectory(prefix='timm_npu_irv2-')
        self._model = Path(self._folder.name) / self.engine.model_file
        self._model.write_bytes(content)
        self._session = self.engine.open(self._model, self.dtype, self._engine_device, self._size)

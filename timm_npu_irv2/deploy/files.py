"""Deployed networks by their files: a folder of ``save``, an ONNX file or CANN's .om file, behind one interface."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..ops.normalize import normalize_images
from ..serialization import read_json
from . import engines, onnx, store
from .engines import ENGINES, EngineNetwork
from .engines.base import Session
from .engines.cpu import warn_of_overflow
from .network import InferenceNetwork

__all__ = ['Deployed', 'FileNetwork', 'is_deployed', 'open_deployed']

CONFIG = 'config.json'


@dataclass(frozen=True)
class Deployed:
    """A deployed network.

    Attributes:
        network: Network from images to logits, with its preprocessing and class names in ``pretrained_cfg``.
        format: Format and dtype in words, such as 'folded float32' or 'onnx int8'.
        size: Number of bytes of its files.
    """

    network: nn.Module
    format: str
    size: int


def is_deployed(path: Path) -> bool:
    """Return True if a path names a deployed network: an .onnx or .om file, or a folder that ``save`` wrote."""
    if path.is_dir():
        config = path / CONFIG
        return config.is_file() and read_json(config).get('format') in (store.FORMAT, engines.FORMAT)
    return path.suffix.lower() in ('.onnx', '.om')


def open_deployed(path: Path, device: torch.device | str | None = None) -> Deployed:
    """Return the network in a file or folder.

    ONNX files run in ONNX Runtime on the CPU, .om files on an Ascend card. An .om file has no preprocessing in it, so
    the ONNX file that it was compiled from must lie beside it, as onnx_export.py --atc leaves them.

    Args:
        path: File or folder, see :func:`is_deployed`.
        device: Device of a folded network; None for the best one. Other engines choose their own.

    Raises:
        UserError: The file is missing or damaged, is not of this package, or its runtime is not installed.
    """
    if path.is_dir():
        return _open_folder(path, device)
    if not path.is_file():
        raise UserError(f'{path}: no such file.')
    compiled = path.suffix.lower() == '.om'
    source = _source_of(path) if compiled else path
    config, shape, classes, dtype = onnx.describe(source)
    engine: Any = ENGINES['om' if compiled else 'onnxruntime']
    engine.dtypes()  # names what is not installed
    if dtype == 'int8' and not compiled:
        warn_of_overflow(path)
    session = engine.open(path, 'float32', None)
    return Deployed(FileNetwork(path, session, config, shape, classes), 'om' if compiled else f'onnx {dtype}',
                    path.stat().st_size)


def _open_folder(path: Path, device: torch.device | str | None) -> Deployed:
    config = read_json(path / CONFIG)
    runs_in_torch = config.get('format') == store.FORMAT
    network = store.load(path, device if runs_in_torch else None)
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    if isinstance(network, EngineNetwork):
        return Deployed(network, f'{network.engine.name} {network.dtype}', size)
    assert isinstance(network, InferenceNetwork)
    return Deployed(network, f'folded {config["dtype"]}', size)


def _source_of(path: Path) -> Path:
    """Return the ONNX file beside an .om file, which ATC names <source>_<chip>.om."""
    for stem in (path.stem, re.sub(r'_Ascend\w+$', '', path.stem)):
        if (source := path.with_name(f'{stem}.onnx')).is_file():
            return source
    raise UserError(f'{path}: the ONNX file that it was compiled from is not beside it, and only that file knows the '
                    'preprocessing and the classes.')


class FileNetwork(nn.Module):
    """A network that a runtime computes from a file of its own.

    Args:
        path: File, for messages.
        session: Function of the runtime from images to logits.
        config: Preprocessing, by timm's names; ``uint8`` in it tells if the file normalises the images itself.
        shape: Shape of the file's input (N, C, H, W); None for any length.
        num_classes: Number of logits.

    Attributes:
        pretrained_cfg: The preprocessing, and ``label_names`` where they are known.
        normalizes: True if the mean and the deviation are in the file, so that they cannot be changed.

    Input: (N, C, H, W), either uint8 as images come from a file, or floating point and normalised. Output: (N,
    num_classes) float32, on the input's device; no gradient flows through it.
    """

    device = torch.device('cpu')

    def __init__(
            self,
            path: Path,
            session: Session,
            config: dict[str, Any],
            shape: list[int | None],
            num_classes: int,
    ) -> None:
        super().__init__()
        self.path, self.num_classes, self.in_chans = path, num_classes, shape[1]
        self.normalizes = config['uint8']
        self.pretrained_cfg = {key: value for key, value in config.items() if key != 'uint8'}
        self._session, self._shape = session, shape
        self._mean, self._std = (torch.tensor(config[name], dtype=torch.float32) for name in ('mean', 'std'))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (N, num_classes) of images (N, C, H, W).

        Raises:
            UserError: The file takes images of another size.
        """
        if any(expected not in (None, found) for expected, found in zip(self._shape[1:], x.shape[1:], strict=True)):
            expected_shape = ' × '.join(map(str, self._shape[1:]))
            raise UserError(f'{self.path} takes images of {expected_shape}, not {" × ".join(map(str, x.shape[1:]))}: '
                            'leave out --img-size, --input-size and --in-chans, or export it for these images.')
        pixels = x.detach().cpu()
        if self.normalizes:
            pixels = self._to_uint8(pixels) if pixels.is_floating_point() else pixels
        else:
            pixels = pixels.float() if pixels.is_floating_point() else normalize_images(pixels, self._mean, self._std)
        return torch.from_numpy(self._run(np.ascontiguousarray(pixels.numpy()))).to(x.device)

    def _to_uint8(self, images: Tensor) -> Tensor:
        """Return the pixels that normalised images were made from: float32 keeps eight bits exactly."""
        mean, std = (each.view(-1, 1, 1) for each in (self._mean, self._std))
        return ((images.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def _run(self, images: np.ndarray) -> np.ndarray:
        batch = self._shape[0]
        if batch is None:
            return self._session(images)
        parts = [np.zeros((0, self.num_classes), np.float32)]
        for start in range(0, len(images), batch):
            part = images[start:start + batch]
            filled = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), part.dtype)])
            parts.append(self._session(filled)[:len(part)])
        return np.concatenate(parts)

    def extra_repr(self) -> str:
        """Return the file, for ``repr``."""
        return repr(str(self.path))

"""An ONNX model in int8: post-training quantisation with ONNX Runtime's tools, and what it costs in accuracy."""

import copy
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_transform
from timm.data.readers.img_extensions import get_img_extensions

from ..data.decode import to_pil_mode
from ..errors import UserError, first_line
from .onnx import optional, session, write

__all__ = ['Loss', 'Photographs', 'compare', 'quantize']


@dataclass(frozen=True)
class Loss:
    """int8 beside float32, over ``images`` images.

    Attributes:
        agreement: Share of the images with the same best class.
        error: Norm of the logits' difference over the norm of the logits.
        top1: (float32, int8) share of right answers; None where the images' classes are not known.
    """

    images: int
    agreement: float
    error: float
    top1: tuple[float, float] | None


class Photographs:
    """The images below a folder, prepared for a model; their subfolders are their classes if they are as many.

    Args:
        folder: Where they are.
        config: The model's preprocessing (see ``graph.preprocessing``).
    """

    def __init__(self, folder: str | os.PathLike, config: dict[str, Any]) -> None:
        folder, endings = Path(folder), tuple(get_img_extensions())
        if not folder.is_dir():
            raise UserError(f'{folder}: no such folder.')
        paths = sorted(path for path in folder.rglob('*') if path.suffix.lower() in endings and path.is_file())
        if not paths:
            raise UserError(f'{folder}: no images below it.')
        self.classes = sorted({path.relative_to(folder).parts[0] for path in paths if path.parent != folder})
        self.samples = [(path, self.classes.index(path.relative_to(folder).parts[0]) if path.parent != folder else -1)
                        for path in paths]
        self._uint8 = config['uint8']
        self._mode = {1: 'L', 3: 'RGB'}.get(config['input_size'][0])
        if self._mode is None:
            raise UserError(f'the model takes {config["input_size"][0]} channels, which no image file has.')
        wanted = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
        self._transform = create_transform(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in config.items()
               if key in wanted}, is_training=False, use_prefetcher=self._uint8)

    def keep(self, limit: int) -> None:
        """Leave out all but ``limit`` images, spread evenly."""
        step = max(len(self.samples) / limit, 1)
        self.samples = [self.samples[int(i * step)] for i in range(min(limit, len(self.samples)))]

    def split(self) -> 'Photographs':
        """Give every second image away; a single one stays in both."""
        other = copy.copy(self)
        other.samples, self.samples = self.samples[1::2] or self.samples, self.samples[::2]
        return other

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Batches of one, (1, C, H, W), uint8 or float32 as the model takes them."""
        for path, _ in self.samples:
            try:
                with Image.open(path) as image:
                    pixels = np.asarray(self._transform(to_pil_mode(image, self._mode)))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise UserError(f'{path} cannot be read: {first_line(error)}') from error
            yield np.ascontiguousarray(pixels[None])


def quantize(
        model: str | os.PathLike,
        output: str | os.PathLike,
        photographs: Photographs,
        per_channel: bool = True,
        reduce_range: bool = True,
        method: str = 'minmax',
) -> None:
    """Write ``model`` in int8 (QDQ): weights and activations, with ranges from ``photographs``.

    Args:
        model: A float32 ONNX file.
        output: The file to write.
        photographs: For calibration; a hundred of them are enough.
        per_channel: A scale for each output channel of a convolution.
        reduce_range: Weights of 7 bits, without which CPUs that have no VNNI overflow.
        method: 'minmax', 'entropy' or 'percentile'.
    """
    tools = optional('onnxruntime.quantization')
    name = session(model).get_inputs()[0].name
    batches = iter(photographs)

    class Reader(tools.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(batches, None)
            return None if batch is None else {name: batch}

    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises to preprocess the model, which is folded already
    try:
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / 'int8.onnx'
            tools.quantize_static(
                str(model), str(temporary), Reader(), quant_format=tools.QuantFormat.QDQ, per_channel=per_channel,
                reduce_range=reduce_range, activation_type=tools.QuantType.QUInt8, weight_type=tools.QuantType.QInt8,
                calibrate_method=getattr(tools.CalibrationMethod, {'minmax': 'MinMax'}.get(method, method.title())))
            write(optional('onnx').load(str(temporary)), output)
    finally:
        logging.root.setLevel(level)


def compare(float32: str | os.PathLike, int8: str | os.PathLike, photographs: Photographs) -> Loss:
    """What int8 loses against float32 on ``photographs``."""
    runners = [session(float32), session(int8)]
    name = runners[0].get_inputs()[0].name
    logits = np.stack([[runner.run(None, {name: batch})[0][0] for runner in runners] for batch in photographs], 1)
    exact, approximate = logits
    answers = logits.argmax(-1)
    known = len(photographs.classes) == exact.shape[-1]
    return Loss(
        len(photographs), float((answers[0] == answers[1]).mean()),
        float(np.linalg.norm(approximate - exact) / np.linalg.norm(exact)),
        tuple((answers == [target for _, target in photographs.samples]).mean(-1).tolist()) if known else None,
    )

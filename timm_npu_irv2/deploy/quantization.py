"""An ONNX model in int8: post-training quantisation with ONNX Runtime's tools, and its loss of accuracy."""

import copy
import itertools
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.classes import class_indices, clean_name, map_classes, number_classes
from ..data.decode import read_image
from ..data.folder import ImageFile, find_images
from ..data.pipeline import ImagePipeline
from ..errors import UserError, first_line
from .onnx import optional, session, write

__all__ = ['Loss', 'ModelInputs', 'compare', 'quantize']

_logger = logging.getLogger(__name__)
_logger.setLevel(logging.INFO)  # of its own, since quantize() silences the root


@dataclass(frozen=True)
class Loss:
    """Comparison of int8 with float32.

    Attributes:
        images: Number of images.
        agreement: Share of the images with the same best class.
        error: Norm of the difference of the logits over the norm of the logits.
        top1: Shares of right answers of float32 and int8; None where the classes of the images are not known.
    """

    images: int
    agreement: float
    error: float
    top1: tuple[float, float] | None


class ModelInputs:
    """The images in a folder or a tar file, prepared for a model.

    Class folders are numbered by their names, as the model was trained; where the file of the model has no names, in
    the order in which a training numbers them, if there are as many as the model has outputs.

    Args:
        root: Folder or tar file.
        config: Preprocessing of the model, as :func:`.onnx.preprocessing` returns it.
        on_bad_image: 'stop' with a UserError at an image that cannot be read, or 'skip' it.

    Raises:
        UserError: No images, some class folders that the model does not know, or no images for the model.
    """

    def __init__(self, root: str | os.PathLike, config: dict[str, Any], on_bad_image: str = 'stop') -> None:
        images = find_images(root)
        self.on_bad_image = on_bad_image
        self._pipeline = ImagePipeline.from_config(config)
        self._transform = self._pipeline.transform(normalize=not config['uint8'])
        self._in_order = not config.get('label_names')
        try:
            indices = _class_indices(images, config)
        except UserError as error:
            raise UserError(f'{root}: {error}') from None
        self._classes = len(indices)
        self.samples = [(image, indices.get(_class_name(image), -1)) for image in images]

    def targets_known(self, outputs: int) -> bool:
        """Return True if the classes of the images are known for a model with so many outputs."""
        return self._classes == outputs if self._in_order else self._classes > 0

    def keep(self, limit: int) -> None:
        """Leave out all but ``limit`` images, spread evenly."""
        step = max(len(self.samples) / limit, 1)
        self.samples = [self.samples[int(i * step)] for i in range(min(limit, len(self.samples)))]

    def split(self) -> 'ModelInputs':
        """Give every second image away; a single one stays in both."""
        other = copy.copy(self)
        other.samples, self.samples = self.samples[1::2] or self.samples, self.samples[::2]
        return other

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yield batches of one image (1, C, H, W), uint8 or float32 as the model takes them, and class indices."""
        for image, target in self.samples:
            try:
                with image.open() as file:
                    pixels = np.asarray(self._transform(read_image(file, self._pipeline.input_img_mode)))
            except Exception as error:  # decoders fail in as many ways as files can be damaged
                if self.on_bad_image == 'stop':
                    raise UserError(f'image {image.path} cannot be read: {first_line(error)}') from error
                _logger.warning(f'Skipped image {image.path}, which cannot be read: {first_line(error)}')
                continue
            yield np.ascontiguousarray(pixels[None]), target


def _class_name(image: ImageFile) -> str:
    return clean_name(image.folder.rpartition('/')[2])


def _class_indices(images: list[ImageFile], config: dict[str, Any]) -> dict[str, int]:
    """Return the indices of the class folders by name; nothing if the folders are no class folders."""
    found = {_class_name(image) for image in images} - {''}
    expected = class_indices(config.get('label_names'))
    if expected is None:
        return number_classes(found) if found else {}
    if found.isdisjoint(expected):
        if found:
            _logger.warning('None of the folders has the name of a class: the accuracy is not measured.')
        return {}
    map_classes(found, expected)
    return expected


def quantize(
        model: str | os.PathLike,
        output: str | os.PathLike,
        inputs: ModelInputs,
        per_channel: bool = True,
        reduce_range: bool = True,
        method: str = 'minmax',
) -> None:
    """Write ``model`` in int8 (QDQ): weights and activations, with ranges from ``inputs``.

    Args:
        model: ONNX file in float32.
        output: File to write.
        inputs: Images for calibration; a hundred of them are enough.
        per_channel: Use a scale for each output channel of a convolution.
        reduce_range: Use weights of 7 bits; with 8, CPUs without VNNI overflow.
        method: 'minmax', 'entropy' or 'percentile'.

    Raises:
        UserError: None of the images can be read, or the file is no model.
        CannotWrite: The output cannot be written.
    """
    tools: Any = optional('onnxruntime.quantization')
    name = session(model).get_inputs()[0].name
    rest = iter(inputs)
    first = next(rest, None)
    if first is None:
        raise UserError('none of the images for calibration can be read.')
    batches = itertools.chain([first], rest)

    class Reader(tools.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch, _ = next(batches, (None, None))
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


def compare(float32: str | os.PathLike, int8: str | os.PathLike, inputs: ModelInputs) -> Loss:
    """Return the loss of int8 against float32 on ``inputs``.

    Raises:
        UserError: None of the images can be read.
    """
    runners = [session(float32), session(int8)]
    name = runners[0].get_inputs()[0].name
    results = [(target, [runner.run(None, {name: batch})[0][0] for runner in runners]) for batch, target in inputs]
    if not results:
        raise UserError('none of the images can be read.')
    exact, approximate = np.stack([logits for _, logits in results], 1)
    answers = np.stack((exact, approximate)).argmax(-1)
    targets = np.array([target for target, _ in results])
    known = targets >= 0
    top1 = None
    if known.any() and inputs.targets_known(exact.shape[-1]):
        right, right8 = (answers[:, known] == targets[known]).mean(-1).tolist()
        top1 = right, right8
    return Loss(
        len(results), float((answers[0] == answers[1]).mean()),
        float(np.linalg.norm(approximate - exact) / np.linalg.norm(exact)), top1)

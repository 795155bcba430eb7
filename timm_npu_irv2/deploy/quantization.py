"""An ONNX model in int8: post-training quantisation with ONNX Runtime's tools, and its loss of accuracy."""

import contextlib
import copy
import io
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cli.onnx_flags import METHODS
from ..data.classes import class_indices, clean_name, map_classes, number_classes
from ..data.decode import read_image
from ..data.folder import ImageFile, find_images
from ..data.pipeline import ImagePipeline
from ..errors import UserError, first_line
from .onnx import compute, optional, session, write

__all__ = ['METHODS', 'Inputs', 'Loss', 'ModelInputs', 'Recipe', 'compare', 'quantize', 'quantize_best']

_logger = logging.getLogger(__name__)
_logger.setLevel(logging.INFO)  # of its own, since quantize() silences the root

PAYS = 0.1  # share of the difference of the logits that float32 at both ends must remove to be worth its time

Inputs = Iterable[tuple[np.ndarray, int]]  # batches of one image (1, C, H, W) with the index of its class, or -1


@dataclass(frozen=True)
class Recipe:
    """A way to quantise.

    Attributes:
        method: One of ``METHODS``.
        float_ends: Keep the first and the last layer in float32.
    """

    method: str
    float_ends: bool = False

    def __str__(self) -> str:
        return self.method + (' with float32 at both ends' if self.float_ends else '')


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
    """Images in a folder or a tar file, prepared for a model.

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


def _class_indices(images: Sequence[ImageFile], config: dict[str, Any]) -> dict[str, int]:
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
        inputs: Inputs,
        per_channel: bool = True,
        reduce_range: bool = True,
        method: str = 'minmax',
        float_ends: bool = False,
) -> None:
    """Write ``model`` in int8 (QDQ): weights and activations, with ranges from ``inputs``.

    Args:
        model: ONNX file in float32.
        output: File to write.
        inputs: Images for calibration; a hundred of them are enough.
        per_channel: Use a scale for each output channel of a convolution.
        reduce_range: Use weights of 7 bits; with 8, CPUs without VNNI overflow.
        method: One of ``METHODS``.
        float_ends: Keep the first and the last layer in float32.

    Raises:
        UserError: None of the images can be read, or the file is no model.
        CannotWrite: The output cannot be written.
    """
    tools: Any = optional('onnxruntime.quantization')
    reader = _reader(session(model).get_inputs()[0].name, [batch for batch, _ in inputs])
    layers = [node.name for node in optional('onnx').load(str(model)).graph.node if node.op_type in ('Conv', 'Gemm')]
    with tempfile.TemporaryDirectory() as folder, _silence_tools():
        temporary = Path(folder) / 'int8.onnx'
        try:
            tools.quantize_static(
                str(model), str(temporary), reader, quant_format=tools.QuantFormat.QDQ, per_channel=per_channel,
                reduce_range=reduce_range, activation_type=tools.QuantType.QUInt8, weight_type=tools.QuantType.QInt8,
                calibrate_method=getattr(tools.CalibrationMethod, {'minmax': 'MinMax'}.get(method, method.title())),
                nodes_to_exclude=[layers[0], layers[-1]] if float_ends else [],
                extra_options={'CalibStridedMinMax': 1})  # any method: activations of one batch in memory, not of all
        except OSError:  # of the disk
            raise
        except Exception as error:  # the tools check a model by whatever fails first
            raise UserError(f'{model} cannot be quantised: {first_line(error)}') from error
        write(optional('onnx').load(str(temporary)), output)


def _reader(name: str, batches: Sequence[np.ndarray]) -> Any:
    """Return an object through which ONNX Runtime's tools read the batches, a range at a time."""
    if not batches:
        raise UserError('none of the images for calibration can be read.')
    base: Any = optional('onnxruntime.quantization').CalibrationDataReader

    class Reader(base):
        def __len__(self) -> int:
            return len(batches)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.chosen = iter(batches[start_index:end_index])

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.chosen, None)
            return None if batch is None else {name: batch}

    return Reader()


@contextlib.contextmanager
def _silence_tools() -> Iterator[None]:
    """Silence ONNX Runtime's tools: they print their progress, and advise to fold a model that is folded already."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.root.setLevel(level)


def quantize_best(
        model: str | os.PathLike,
        output: str | os.PathLike,
        inputs: Inputs,
        held_out: Inputs,
        **options: Any,
) -> Recipe:
    """Write ``model`` in int8 by the recipe that changes its logits least.

    Args:
        model: ONNX file in float32.
        output: File to write; it may be ``model``.
        inputs: Images for calibration.
        held_out: Other images, on which the logits are compared.
        options: ``per_channel`` and ``reduce_range`` of :func:`quantize`.

    Returns:
        The recipe. The first and the last layer stay in float32 if that removes the share ``PAYS`` of the difference.

    Raises:
        UserError: None of the images can be read, or the file is no model.
        CannotWrite: The output cannot be written.
    """
    inputs, held_out = list(inputs), list(held_out)
    expected = _logits(model, held_out)
    with tempfile.TemporaryDirectory() as folder:
        def attempt(recipe: Recipe) -> float:
            path = Path(folder) / f'{recipe}.onnx'
            quantize(model, path, inputs, method=recipe.method, float_ends=recipe.float_ends, **options)
            error = _relative_error(_logits(path, held_out), expected)
            _logger.info(f'int8, {recipe}: logits differ by {error:.1e} (relative)')
            return error

        errors = {recipe: attempt(recipe) for recipe in map(Recipe, METHODS)}
        best = min(errors, key=lambda recipe: errors[recipe])
        ends = Recipe(best.method, float_ends=True)
        if attempt(ends) < errors[best] * (1 - PAYS):
            best = ends
        write(optional('onnx').load(str(Path(folder) / f'{best}.onnx')), output)
    return best


def _logits(model: str | os.PathLike, inputs: Inputs) -> np.ndarray:
    """Return the logits (N, classes) of batches of one image."""
    runner = session(model)
    logits = [compute(runner, batch, model) for batch, _ in inputs]
    if not logits:
        raise UserError('none of the images can be read.')
    return np.concatenate(logits)


def _relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the norm of the difference over the norm of ``expected``."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def compare(float32: str | os.PathLike, int8: str | os.PathLike, inputs: ModelInputs) -> Loss:
    """Return the loss of int8 against float32 on ``inputs``.

    Raises:
        UserError: None of the images can be read.
    """
    runners = [(session(path), path) for path in (float32, int8)]
    results = [(target, [compute(runner, batch, path)[0] for runner, path in runners]) for batch, target in inputs]
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
        _relative_error(approximate, exact), top1)

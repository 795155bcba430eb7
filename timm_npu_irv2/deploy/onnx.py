"""Export to ONNX, for ONNX Runtime, OpenVINO and, through ATC, Ascend's inference devices."""

import io
import json
import os
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from .. import rules, schema
from ..cli.onnx_flags import OPSET
from ..errors import UserError, first_line
from ..serialization import atomic_write, open_regular
from .network import InferenceNetwork

__all__ = ['INPUT', 'OPSET', 'SOC_VERSIONS', 'AtcCommand', 'Description', 'check', 'compute', 'describe', 'export',
           'optional', 'preprocessing', 'session', 'write']

INPUT, OUTPUT = 'images', 'logits'
PREPROCESSING = 'timm_npu_irv2.preprocessing'  # key in the metadata of the file

SOC_VERSIONS = ('Ascend310P3', 'Ascend910B3')


def optional(name: str, extra: str = 'export', install: str = '') -> ModuleType:
    """Import a package that only some users have.

    Args:
        name: Module to import.
        extra: Extra of this package that installs it.
        install: Advice for a package that no extra can install.

    Raises:
        UserError: It is not installed.
    """
    if name.partition('.')[0] == 'onnxruntime':  # from 1.29 on it reports its use to its maker, unless told otherwise
        os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')
    try:
        return __import__(name, fromlist=['*'])
    except ImportError as error:
        advice = install or f"pip install 'timm-npu-irv2[{extra}]'"
        raise UserError(f'{error.name or name} is not installed: {advice}.') from error


def export(
        network: InferenceNetwork,
        path: str | os.PathLike,
        *,
        uint8: bool = True,
        batch_size: int | None = None,
        img_size: tuple[int, int] | None = None,
        dynamic_size: bool = False,
        opset: int = OPSET,
        dynamo: bool = False,
        **options: Any,
) -> None:
    """Write ``network`` as an ONNX file with an input 'images' and an output 'logits'.

    Args:
        network: Network of ``to_inference``, on the CPU and in float32.
        path: File to write.
        uint8: Take uint8 images, otherwise normalised float32 images.
        batch_size: Fixed batch size; None for any.
        img_size: (height, width); None for that of ``pretrained_cfg``.
        dynamic_size: Take images of any size of at least 75 px.
        opset: Version of the ONNX operators.
        dynamo: Use the newer exporter of torch, which needs opset 18.
        options: Further arguments of ``torch.onnx.export``.

    Raises:
        CannotWrite: The file cannot be written.
        UserError: onnx is not installed, or torch cannot export with these options.
    """
    height, width = img_size or network.pretrained_cfg.get('input_size', (3, 299, 299))[1:]
    shape = (batch_size or 2, network.in_chans, height, width)  # 1 would be taken for a constant
    example = torch.zeros(shape, dtype=torch.uint8 if uint8 else torch.float32)
    axes = {} if batch_size else {0: 'batch'}
    axes |= {2: 'height', 3: 'width'} if dynamic_size else {}
    if dynamo:
        optional('onnxscript')
        options |= {'dynamic_shapes': ({axis: torch.export.Dim(name) for axis, name in axes.items()},)}
    else:
        options |= {'dynamic_axes': {INPUT: axes, OUTPUT: {0: 'batch'}} if axes else None}
    onnx, buffer = optional('onnx'), io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about the newer exporter
            program = torch.onnx.export(
                network, (example,), None if dynamo else buffer, opset_version=opset, dynamo=dynamo,  # type: ignore[arg-type]  # takes buffers, too
                input_names=[INPUT], output_names=[OUTPUT], **options)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        raise UserError(f'torch cannot export with these options: {first_line(error)}') from error
    model = program.model_proto if program is not None else onnx.load_from_string(buffer.getvalue())
    config = {**network.pretrained_cfg, 'input_size': shape[1:], 'uint8': uint8}
    onnx.helper.set_model_props(model, {PREPROCESSING: json.dumps(config)})
    write(model, path)


def write(model: Any, path: str | os.PathLike) -> None:
    """Write an ONNX model atomically.

    Raises:
        CannotWrite: The file cannot be written.
    """
    atomic_write(path, model.SerializeToString())


def session(path: str | os.PathLike, threads: int = 0, size: tuple[int, int] | None = None) -> Any:
    """Open a file with ONNX Runtime, on the CPU.

    Args:
        path: ONNX file.
        threads: Number of threads; 0 for the default of ONNX Runtime.
        size: (height, width) of all images, for a file that takes any size.

    Raises:
        UserError: The file is not an ONNX model, or onnxruntime is not installed.
    """
    runtime = optional('onnxruntime')
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for name, value in zip(('height', 'width'), size or (), strict=False):
        options.add_free_dimension_override_by_name(name, value)
    try:
        return runtime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    except Exception as error:  # its exceptions have no public base class
        raise UserError(f'{path} cannot be read as an ONNX model: {first_line(error)}') from error


class Description(NamedTuple):
    """A description of a file that :func:`export` or :mod:`.quantization` wrote.

    Attributes:
        preprocessing: Preprocessing by timm's names, and ``uint8``: True if the file normalises the images itself.
        shape: Shape of the input (N, C, H, W); None for any length.
        num_classes: Number of logits.
        dtype: 'int8' or 'float32'.
    """

    preprocessing: dict[str, Any]
    shape: list[int | None]
    num_classes: int
    dtype: str


def describe(path: str | os.PathLike) -> Description:
    """Return the description of a file.

    Raises:
        UserError: The file is not an ONNX model, has no preprocessing in its metadata, or not the input and the output
            of an exported network.
    """
    onnx, damaged = optional('onnx'), optional('google.protobuf.message').DecodeError  # protobuf comes with onnx
    try:
        with open_regular(path) as file:
            model = onnx.load_from_string(file.read())  # without weights in other files
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        config = json.loads(metadata.get(PREPROCESSING, 'null'))
    except (OSError, damaged, RecursionError, ValueError) as error:
        raise UserError(f'{path} cannot be read as an ONNX model: {first_line(error)}') from error
    if config is None:
        raise UserError(f'{path} does not contain its preprocessing: export it with train_scripts/onnx_export.py.')
    inputs, outputs = ([(each.name, _shape_of(each)) for each in group[:1]]
                       for group in (model.graph.input, model.graph.output))
    if [(name, len(shape)) for name, shape in (*inputs, *outputs)] != [(INPUT, 4), (OUTPUT, 2)]:
        raise UserError(f"{path} is not an exported network: expected an input '{INPUT}' (N, C, H, W) and an output "
                        f"'{OUTPUT}' (N, classes). Export it with train_scripts/onnx_export.py.")
    (_, shape), (_, logits) = *inputs, *outputs
    with rules.naming(path):
        arguments = {'num_classes': logits[1], 'in_chans': shape[1], 'global_pool': 'avg'}
        schema.check_inference_config({'dtype': 'float32', 'arguments': arguments, 'pretrained_cfg': config})
        rules.record({'mean': rules.many(rules.number()), 'std': rules.many(rules.number()),
                      'uint8': rules.one_of(True, False)})(config, '')
    quantized = any(node.op_type == 'QuantizeLinear' for node in model.graph.node)
    return Description(config, shape, cast(int, logits[1]), 'int8' if quantized else 'float32')


def preprocessing(path: str | os.PathLike) -> dict[str, Any]:
    """Return the preprocessing of a file, see :func:`describe`."""
    return describe(path).preprocessing


def _shape_of(value: Any) -> list[int | None]:
    return [axis.dim_value or None for axis in value.type.tensor_type.shape.dim]


def compute(runner: Any, images: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """Return the first output of a session.

    Args:
        runner: What :func:`session` returned.
        images: Images (N, C, H, W).
        path: File of the session, for messages.

    Raises:
        UserError: ONNX Runtime cannot compute it.
    """
    try:
        return runner.run(None, {runner.get_inputs()[0].name: images})[0]
    except Exception as error:  # its exceptions have no public base class
        raise UserError(f'ONNX Runtime cannot run {path}: {first_line(error)}') from error


def check(network: InferenceNetwork, path: str | os.PathLike, batch_sizes: Sequence[int] = (1, 3)) -> float:
    """Return the largest relative error of ONNX Runtime's outputs against PyTorch's: norm of the difference over norm.

    Args:
        network: Network that was exported.
        path: ONNX file.
        batch_sizes: Batch sizes of the random images; a fixed batch size of the file takes precedence.
    """
    runner = session(path)
    given = runner.get_inputs()[0]
    if isinstance(given.shape[0], int):
        batch_sizes = (given.shape[0],)
    size = [each if isinstance(each, int) else 299 for each in given.shape[1:]]
    generator, errors = np.random.default_rng(0), []
    for batch_size in batch_sizes:
        images = generator.integers(0, 256, (batch_size, *size), dtype=np.uint8)
        if given.type != 'tensor(uint8)':
            images = (images / np.float32(127.5) - 1).astype(np.float32)
        with torch.inference_mode():
            expected = network(torch.from_numpy(images)).numpy()
        output = compute(runner, images, path)
        errors.append(float(np.linalg.norm(output - expected) / np.linalg.norm(expected)))
    return max(errors)


class AtcCommand:
    """A command of CANN's ATC that compiles an ONNX file for an Ascend device. It needs no AIPP to normalise images.

    Args:
        model: ONNX file.
        soc_version: Device type: the name that ``npu-smi info`` shows, with 'Ascend' before it.
        input_shape: Shape of the input, with a name or None for a variable size.
        batch_sizes: Batch sizes to compile for, if the model takes any.
    """

    def __init__(
            self,
            model: Path,
            soc_version: str,
            input_shape: Sequence[Any],
            batch_sizes: Sequence[int] = (1, 2, 4, 8),
    ) -> None:
        shape = [each if isinstance(each, int) else -1 for each in input_shape]
        self.output = model.with_name(f'{model.stem}_{soc_version}.om')
        self.words = [
            'atc', f'--model={model}', '--framework=5', f'--output={self.output.with_suffix("")}',
            f'--soc_version={soc_version}', '--input_format=NCHW',
            f'--input_shape={INPUT}:{",".join(map(str, shape))}',
        ]
        if shape[0] == -1:
            self.words.append(f'--dynamic_batch_size={",".join(map(str, batch_sizes))}')

    def __str__(self) -> str:
        return shlex.join(self.words)

    def check(self, force: bool = False) -> None:
        """Raise UserError if ATC is not installed, or the .om file exists and ``force`` is false."""
        if self.output.exists() and not force:
            raise UserError(f'{self.output} exists: --force overwrites it.')
        if shutil.which('atc') is None:
            raise UserError("--atc: atc is not found. Install the CANN toolkit and source its set_env.sh first.")

    def run(self, force: bool = False) -> None:
        """Run the command.

        Raises:
            UserError: See :meth:`check`; or ATC fails.
        """
        self.check(force)
        done = subprocess.run(self.words, check=False)
        if done.returncode:
            raise UserError(f'atc failed with exit code {done.returncode}; see its messages above.')
        if not self.output.exists():
            raise UserError(f'atc reported success but did not write {self.output}.')

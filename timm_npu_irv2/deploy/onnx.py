"""The network as an ONNX file, for ONNX Runtime, OpenVINO and, through ATC, for Ascend's inference cards."""

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
from typing import Any

import numpy as np
import torch

from ..errors import UserError, first_line
from ..serialization import atomic_write
from .network import InferenceNetwork

__all__ = ['OPSET', 'SOC_VERSIONS', 'AtcCommand', 'check', 'export', 'optional', 'preprocessing', 'session', 'write']

# Of the operators of this graph every version up to 18 is on ATC's list of supported ones; 13 is the lowest with which
# weights can be quantised channel by channel.
OPSET = 13
INPUT, OUTPUT = 'images', 'logits'
PREPROCESSING = 'timm_npu_irv2.preprocessing'  # the key of the file's metadata

SOC_VERSIONS = ('Ascend310P3', 'Ascend910B3')


def optional(name: str) -> ModuleType:
    """A package of the extra 'export'. Raises UserError where it is missing."""
    try:
        return __import__(name, fromlist=['*'])
    except ImportError as error:
        missing = error.name or name
        raise UserError(f"{missing} is not installed: pip install 'timm-npu-irv2[export]'.") from error


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
        network: What ``to_inference`` gives, on the CPU and in float32.
        path: The file.
        uint8: Take uint8 images; otherwise float32, normalised ones.
        batch_size: A fixed number of images; None for any.
        img_size: (height, width); None for what ``pretrained_cfg`` says.
        dynamic_size: Take images of any size from 75 px on.
        opset: Version of ONNX's operators.
        dynamo: Use torch's newer exporter, which knows no opset below 18.
        options: Of ``torch.onnx.export``.

    Raises:
        CannotWrite: The file can't be put there.
        UserError: onnx is missing, or torch can't export with these options.
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
            warnings.simplefilter('ignore')  # that there is a newer exporter
            program = torch.onnx.export(
                network, (example,), None if dynamo else buffer, opset_version=opset, dynamo=dynamo,
                input_names=[INPUT], output_names=[OUTPUT], **options)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        raise UserError(f'torch cannot export this: {first_line(error)}') from error
    model = program.model_proto if dynamo else onnx.load_from_string(buffer.getvalue())
    config = {**network.pretrained_cfg, 'input_size': shape[1:], 'uint8': uint8}
    onnx.helper.set_model_props(model, {PREPROCESSING: json.dumps(config)})
    write(model, path)


def write(model: Any, path: str | os.PathLike) -> None:
    """Write an ONNX model, whole or not at all. Raises CannotWrite."""
    atomic_write(path, model.SerializeToString())


def session(path: str | os.PathLike, threads: int = 0) -> Any:
    """ONNX Runtime's session for a file, on the CPU. Raises UserError if the file is no model or ORT is missing."""
    runtime = optional('onnxruntime')
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    except Exception as error:  # its exceptions have no public base class
        raise UserError(f'{path} cannot be read as an ONNX model: {first_line(error)}') from error


def preprocessing(path: str | os.PathLike) -> dict[str, Any]:
    """What :func:`export` wrote into the file's metadata: timm's names, and ``uint8``. Raises UserError without it."""
    damaged = optional('google.protobuf.message').DecodeError  # protobuf comes with onnx
    try:
        model = optional('onnx').load(str(path))
    except (OSError, damaged) as error:
        raise UserError(f'{path} cannot be read as an ONNX model: {first_line(error)}') from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if PREPROCESSING not in metadata:
        raise UserError(f'{path} says nothing about its preprocessing: export it with train_scripts/onnx_export.py.')
    return json.loads(metadata[PREPROCESSING])


def check(network: InferenceNetwork, path: str | os.PathLike, batch_sizes: Sequence[int] = (1, 3)) -> float:
    """The largest relative error (norm of the difference over norm) of ONNX Runtime's output against PyTorch's.

    Random images in batches of ``batch_sizes``, or of the file's own size where it is fixed.
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
        (output,) = runner.run(None, {given.name: images})
        errors.append(float(np.linalg.norm(output - expected) / np.linalg.norm(expected)))
    return max(errors)


class AtcCommand:
    """The command that compiles an ONNX file for an Ascend card (CANN's ATC), without AIPP: normalisation is inside.

    Args:
        model: The ONNX file.
        soc_version: The card, as ``npu-smi info`` names it, with 'Ascend' before it.
        input_shape: Of the model's input, a name or None for what may vary.
        batch_sizes: Which batches to compile for, where the model takes any.
        folder: Where to write; None for the model's.
    """

    def __init__(
            self,
            model: Path,
            soc_version: str,
            input_shape: Sequence[Any],
            batch_sizes: Sequence[int] = (1, 2, 4, 8),
            folder: Path | None = None,
    ) -> None:
        shape = [each if isinstance(each, int) else -1 for each in input_shape]
        self.output = (folder or model.parent) / f'{model.stem}_{soc_version}.om'
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
        """Raises UserError if ATC is not there, or the .om file is there already and not to be overwritten."""
        if self.output.exists() and not force:
            raise UserError(f'{self.output} exists: --force overwrites it.')
        if shutil.which('atc') is None:
            raise UserError("--atc: there is no atc here. Install CANN's toolkit and source its set_env.sh first.")

    def run(self, force: bool = False) -> None:
        """Run it. Raises UserError if that can't be done (see :meth:`check`), or ATC fails."""
        self.check(force)
        done = subprocess.run(self.words, check=False)
        if done.returncode:
            raise UserError(f'atc failed with exit code {done.returncode}; its last lines above say why.')
        if not self.output.exists():
            raise UserError(f'atc ended well but has left no {self.output}.')

"""A process that runs one choice of settings for ``benchmark.py tune``.

It reads a JSON object, the job, from the first line of stdin, builds the workload, checks its first step against the
reference, and answers with a JSON line. For each further line, a number of steps, it runs these and answers with their
seconds. A process of its own lets a choice set variables of the environment, and fail in any way.
"""

import functools
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import timm
import torch
from torch import Tensor, nn

from .. import device as devices
from .. import weights
from ..deploy import to_inference
from ..precision import Precision, create_precision
from ..tuning import apply_settings
from .candidates import Workload
from .timing import times_in_turn
from .tune_check import block_errors, find_wrong, relative_error

__all__ = ['Job', 'main']

OURS, TIMM = 'inception_resnet_v2_npu', 'inception_resnet_v2'
SAMPLES = 64  # elements of each tensor that are compared
MOST_CHECKED = 16  # images in the step that is compared
BLOCKS = (2, 107)  # images, and pixels, from which each block is computed
CHECKED_LR, LR = 0.1, 1e-4  # an update that float32 resolves; one that leaves a network with random labels finite


# The step to time, figures of the first one, and errors of blocks.
_Checked = tuple[Callable[[], Any], dict[str, Tensor], dict[str, float]]


@dataclass(frozen=True)
class Job:
    """The work of a worker.

    Attributes:
        device: Name of the device.
        task: 'train' or 'eval'.
        batch_size: Images in a batch.
        img_size: Height and width of an image in pixels.
        half: Name of the 16-bit type, '' for float32.
        opt_level: 'O1' or 'O2' where ``half`` is set; '' for eval.
        settings: {setting: value} of those that are not the default.
        reference: File of the reference's figures.
        writes_reference: Write that file.
    """

    device: str
    task: str
    batch_size: int
    img_size: int
    half: str
    opt_level: str
    settings: Mapping[str, Any]
    reference: str
    writes_reference: bool = False

    @property
    def default_errors(self) -> str:
        """File of the errors of the default settings."""
        return f'{self.reference}.json'

    def to_json(self) -> str:
        """Return the job as a line."""
        return json.dumps(asdict(self))


def main() -> None:
    """Run the job that stdin names, and answer to the file descriptor that the command line names."""
    answers = os.fdopen(int(sys.argv[1]), 'w')
    job = Job(**json.loads(sys.stdin.readline()))
    device = devices.resolve_device(job.device)
    devices.configure(device)
    apply_settings(job.settings, device)
    step = prepare(job, device, functools.partial(_answer, answers))
    for line in sys.stdin:
        (seconds,) = times_in_turn({'': functools.partial(_repeat, step, int(line))}, device, 1, warmup=0)['']
        _answer(answers, seconds=seconds)


def _answer(answers: TextIO, **content: Any) -> None:
    print(json.dumps(content), file=answers, flush=True)


def _repeat(step: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        step()


def prepare(job: Job, device: torch.device, answer: Callable[..., None]) -> Callable[[], Any]:
    """Return the step to time, after comparing it with the reference."""
    checked = Workload(device, min(job.batch_size, MOST_CHECKED), job.img_size)
    timed = Workload(device, job.batch_size, job.img_size)
    if job.writes_reference:
        reference = _evaluate(timm_network(checked), checked) if job.task == 'eval' else _reference_step(checked)
        torch.save(reference, job.reference)
    step, figures, errors = (_evaluation if job.task == 'eval' else _training)(job, checked, timed)
    errors |= errors_of(figures, torch.load(job.reference, weights_only=True))
    if job.writes_reference:
        Path(job.default_errors).write_text(json.dumps(errors))
    default = json.loads(Path(job.default_errors).read_text())
    answer(error=statistics.median(errors.values()), wrong=find_wrong(errors, default, _dtype(job)))
    step()
    step()  # the first one with this batch size allocates, and may compile
    return step


def timm_network(workload: Workload) -> nn.Module:
    """Return timm's network in float32."""
    return workload.network(TIMM)


def errors_of(figures: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the relative error of the network's output and, in training, the median of those of the update."""
    errors = {name: relative_error(figures[name], expected) for name, expected in reference.items()}
    output = {'the output of the network': errors.pop('outputs')}
    return output | ({'the update of the weights': statistics.median(errors.values())} if errors else {})


def _dtype(job: Job) -> torch.dtype:
    return getattr(torch, job.half or 'float32')


def _sampled(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[::max(1, flat.numel() // SAMPLES)][:SAMPLES].double().cpu()


# ---- training --------------------------------------------------------------------------------------------------------


def _optimizer(model: nn.Module, fused: bool | None = None) -> torch.optim.Optimizer:
    given: dict[str, Any] = {} if fused is None else {'fused': fused}
    return timm.optim.create_optimizer_v2(model, 'sgd', lr=CHECKED_LR, momentum=0.9, weight_decay=1e-4, **given)


def _reference_step(workload: Workload) -> dict[str, Tensor]:
    model = timm_network(workload)
    before = _state(model.state_dict())
    loss, outputs = _loss(model, *workload.batch())
    optimizer = _optimizer(model)
    loss.backward()
    optimizer.step()
    return {'outputs': _sampled(outputs), **_changes(before, _state(model.state_dict()))}


def _loss(model: Any, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    outputs = model(images)
    return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1), outputs


def _state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return samples of weights and statistics by timm's names."""
    translated = weights.convert(dict(state), to='timm')
    return {name: _sampled(value) for name, value in translated.items() if value.is_floating_point()}


def _changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value - before[name] for name, value in after.items()}


def _training(job: Job, checked: Workload, timed: Workload) -> _Checked:
    """Return the step, the outputs and changes of the weights in the first one, and the errors of the blocks."""
    half = getattr(torch, job.half) if job.half else None
    scale = 128.0 if half == torch.float16 else None
    precision = create_precision(
        timed.device, amp=half is not None, amp_dtype=half, opt_level=job.opt_level or None, loss_scale=scale)
    model: Any = timed.network(OURS)
    model.load_state_dict(timm_network(checked).state_dict())
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    model.set_grad_checkpointing(job.settings.get('recompute', False))
    model, optimizer = precision.prepare(model, _optimizer(model, job.settings.get('fused_optimizer')))
    network = torch.compile(model, backend=job.settings['torchcompile']) if 'torchcompile' in job.settings else model

    def step(images: Tensor, targets: Tensor) -> Tensor:
        with precision.autocast():
            loss, outputs = _loss(network, images, targets)
        optimizer.zero_grad()
        precision.step(loss, optimizer)
        return outputs

    errors = _block_errors(job, model, precision, timed.device)
    precision.load_model_state_dict(model, initial)
    before = _state(precision.model_state_dict(model))
    outputs = step(*_cast(checked, precision.input_dtype))
    changes = _changes(before, _state(precision.model_state_dict(model)))
    for group in optimizer.param_groups:
        group['lr'] = LR
    figures = {'outputs': _sampled(outputs), **changes}
    return functools.partial(step, *_cast(timed, precision.input_dtype)), figures, errors


def _block_errors(job: Job, model: Any, precision: Precision, device: torch.device) -> dict[str, float]:
    small = Workload(torch.device('cpu'), *BLOCKS)
    reference = timm_network(small)  # with the weights of `model`, which are the same in every call
    return block_errors(model, reference, small.batch()[0], device, precision.input_dtype, precision.autocast)


def _cast(workload: Workload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    images, targets = workload.batch()
    return images.to(dtype), targets


# ---- evaluation ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _evaluate(model: nn.Module, workload: Workload) -> dict[str, Tensor]:
    return {'outputs': _sampled(model.eval()(workload.batch()[0]))}


@torch.inference_mode()
def _evaluation(job: Job, checked: Workload, timed: Workload) -> _Checked:
    """Return the step, the outputs of the first one, and no errors of blocks."""
    dtype = getattr(torch, job.half or 'float32')
    network = timed.network(OURS)
    network.load_state_dict(timm_network(checked).state_dict())
    model: Any = network.eval()
    engine = job.settings.get('engine')
    if engine:
        model = to_inference(model, None if engine == 'om' else timed.device, dtype, engine=engine)
    else:
        model = model.to(dtype)
    if 'torchcompile' in job.settings:
        model = torch.compile(model, backend=job.settings['torchcompile'])
    kind = dtype if engine in (None, 'torch') else torch.float32
    outputs = model(_cast(checked, kind)[0])
    images = _cast(timed, kind)[0]
    return torch.inference_mode()(functools.partial(model, images)), {'outputs': _sampled(outputs.float())}, {}


if __name__ == '__main__':
    main()

"""``benchmark.py ops``: each operator against the plain operations it stands for, forward and backward, in turn."""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import device as devices
from ..ops import activation, batch_norm_relu, normalize, residual
from . import report
from .timing import Work, ratio, times_in_turn
from .tuned import train_precision, tuned_settings

__all__ = ['run']

# The largest tensors of the three residual stages at 299 px, per image.
_SHAPES = ((320, 35, 35), (1088, 17, 17), (2080, 8, 8))
_SCALE = 0.17


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and return all figures.

    The kernels and the layout are those of --tuned, unless TIMM_NPU_IRV2_KERNELS names the kernels.
    """
    device = devices.resolve_device(args.device)
    devices.configure(device)
    tuned_settings(args.tuned, device, task='train', batch_size=args.batch_size, img_size=args.img_size,
                   precision=train_precision(device, args.amp))
    dtype = devices.half_dtype(device) if args.amp else torch.float32
    rows: dict[str, list[float]] = {}
    for shape in _SHAPES:
        for name, (ours, plain) in _pairs(device, dtype, (args.batch_size, *shape)).items():
            rows[f'{name} {"×".join(map(str, shape))}'] = _compare(ours, plain, device, args.rounds)
    for name, (ours, plain) in _images(device, dtype, args).items():
        rows[name] = _compare(ours, plain, device, args.rounds)
    columns = ('operator ms', 'plain ms', 'ratio', 'least', 'greatest')
    title = f'Operators, {str(dtype).removeprefix("torch.")}, batch {args.batch_size}, {device.type}: time / plain time'
    report.print_table(title, columns, rows)
    return {'title': title, 'columns': columns, 'rows': rows, 'device': devices.describe(device),
            'versions': devices.versions()}


def _pairs(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, tuple[Work, Work]]:
    """Return {operator: (with it, with plain operations)}, each a forward and a backward pass."""
    layout = devices.memory_format(device)
    x, branch, grad = (torch.randn(shape).to(device, dtype, memory_format=layout) for _ in range(3))
    x.requires_grad_()
    branch.requires_grad_()
    weight, bias = (torch.ones(shape[1], device=device, requires_grad=True) for _ in range(2))
    statistics_of = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)

    # Merged siblings leave a slice of channels.
    channel_slice = torch.cat([x.detach()] * 2, 1).requires_grad_()[:, :shape[1]]

    def pass_through(function: Callable[[], Tensor], x: Tensor = x) -> Work:
        return lambda: torch.autograd.grad(function(), [x], grad, allow_unused=True)

    def norm(x: Tensor) -> Tensor:
        return torch.nn.functional.batch_norm(x, *statistics_of, weight, bias, True, 0.1, 1e-3)

    def fused(x: Tensor) -> Tensor:
        return batch_norm_relu(x, weight, bias, *statistics_of, True, 0.1, 1e-3, _SCALE)

    return {
        'scaled_residual_relu': (
            pass_through(lambda: residual.scaled_residual_relu(x, branch, 1.0)),
            pass_through(lambda: torch.relu(x + branch)),
        ),
        'scaled_relu': (
            pass_through(lambda: activation.scaled_relu(x, _SCALE)),
            pass_through(lambda: activation.scaled_relu_reference(x, _SCALE)),
        ),
        'batch_norm_relu': (
            pass_through(lambda: fused(x)),
            pass_through(lambda: torch.relu(norm(x)) * _SCALE),
        ),
        'batch_norm_relu of a slice': (
            pass_through(lambda: fused(channel_slice), channel_slice),
            pass_through(lambda: torch.relu(norm(channel_slice)) * _SCALE, channel_slice),
        ),
    }


def _images(device: torch.device, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, tuple[Work, Work]]:
    images = torch.randint(256, (args.batch_size, 3, args.img_size, args.img_size), dtype=torch.uint8, device=device)
    mean = torch.full((3,), 0.5, device=device)
    settings = (images, mean, mean, dtype, devices.memory_format(device))
    return {'normalize_images': (
        lambda: normalize.normalize_images(*settings),
        lambda: ((images.float() / 255 - mean.view(1, 3, 1, 1)) / mean.view(1, 3, 1, 1)).to(
            dtype, memory_format=settings[-1]),
    )}


def _compare(ours: Work, plain: Work, device: torch.device, rounds: int) -> list[float]:
    """Return the medians of both in ms, and median, least and greatest of the rounds' ratios."""
    times = times_in_turn({'ours': ours, 'plain': plain}, device, rounds, warmup=3)
    return [*(statistics.median(own) * 1e3 for own in times.values()), *ratio(times['ours'], times['plain'])]

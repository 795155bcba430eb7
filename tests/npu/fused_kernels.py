"""Prints the megabytes of a training step, an image and besides, where BatchNorm with ReLU is one kernel in either
direction, with 1×1 convolutions in either form. The kernels here only say what those of ``ops/_triton.py`` would read
and write, each input and output once: run it without operators."""

import json
import sys
import types
from importlib.machinery import ModuleSpec

import standin_journal
import torch
from torch import Tensor

from timm_npu_irv2.benchmarks.candidates import Workload, candidates
from timm_npu_irv2.benchmarks.counting import cost_of
from timm_npu_irv2.ops import use_variants

touched = []


def returns(*inputs: Tensor, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    touched.extend(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
    return outputs


def batch_norm_relu(x, weight, bias, running_mean, running_var, momentum, eps, scale):
    outputs = tuple(map(torch.empty_like, (x, weight, weight)))
    return returns(x, weight, bias, *[running_mean, running_var] * 2, outputs=outputs)  # read and written


def batch_norm_relu_backward(grad, x, weight, bias, mean, variance, eps, scale):
    outputs = tuple(map(torch.empty_like, (x, weight, weight)))
    return returns(grad, x, weight, bias, mean, variance, outputs=outputs)


def scaled_residual_relu(x, branch, scale):
    return returns(x, branch, outputs=(torch.empty_like(x),))[0]


def megabytes(batch_size: int, form: str) -> tuple[float, float]:
    """Of all operators, and of the kernels of a 910B."""
    with use_variants(pointwise=form):
        step = candidates(amp=True)['ours'].create(Workload(torch.device('npu'), batch_size, 299))
        for _ in range(2):  # the first ones allocate states
            step()
        touched.clear()
        cost = cost_of(step, standin_journal.recording)
    return (cost.bytes + sum(touched)) / 1e6, (cost.chip_bytes + sum(touched)) / 1e6


if __name__ == '__main__':
    kernels = types.ModuleType('timm_npu_irv2.ops._triton')
    for function in (batch_norm_relu, batch_norm_relu_backward, scaled_residual_relu):
        setattr(kernels, function.__name__, function)
    triton = types.ModuleType('triton')
    triton.__spec__ = ModuleSpec('triton', None)
    sys.modules |= {'triton': triton, kernels.__name__: kernels}
    found = {}
    for form in 'convolution', 'product':
        small, large = megabytes(2, form), megabytes(8, form)
        found[form] = {name: {'image': (b - a) / 6, 'step': a - (b - a) / 3}
                       for name, a, b in zip(('handed over', 'chip'), small, large, strict=True)}
    print(json.dumps(found))

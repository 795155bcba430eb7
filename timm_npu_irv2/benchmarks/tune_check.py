"""Correctness of a choice of settings: its errors against timm's network in float32, beside those of the default.

Through the whole network rounding to 16 bits grows until gradients differ by half of their size, which would hide a
wrong kernel. So each block is also computed by itself, from the inputs and for the gradients that timm's network has
there. :func:`block_errors` returns what differs; a wrong kernel makes some of it several times as large as by default.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import device as devices
from .. import weights

__all__ = ['block_errors', 'find_wrong', 'relative_error']

# An error may be so many times that of the default, or this much where that is less: a ReLU passes or stops a gradient
# by a number that is rounded, so gradients have larger errors than outputs.
FACTOR = 2.0
LEAST = {torch.float32: (2e-4, 1e-3), torch.float16: (4e-3, 2e-2), torch.bfloat16: (2e-2, 1e-1)}

Piece = Callable[[Tensor], Tensor]
INPUT = ''  # the name of a block's input among its gradients


def find_wrong(errors: Mapping[str, float], default: Mapping[str, float], dtype: torch.dtype) -> str:
    """Return what is wrong with a choice of settings, '' for nothing.

    Args:
        errors: {quantity: relative error} of the choice.
        default: Those of the default settings.
        dtype: Dtype of the convolutions.
    """
    # The gradient of a bias before a norm is zero but for rounding: it tells nothing.
    allowed = {name: max(FACTOR * default[name], LEAST[dtype]['output' not in name]) if default[name] < 1 else math.inf
               for name in errors}
    worst = max(errors, key=lambda name: errors[name] / allowed[name])
    if errors[worst] <= allowed[worst]:
        return ''
    return f'an error of {errors[worst]:.2g} in {worst}, where {allowed[worst]:.2g} is allowed'


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual − expected| / |expected|; infinite where a number is not finite."""
    actual, expected = (each.detach().double().cpu().flatten() for each in (actual, expected))
    error = (actual - expected).norm() / expected.norm().clamp_min(1e-30)
    return error.nan_to_num(float('inf'), float('inf')).item()


def block_errors(
        model: Any,
        reference: nn.Module,
        images: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        autocast: Callable[[], Any],
) -> dict[str, float]:
    """Return the relative errors of each block's output and of its gradients.

    Args:
        model: This package's network in training mode on ``device``, as the precision has prepared it.
        reference: timm's with the same weights, on the CPU in float32. Its statistics move.
        images: Images (N, 3, H, W) on the CPU.
        device: Device of ``model``.
        dtype: Dtype of the images that ``model`` takes.
        autocast: Context of its forward pass.
    """
    errors: dict[str, float] = {}
    gradients, wanted = dict[str, Tensor](), dict[str, Tensor]()  # of the parameters
    pieces = dict(_pieces(model))
    for name, x, output, gradient, expected in _chain(reference, images):
        own = x.detach().to(device, dtype, memory_format=devices.memory_format(device)).requires_grad_()
        with autocast():
            found = pieces[name](own)
        parameters = _parameters(model, name)
        grads = torch.autograd.grad(found, [own, *parameters.values()], gradient.to(device, found.dtype))
        errors[f'the output of {name}'] = relative_error(found, output)
        errors[f'the gradient of the input of {name}'] = relative_error(grads[0], expected.pop(INPUT))
        gradients.update(zip(parameters, grads[1:], strict=True))
        wanted |= expected
    others = {name: torch.zeros(()).expand(value.shape) for name, value in model.state_dict().items()}
    by_timms_names = weights.convert(others | gradients, to='timm')  # siblings are merged here
    return errors | {f'the gradient of {name}': relative_error(by_timms_names[name], value)
                     for name, value in wanted.items()}


def _chain(
        reference: nn.Module,
        images: Tensor,
) -> Iterator[tuple[str, Tensor, Tensor, Tensor, dict[str, Tensor]]]:
    """Yield (name, input, output, gradient of the output, gradients) of each block of timm's network, from the end."""
    steps, x = [], images
    for name, piece in _pieces(reference):
        x = x.detach().requires_grad_()
        output = piece(x)
        steps.append((name, x, output))
        x = output
    targets = torch.arange(len(images)) * 100 % x.shape[1]
    gradient = torch.autograd.grad(nn.functional.cross_entropy(x, targets), x)[0]
    for name, x, output in reversed(steps):
        gradient = gradient / gradient.abs().max().clamp_min(1e-30)  # float16 has no numbers for those of a mean loss
        parameters = _parameters(reference, name)
        grads = torch.autograd.grad(output, [x, *parameters.values()], gradient)
        yield name, x, output, gradient, dict(zip((INPUT, *parameters), grads, strict=True))
        gradient = grads[0]


STEM = ('conv2d_1a', 'conv2d_2a', 'conv2d_2b', 'maxpool_3a', 'conv2d_3b', 'conv2d_4a', 'maxpool_5a', 'mixed_5b')


def _pieces(model: Any) -> Iterator[tuple[str, Piece]]:
    """Yield the name of each block, which is that of its module, and the function that computes it."""
    # This network computes a block otherwise in a sequence than alone.
    yield 'stem', model._stem if hasattr(model, '_stem') else nn.Sequential(*map(model.get_submodule, STEM))
    for sequence, following in ('repeat', 'mixed_6a'), ('repeat_1', 'mixed_7a'), ('repeat_2', 'block8'):
        blocks = model.get_submodule(sequence)
        for index, block in enumerate(blocks):
            yield f'{sequence}.{index}', type(blocks)(block)
        yield following, model.get_submodule(following)
    yield 'conv2d_7b', model.conv2d_7b
    yield 'head', model.forward_head


def _parameters(model: nn.Module, piece: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a block by their names in the network."""
    modules = {'stem': STEM, 'head': ('classif',)}.get(piece, (piece,))
    return {name: value for name, value in model.named_parameters()
            if any(name.startswith(f'{module}.') for module in modules)}

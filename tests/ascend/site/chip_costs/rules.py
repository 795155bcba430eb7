"""The kernels of each kind of call, as CANN's sources have them; ``TABLE`` names the files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from .tensors import FLOATS, SIZES, Argument, Chip, Kernel, Tensor, flat

Rule: TypeAlias = Callable[[Chip, Sequence[Argument]], Iterator[Kernel]]


def _contiguous(tensors: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield the copies of strided inputs: l0op::Contiguous."""
    for tensor in flat(tensors):
        if tensor.role in 'rb' and not tensor.is_contiguous:
            yield Kernel('Contiguous', tensor.stored_bytes, tensor.bytes)


def _view_copy(tensors: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield the copies to strided outputs: l0op::ViewCopy."""
    for tensor in flat(tensors):
        if tensor.role in 'wb' and not tensor.is_contiguous:
            yield Kernel('ViewCopy', tensor.bytes, tensor.bytes)


def one(name: str) -> Rule:
    """Return the rule of a single kernel between copies of strided inputs and to strided outputs."""
    def rule(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
        every = flat(arguments)
        yield from _contiguous(every)
        yield _kernel(name, every)
        yield from _view_copy(every)
    return rule


def _kernel(name: str, tensors: Sequence[Tensor]) -> Kernel:
    read, written = (sum(t.bytes for t in tensors if t.role in roles) for roles in ('rb', 'wb'))
    return Kernel(name, read, written)


def elementwise(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield Contiguous, the casts of mixed floating types to the widest, the kernel, and a cast of the output."""
    every = flat(arguments)
    yield from _contiguous(every)
    inputs, outputs = [t for t in every if t.role in 'rb'], [t for t in every if t.role in 'wb']
    floats = [t.dtype for t in inputs if t.dtype in FLOATS and t.sizes]
    widest = max(floats, key=lambda dtype: SIZES[dtype], default=None)
    read = 0
    for tensor in inputs:
        wide = tensor.bytes
        if widest and tensor.dtype in FLOATS and SIZES[tensor.dtype] < SIZES[widest]:
            wide = tensor.bytes * SIZES[widest] // SIZES[tensor.dtype]
            yield Kernel('Cast', tensor.bytes, wide)
        read += wide
    written = sum(t.bytes for t in outputs)
    narrow = [t for t in outputs if widest and t.dtype in FLOATS and SIZES[t.dtype] < SIZES[widest]]
    extra = sum(t.bytes * (SIZES[widest] // SIZES[t.dtype] - 1) for t in narrow) if widest else 0
    yield Kernel('Elementwise', read, written + extra)
    if narrow:
        yield Kernel('Cast', sum(t.bytes for t in narrow) + extra, sum(t.bytes for t in narrow))
    yield from _view_copy(every)


def mixed(name: str) -> Rule:
    """Return the rule of Add and Mul, whose kernel takes a 16-bit tensor beside a float32 one as it is.

    The log does not tell the factor of an addition. One other than 1 would add casts beside mixed types, and a product
    in bfloat16; this network has it in float16 and float32 only where a variant asks for it.
    """
    def rule(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
        every = flat(arguments)
        if not chip.adds_strided:
            yield from _contiguous(every)
        read, written = _kernel(name, every)[1:]
        output = next(t for t in every if t.role in 'wb')
        is_cast = SIZES.get(output.dtype, 4) == 2 and any(t.dtype == 'Float' for t in every)
        yield Kernel(name, read, written * (2 if is_cast else 1))
        if is_cast:
            yield Kernel('Cast', written * 2, written)
        yield from _view_copy(every)
    return rule


def add_relu(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield Cast, Cast, Add or Axpy, Relu, Cast: floating types are promoted to float32."""
    yield from _contiguous(arguments)
    inputs = [t for t in flat(arguments) if t.role in 'rb']
    output = next(t for t in flat(arguments) if t.role in 'wb')
    wide = math.prod(output.sizes) * 4
    for tensor in inputs:
        if tensor.dtype != 'Float':
            yield Kernel('Cast', tensor.bytes, wide)
    yield Kernel('Add', 2 * wide, wide)
    yield Kernel('Relu', wide, wide)
    if output.dtype != 'Float':
        yield Kernel('Cast', wide, output.bytes)
    yield from _view_copy(arguments)


def convolution(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield the conversions to NC1HWC0 and FRACTAL_Z, the convolution, and the conversion back.

    C0=4, for few channels in 16 bits, is a matter of the weight: the input has 16 channels in memory.
    """
    x, weight, bias, out = arguments[:4]
    assert isinstance(x, Tensor) and isinstance(weight, Tensor) and isinstance(out, Tensor)
    yield from _contiguous((x, weight))
    small = bias.bytes if isinstance(bias, Tensor) else 0
    if chip.convolves_nchw:
        yield Kernel('Conv2D', x.bytes + weight.bytes + small, out.bytes)
    else:
        yield from _to_private(chip, x)
        yield Kernel('TransData', weight.bytes, weight.as_fractal_z)
        yield Kernel('Conv2D', x.as_nc1hwc0 + weight.as_fractal_z + small, out.as_nc1hwc0)
        yield from _from_private(chip, out)
    yield from _view_copy((out,))


def _to_private(chip: Chip, x: Tensor) -> Iterator[Kernel]:
    if not chip.keeps_private:
        yield Kernel('TransData', x.bytes, x.as_nc1hwc0)


def _from_private(chip: Chip, x: Tensor) -> Iterator[Kernel]:
    if not chip.keeps_private:
        yield Kernel('TransData', x.as_nc1hwc0, x.bytes)


def convolution_backward(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield the conversions of all three inputs, and the kernels of each gradient that is wanted.

    The gradient of the weight is float32 first.
    """
    grad, x, weight, grad_input, grad_weight, grad_bias = arguments[:6]
    assert isinstance(grad, Tensor) and isinstance(x, Tensor) and isinstance(weight, Tensor)
    yield from _contiguous((grad, x, weight))
    if isinstance(grad_bias, Tensor):
        yield Kernel('ReduceSum', grad.bytes, grad_bias.bytes)
    g, source, w = (grad.bytes, x.bytes, weight.bytes) if chip.convolves_nchw else (
        grad.as_nc1hwc0, x.as_nc1hwc0, weight.as_fractal_z)
    if not chip.convolves_nchw:
        yield from _to_private(chip, grad)
        yield from _to_private(chip, x)
        yield Kernel('TransData', weight.bytes, w)
    if isinstance(grad_input, Tensor):
        yield Kernel('Conv2DBackpropInput', g + w, source)
        if not chip.convolves_nchw:
            yield from _from_private(chip, grad_input)
    if isinstance(grad_weight, Tensor):
        float32, padded = (size * 4 // SIZES[weight.dtype] for size in (weight.bytes, w))
        yield Kernel('Conv2DBackpropFilter', g + source, padded)
        if not chip.convolves_nchw:
            yield Kernel('TransData', padded, float32)
        if grad_weight.dtype != 'Float':
            yield Kernel('Cast', float32, grad_weight.bytes)
    yield from _view_copy((grad_input, grad_weight, grad_bias))


def batch_norm(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield BatchNormV3 where the chip has it for so many channels, else BNTrainingReduce and BNTrainingUpdate."""
    x = arguments[0]
    out = next(t for t in flat(arguments) if t.role == 'w')
    assert isinstance(x, Tensor)
    yield from _contiguous((x,))
    if chip.batch_norm_from is not None and x.sizes[1] >= chip.batch_norm_from:
        yield Kernel('BatchNormV3', x.bytes, out.bytes)
    else:
        yield Kernel('BNTrainingReduce', x.bytes, 0)
        yield Kernel('BNTrainingUpdate', x.bytes, out.bytes)
    yield from _view_copy((out,))


def batch_norm_backward(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield two kernels that both read the gradient and the input, or one."""
    grad, x = arguments[:2]
    assert isinstance(grad, Tensor) and isinstance(x, Tensor)
    yield from _contiguous((grad, x))
    if chip.batch_norm_backward:
        yield Kernel('BatchNormGradV3', grad.bytes + x.bytes, x.bytes)
    else:
        yield Kernel('BNTrainingUpdateGrad', grad.bytes + x.bytes, 0)
        yield Kernel('BNTrainingReduceGrad', grad.bytes + x.bytes, x.bytes)


def copy(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield Contiguous, Cast and BroadcastTo of the source where they are needed, and ViewCopy to a strided target.

    ViewCopy is also the copy where nothing else is needed.
    """
    every = flat(arguments)
    source = next((t for t in every if t.role == 'r'), None)
    target = next(t for t in every if t.role in 'wb')
    if source is None:
        yield Kernel('ViewCopy', 0, target.bytes)
        return
    size, steps = source.stored_bytes, 0
    if not source.is_contiguous:
        yield Kernel('Contiguous', size, size := source.bytes)
        steps += 1
    if source.dtype != target.dtype:
        yield Kernel('Cast', size, size := math.prod(source.sizes) * SIZES.get(target.dtype, 4))
        steps += 1
    if source.sizes != target.sizes and size != target.bytes:
        yield Kernel('BroadcastTo', size, target.bytes)
        steps += 1
    if not steps or not target.is_contiguous:
        yield Kernel('ViewCopy', target.bytes, target.bytes)


def copies(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield one kernel for the copies of a list of tensors."""
    yield _kernel('ForeachCopy', flat(arguments))


def concatenation(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield the copies of strided inputs, concatenations in stages, and a cast of the result."""
    pieces, out = flat(arguments)[:-1], flat(arguments)[-1]
    if not (chip.adds_strided and len(pieces) <= 32 and len(out.sizes) > 1):
        yield from _contiguous(pieces)
    sizes, most = [each.bytes for each in pieces], chip.most_concatenated
    if len(out.sizes) == 1 and all(size % 32 == 0 for size in sizes):
        most = max(most, chip.most_aligned)
    while len(sizes) > 1:
        stage = [sizes[i:i + most] for i in range(0, len(sizes), most)]
        sizes = [sum(each) for each in stage]
        yield from (Kernel('Concat', sum(each), sum(each)) for each in stage if len(each) > 1)
    if pieces and pieces[0].dtype != out.dtype:
        yield Kernel('Cast', sizes[0], out.bytes)
    yield from _view_copy((out,))


def max_pool(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield MaxPool3DWithArgmaxV2, which writes int32 indices into the memory of the mask, or the kernels of the mask.

    With a mask the kernel takes NC1HWC0 in 16 bits.
    """
    x, out, mask = flat(arguments)[:3]
    yield from _contiguous((x,))
    if chip.pools_with_indices:
        yield Kernel('MaxPool3DWithArgmaxV2', x.bytes, out.bytes + math.prod(out.sizes) * 4)
    else:
        yield from _converted(chip, (x,), 'MaxPoolWithArgmaxV1', (out,), extra_written=mask.bytes)
    yield from _view_copy((out,))


def max_pool_backward(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield MaxPool3DGradWithArgmax, which reads int32 indices, or the kernels of the mask."""
    grad, x, mask, out = flat(arguments)[:4]
    yield from _contiguous((grad, x))
    if chip.pools_with_indices:
        yield Kernel('MaxPool3DGradWithArgmax', grad.bytes + x.bytes + math.prod(grad.sizes) * 4, out.bytes)
    else:
        yield from _converted(chip, (grad, x), 'MaxPoolGradWithArgmaxV1', (out,), extra_read=mask.bytes)
    yield from _view_copy((out,))


def _converted(
        chip: Chip,
        inputs: Sequence[Tensor],
        name: str,
        outputs: Sequence[Tensor],
        extra_read: int = 0,
        extra_written: int = 0,
) -> Iterator[Kernel]:
    """Yield a kernel on 16-bit NC1HWC0 tensors between the casts and conversions of its inputs and outputs."""
    every = [Tensor(each.role, 'Half', each.sizes, each.strides) for each in (*inputs, *outputs)]
    narrow = list(zip((*inputs, *outputs), every, strict=True))
    sources, results = narrow[:len(inputs)], narrow[len(inputs):]
    for tensor, half in sources:
        if SIZES[tensor.dtype] > 2:
            yield Kernel('Cast', tensor.bytes, half.bytes)
        yield from _to_private(chip, half)
    yield Kernel(name, sum(half.as_nc1hwc0 for _, half in sources) + extra_read,
                 sum(half.as_nc1hwc0 for _, half in results) + extra_written)
    for tensor, half in results:
        yield from _from_private(chip, half)
        if SIZES[tensor.dtype] > 2:
            yield Kernel('Cast', half.bytes, tensor.bytes)


def average_pool(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield Pooling and AvgPoolUpdate in NC1HWC0 (float32 for bfloat16), or one kernel.

    This is for pooling that leaves out the padding, as here.
    """
    x, out = flat(arguments)[:2]
    yield from _contiguous((x,))
    if chip.pools_by_convolution:
        wide, result = (_widened(tensor) for tensor in (x, out))
        if wide is not x:
            yield Kernel('Cast', x.bytes, wide.bytes)
        yield from _to_private(chip, wide)
        yield Kernel('Pooling', wide.as_nc1hwc0, result.as_nc1hwc0)
        yield Kernel('AvgPoolUpdate', wide.as_nc1hwc0 + result.as_nc1hwc0, result.as_nc1hwc0)
        yield from _from_private(chip, result)
        if result is not out:
            yield Kernel('Cast', result.bytes, out.bytes)
    else:
        yield Kernel('AvgPoolV2', x.bytes, out.bytes)
    yield from _view_copy((out,))


def _widened(tensor: Tensor) -> Tensor:
    if tensor.dtype != 'BFloat16':
        return tensor
    return Tensor(tensor.role, 'Float', tensor.sizes, tensor.strides)


def average_pool_backward(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield AvgPool3DGrad between two transpositions, or one kernel. Of the input only the shape is read."""
    grad, x, out = flat(arguments)[:3]
    yield from _contiguous((grad, x))
    if chip.pools_by_convolution:
        yield Kernel('Transpose', grad.bytes, grad.bytes)
        yield Kernel('AvgPool3DGrad', grad.bytes, out.bytes)
        yield Kernel('Transpose', out.bytes, out.bytes)
    else:
        yield Kernel('AvgPoolV2Grad', grad.bytes, out.bytes)
    yield from _view_copy((out,))


def product(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield one product; a transposed operand is read as it is, others that are strided are copied first."""
    every = flat(arguments)
    yield from _contiguous([tensor for tensor in every if not tensor.is_transposed])
    yield _kernel('MatMul', every)


def matmul(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield what :func:`product` does, after the copy of a transposed matrix on the left of a batch of matrices."""
    left, right = flat(arguments)[:2]
    if len(left.sizes) == 2 and len(right.sizes) > 2 and left.is_transposed:
        yield from _contiguous((left,))
    yield from product(chip, arguments)


def sum_of_products(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield the products, their sum, and its multiplication by alpha, also by 1. With beta = 0, as here, no more."""
    _, left, right, out = flat(arguments)[:4]
    batch = (left.sizes[0], *out.sizes)
    found = list(product(chip, (left, right, Tensor('w', out.dtype, batch, (0,) * len(batch)))))
    yield from found
    yield Kernel('ReduceSum', found[-1].bytes_written, out.bytes)
    yield Kernel('Muls', out.bytes, out.bytes)

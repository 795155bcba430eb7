"""The kernels that a call of the operator log becomes on a chip, and the bytes that they read and write.

CANN's public sources say how each aclnn function is split into kernels. ``TABLE`` has a row for each function that the
network uses, with the file it was read from (hicann/ops-nn and hicann/ops-math, 9.1.0); a row that was not read there
is marked as inferred. A kernel reads each input once and writes each output once: no cache, and no second pass over
inputs that do not fit into the chip's buffers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

SIZES = {'Half': 2, 'BFloat16': 2, 'Float': 4, 'Double': 8, 'Byte': 1, 'Char': 1, 'Bool': 1, 'Short': 2, 'Int': 4,
         'Long': 8}
FLOATS = ('Half', 'BFloat16', 'Float', 'Double')


class Kernel(NamedTuple):
    """A kernel on the chip."""

    name: str
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class Tensor:
    """A tensor of a call: role 'r', 'w' or 'b' (both), dtype as ATen spells it, sizes and strides in elements."""

    role: str
    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.sizes) * SIZES.get(self.dtype, 4)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the elements in memory: those repeated by a stride of 0 count once."""
        sizes = (size for size, stride in zip(self.sizes, self.strides, strict=True) if stride != 0)
        return math.prod(sizes) * SIZES.get(self.dtype, 4)

    @property
    def is_contiguous(self) -> bool:
        """True for a dense tensor in the order of its dimensions."""
        expected = 1
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def with_channels_padded(self, to: int = 16) -> int:
        """Return the bytes of an activation (N, C, H, W) as NC1HWC0."""
        n, c, *rest = self.sizes
        return n * _round_up(c, to) * math.prod(rest) * SIZES[self.dtype]

    def as_fractal_z(self, size: int | None = None) -> int:
        """Return the bytes of a convolution's weight (O, I, H, W) as FRACTAL_Z."""
        o, i, *rest = self.sizes
        return _round_up(o, 16) * _round_up(i, 16) * math.prod(rest) * (size or SIZES[self.dtype])


@dataclass(frozen=True)
class Chip:
    """The differences between chips that change the kernels of a call.

    Attributes:
        convolves_nchw: Convolutions take NCHW tensors as they are.
        keeps_private: Convolutions leave their output in NC1HWC0, and later ones take it so (internal format).
        batch_norm_v3: BatchNorm of at least 64 channels is one kernel.
        strided: Elementwise kernels and Cat read strided inputs.
        pools_with_indices: Max pooling takes NCHW and keeps an int32 index for each output instead of a bit mask.
        most_concatenated: Largest number of tensors that one kernel of Cat takes; more are concatenated in stages.
    """

    convolves_nchw: bool = False
    keeps_private: bool = False
    batch_norm_v3: bool = False
    strided: bool = False
    pools_with_indices: bool = True
    most_concatenated: int = 32


CHIPS = {
    # allow_internal_format is on there: torch_npu's npu_sys_ctrl.cpp
    '910a': Chip(keeps_private=True, pools_with_indices=False),
    '910b': Chip(batch_norm_v3=True),
    '950': Chip(convolves_nchw=True, strided=True, most_concatenated=2048),
}


def kernels_of(operator: str, tensors: str, chip: str) -> list[Kernel]:
    """Return the kernels that one call becomes.

    Args:
        operator: Name of the aclnn function.
        tensors: Tensors of the call, as the operator log describes them.
        chip: A key of ``CHIPS``.
    """
    arguments = _parse(tensors)
    return list(TABLE.get(operator, DEFAULT).rule(CHIPS[chip], arguments))


def kernels_of_calls(calls: Iterable[tuple[str, str]], chip: str, lazy_fusion: bool = False) -> list[Kernel]:
    """Return the kernels of several calls in a row.

    Args:
        calls: (aclnn function, tensors) of each call.
        chip: A key of ``CHIPS``.
        lazy_fusion: Fusion of additions, products and ReLUs that follow one another, as by TORCH_NPU_LAZY_FUSION on
            910b. Inferred: a call joins the kernel of the call before it if it reads that call's output.
    """
    kernels: list[Kernel] = []
    run: list[list[Tensor]] = []
    for name, tensors in calls:
        every = _flat(_parse(tensors)) if lazy_fusion and name in FUSIBLE else []
        if run and not (every and _reads(every, run[-1])):
            kernels.append(_fuse(run))
            run = []
        if every and all(tensor.is_contiguous for tensor in every):
            run.append(every)
        else:
            kernels += kernels_of(name, tensors, chip)
    return [*kernels, _fuse(run)] if run else kernels


FUSIBLE = frozenset(f'aclnn{name}' for name in ('Add', 'InplaceAdd', 'Mul', 'InplaceMul', 'Muls', 'InplaceMuls', 'Relu',
                                                'InplaceRelu'))


def _reads(tensors: list[Tensor], before: list[Tensor]) -> bool:
    """Return True if an input of a call has the dtype and the number of elements of the output before it."""
    output = next(t for t in before if t.role in 'wb')
    kinds = [(t.dtype, math.prod(t.sizes)) for t in tensors if t.role in 'rb']
    return (output.dtype, math.prod(output.sizes)) in kinds and all(tensor.is_contiguous for tensor in tensors)


def _fuse(run: list[list[Tensor]]) -> Kernel:
    """Return the one kernel of a run of calls: all inputs that it does not make itself, and the last output."""
    read = sum(t.bytes for tensors in run for t in tensors if t.role in 'rb')
    made = sum(next(t for t in tensors if t.role in 'wb').bytes for tensors in run[:-1])
    written = next(t for t in run[-1] if t.role in 'wb').bytes
    return Kernel('LazyFusion' if len(run) > 1 else 'Elementwise', read - made, written)


Argument = Tensor | list[Tensor] | None


def _parse(text: str) -> list[Argument]:
    arguments: list[Argument] = []
    inside: list[Tensor] | None = None
    for word in text.split():
        if word == '[':
            inside = []
        elif word == ']':
            arguments.append(inside)
            inside = None
        elif inside is not None:
            inside += [] if word == '-' else [_tensor(word)]
        else:
            arguments.append(None if word == '-' else _tensor(word))
    return arguments


def _tensor(word: str) -> Tensor:
    role, dtype, sizes, strides = word.split(':')
    return Tensor(role, dtype, *(tuple(map(int, filter(None, each.split(',')))) for each in (sizes, strides)))


def _round_up(number: int, to: int) -> int:
    return -(-number // to) * to


def _flat(arguments: Sequence[Argument]) -> list[Tensor]:
    every: list[Tensor] = []
    for each in arguments:
        every += each if isinstance(each, list) else [each] if each is not None else []
    return every


# ---- rules -----------------------------------------------------------------------------------------------------------


def _contiguous(tensors: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield the copies of strided inputs: l0op::Contiguous."""
    for tensor in _flat(tensors):
        if tensor.role in 'rb' and not tensor.is_contiguous:
            yield Kernel('Contiguous', tensor.stored_bytes, tensor.bytes)


def _view_copy(tensors: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield the copies to strided outputs: l0op::ViewCopy."""
    for tensor in _flat(tensors):
        if tensor.role in 'wb' and not tensor.is_contiguous:
            yield Kernel('ViewCopy', tensor.bytes, tensor.bytes)


def _one(name: str) -> Callable[[Chip, Sequence[Argument]], Iterator[Kernel]]:
    """Return the rule of a single kernel between copies of strided inputs and to strided outputs."""
    def rule(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
        every = _flat(arguments)
        if not chip.strided:
            yield from _contiguous(every)
        yield Kernel(name, sum(t.bytes for t in every if t.role in 'rb'), sum(t.bytes for t in every if t.role in 'wb'))
        if not chip.strided:
            yield from _view_copy(every)
    return rule


def _elementwise(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield Contiguous, the casts of mixed floating types to the widest, the kernel, and a cast of the output."""
    every = _flat(arguments)
    if not chip.strided:
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
    if not chip.strided:
        yield from _view_copy(every)


def _addition(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield one kernel, which takes a 16-bit tensor beside a float32 one as it is, else what :func:`_elementwise` does.

    A factor other than 1 beside mixed types would add the casts; this network has none.
    """
    mixed = {each.dtype for each in _flat(arguments) if each.role in 'rb'}
    yield from (_one('Add') if 'Float' in mixed and len(mixed) == 2 else _elementwise)(chip, arguments)


def _add_relu(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield Cast, Cast, Add or Axpy, Relu, Cast: floating types are promoted to float32."""
    yield from _contiguous(arguments)
    inputs = [t for t in _flat(arguments) if t.role in 'rb']
    output = next(t for t in _flat(arguments) if t.role in 'wb')
    wide = math.prod(output.sizes) * 4
    for tensor in inputs:
        if tensor.dtype != 'Float':
            yield Kernel('Cast', tensor.bytes, wide)
    yield Kernel('Add', 2 * wide, wide)
    yield Kernel('Relu', wide, wide)
    if output.dtype != 'Float':
        yield Kernel('Cast', wide, output.bytes)
    yield from _view_copy(arguments)


def _padded_channels(tensor: Tensor, groups_are_one: bool = True) -> int:
    """Return 4 for C0=4 (groups 1, Cin <= 4, 16 bits), else 16."""
    return 4 if groups_are_one and tensor.sizes[1] <= 4 and SIZES[tensor.dtype] == 2 else 16


def _convolution(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield the conversions to NC1HWC0 and FRACTAL_Z, the convolution, and the conversion back."""
    x, weight, bias, out = arguments[:4]
    assert isinstance(x, Tensor) and isinstance(weight, Tensor) and isinstance(out, Tensor)
    yield from _contiguous((x, weight))
    small = bias.bytes if isinstance(bias, Tensor) else 0
    if chip.convolves_nchw:
        yield Kernel('Conv2D', x.bytes + weight.bytes + small, out.bytes)
        return
    source, target = x.with_channels_padded(_padded_channels(x)), out.with_channels_padded()
    if not chip.keeps_private:
        yield Kernel('TransData', x.bytes, source)
    yield Kernel('TransData', weight.bytes, weight.as_fractal_z())
    yield Kernel('Conv2D', source + weight.as_fractal_z() + small, target)
    if not chip.keeps_private:
        yield Kernel('TransData', target, out.bytes)


def _convolution_backward(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield the conversions and the kernels of each gradient that is wanted; that of the weight is float32 first."""
    grad, x, weight, grad_input, grad_weight, grad_bias = arguments[:6]
    assert isinstance(grad, Tensor) and isinstance(x, Tensor) and isinstance(weight, Tensor)
    yield from _contiguous((grad, x, weight))
    if chip.convolves_nchw:
        g, source, w = grad.bytes, x.bytes, weight.bytes
    else:
        g, source, w = grad.with_channels_padded(), x.with_channels_padded(_padded_channels(x)), weight.as_fractal_z()
    converts = not chip.convolves_nchw and not chip.keeps_private
    if isinstance(grad_bias, Tensor):
        yield Kernel('ReduceSum', grad.bytes, grad_bias.bytes)
    if converts and (grad_input or grad_weight):
        yield Kernel('TransData', grad.bytes, g)
    if isinstance(grad_input, Tensor):
        if not chip.convolves_nchw:
            yield Kernel('TransData', weight.bytes, w)
        yield Kernel('Conv2DBackpropInput', g + w, source)
        if converts:
            yield Kernel('TransData', source, grad_input.bytes)
    if isinstance(grad_weight, Tensor):
        if converts:
            yield Kernel('TransData', x.bytes, source)
        wide = math.prod(weight.sizes) * 4
        padded = wide if chip.convolves_nchw else weight.as_fractal_z(4)
        yield Kernel('Conv2DBackpropFilter', g + source, padded)
        if not chip.convolves_nchw:
            yield Kernel('TransData', padded, wide)
        if grad_weight.dtype != 'Float':
            yield Kernel('Cast', wide, grad_weight.bytes)


def _batch_norm(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield BatchNormV3 where its conditions hold (64 channels), else BNTrainingReduce and BNTrainingUpdate."""
    x = arguments[0]
    out = next(t for t in _flat(arguments) if t.role == 'w')
    assert isinstance(x, Tensor)
    yield from _contiguous((x,))
    if chip.batch_norm_v3 and x.sizes[1] >= 64:
        yield Kernel('BatchNormV3', x.bytes, out.bytes)
    else:
        yield Kernel('BNTrainingReduce', x.bytes, 0)
        yield Kernel('BNTrainingUpdate', x.bytes, out.bytes)
    yield from _view_copy((out,))


def _batch_norm_backward(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield two kernels that both read the gradient and the input."""
    grad, x = arguments[:2]
    assert isinstance(grad, Tensor) and isinstance(x, Tensor)
    yield from _contiguous((grad, x))
    yield Kernel('BNTrainingUpdateGrad', grad.bytes + x.bytes, 0)
    yield Kernel('BNTrainingReduceGrad', grad.bytes + x.bytes, x.bytes)


def _copy(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield one kernel for a copy, a cast or both; strides are its purpose."""
    every = _flat(arguments)
    read = sum(t.stored_bytes for t in every if t.role == 'r')
    yield Kernel('Copy', read, sum(t.bytes for t in every if t.role in 'wb'))


def _concatenation(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield the copies of strided inputs, concatenations in stages, and a cast of the result.

    On 910b one kernel (ConcatDV2) takes up to 2048 tensors in the first dimension if their last one is a multiple of
    32 bytes.
    """
    pieces, out = _flat(arguments)[:-1], _flat(arguments)[-1]
    if not chip.strided:
        yield from _contiguous(pieces)
    sizes, most = [each.bytes for each in pieces], chip.most_concatenated
    if chip.batch_norm_v3 and len(out.sizes) == 1 and all(size % 32 == 0 for size in sizes):
        most = 2048
    while len(sizes) > 1:
        stage = [sizes[i:i + most] for i in range(0, len(sizes), most)]
        sizes = [sum(each) for each in stage]
        yield from (Kernel('Concat', sum(each), sum(each)) for each in stage if len(each) > 1)
    if pieces and pieces[0].dtype != out.dtype:
        yield Kernel('Cast', sizes[0], out.bytes)
    yield from _view_copy((out,))


def _max_pool(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield MaxPool3DWithArgmaxV2, which writes int32 indices into the memory of the mask, or the kernels of the mask.

    With a mask the kernel takes NC1HWC0 in 16 bits.
    """
    x, out, mask = _flat(arguments)[:3]
    yield from _contiguous((x,))
    if chip.pools_with_indices:
        yield Kernel('MaxPool3DWithArgmaxV2', x.bytes, out.bytes + math.prod(out.sizes) * 4)
    else:
        yield from _converted(chip, (x,), 'MaxPoolWithArgmaxV1', (out,), extra_written=mask.bytes)
    yield from _view_copy((out,))


def _max_pool_backward(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield MaxPool3DGradWithArgmax, which reads int32 indices, or the kernels of the mask."""
    grad, x, mask, out = _flat(arguments)[:4]
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
        if not chip.keeps_private:
            yield Kernel('TransData', half.bytes, half.with_channels_padded())
    yield Kernel(name, sum(half.with_channels_padded() for _, half in sources) + extra_read,
                 sum(half.with_channels_padded() for _, half in results) + extra_written)
    for tensor, half in results:
        if not chip.keeps_private:
            yield Kernel('TransData', half.with_channels_padded(), half.bytes)
        if SIZES[tensor.dtype] > 2:
            yield Kernel('Cast', half.bytes, tensor.bytes)


def _matmul(chip: Chip, arguments: Sequence[Argument]) -> Iterator[Kernel]:
    """Yield one product; a transposed operand is read as it is, others that are strided are copied first."""
    for tensor in _flat(arguments):
        if tensor.role == 'r' and not tensor.is_contiguous and not _is_transposed(tensor):
            yield Kernel('Contiguous', tensor.stored_bytes, tensor.bytes)
    every = _flat(arguments)
    read = sum(t.stored_bytes if 0 in t.strides else t.bytes for t in every if t.role in 'rb')
    yield Kernel('MatMul', read, sum(t.bytes for t in every if t.role in 'wb'))


def _is_transposed(tensor: Tensor) -> bool:
    """Return True if the last two dimensions are swapped in memory, or the first is an expanded one."""
    sizes, strides = list(tensor.sizes), list(tensor.strides)
    sizes[-2:], strides[-2:] = sizes[:-3:-1], strides[:-3:-1]
    if len(sizes) == 3 and tensor.strides[0] == 0:
        return Tensor('r', tensor.dtype, tensor.sizes[1:], tensor.strides[1:]).is_contiguous or Tensor(
            'r', tensor.dtype, tuple(sizes[1:]), tuple(strides[1:])).is_contiguous
    return Tensor('r', tensor.dtype, tuple(sizes), tuple(strides)).is_contiguous



@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        rule: Function from a chip and the call's arguments to kernels.
        source: File and version that it was read from.
        inferred: True if it follows from similar functions and was not read.
    """

    rule: Callable[[Chip, Sequence[Argument]], Iterator[Kernel]]
    source: str
    inferred: bool = False


def _nn(path: str, version: str = '9.1.0') -> str:
    return f'hicann/ops-nn {version} {path}'


def _math(path: str) -> str:
    return f'hicann/ops-math master (9.1.0) {path}'


_MATH = 'hicann/ops-math 9.1.0, function not read'
DEFAULT = Row(_elementwise, _MATH, inferred=True)
_RELU = _nn('activation/relu/op_api/aclnn_relu.cpp')
_ELU = _nn('activation/elu/op_api/aclnn_elu.cpp')
_MATMUL = _nn('matmul/mat_mul_v3/op_host/op_api/aclnn_matmul.cpp')
_POOL = _nn('pooling/max_pool3d_with_argmax_v2/op_host/op_api/aclnn_max_pool2d_with_indices.cpp')
_POOL_BACKWARD = _nn('pooling/max_pool3d_grad_with_argmax/op_api/aclnn_max_pool2d_with_indices_backward.cpp')
_ADD = _math('math/add/op_api/aclnn_add.cpp')
TABLE = {
    'aclnnAddRelu': Row(_add_relu, _nn('activation/relu/op_api/aclnn_add_relu.cpp')),
    'aclnnInplaceAddRelu': Row(_add_relu, _nn('activation/relu/op_api/aclnn_add_relu.cpp')),
    'aclnnRelu': Row(_one('Relu'), _RELU),
    'aclnnInplaceRelu': Row(_one('Relu'), _RELU),
    'aclnnElu': Row(_one('Elu'), _ELU),
    'aclnnInplaceElu': Row(_one('Elu'), _ELU),
    'aclnnEluBackward': Row(_one('EluGradV2'), _nn('activation/elu_grad_v2/op_api/aclnn_elu_backward.cpp')),
    'aclnnThresholdBackward': Row(
        _one('ReluGrad'), _nn('activation/threshold_grad_v2_d/op_host/op_api/aclnn_threshold_backward.cpp')),
    'aclnnConvolution': Row(
        _convolution, _nn('conv/convolution_forward/op_host/op_api/aclnn_convolution.cpp')),
    'aclnnConvolutionBackward': Row(
        _convolution_backward, _nn('conv/convolution_backward/op_api/aclnn_convolution_backward.cpp')),
    'aclnnBatchNorm': Row(_batch_norm, _nn('norm/batch_norm_v3/op_host/op_api/aclnn_batch_norm.cpp')),
    'aclnnBatchNormBackward': Row(
        _batch_norm_backward, _nn('norm/batch_norm_grad_v3/op_host/op_api/aclnn_batch_norm_backward.cpp')),
    'aclnnMatmul': Row(_matmul, _MATMUL),
    'aclnnMm': Row(_matmul, _nn('matmul/mat_mul_v3/op_host/op_api/aclnn_mm.cpp')),
    'aclnnBatchMatMul': Row(_matmul, _nn('matmul/batch_mat_mul_v3/op_host/op_api/aclnn_batch_matmul.cpp')),
    'aclnnBaddbmm': Row(_matmul, _MATMUL, inferred=True),
    'aclnnAddmm': Row(_matmul, _MATMUL, inferred=True),
    'aclnnMaxPool2dWithMask': Row(_max_pool, _POOL),
    'aclnnMaxPool2dWithMaskBackward': Row(_max_pool_backward, _POOL_BACKWARD),
    'aclnnMaxPool2dWithIndices': Row(_max_pool, _POOL),
    'aclnnMaxPool2dWithIndicesBackward': Row(_max_pool_backward, _POOL_BACKWARD),
    'aclnnAvgPool2d': Row(_one('AvgPool'), _nn('pooling/avg_pool3_d/op_api/aclnn_avgpool2d.cpp'), inferred=True),
    'aclnnAvgPool2dBackward': Row(
        _one('AvgPoolGrad'), _nn('pooling/avg_pool3_d_grad/op_api/aclnn_avgpool2d_backward.cpp'), inferred=True),
    'aclnnFusedSgd': Row(_one('FusedSgd'), _nn('optim/fused_sgd/op_api/aclnn_fused_sgd.cpp')),
    'aclnnCat': Row(_concatenation, _math('conversion/concat_d/op_api/aclnn_cat.cpp')),
    'aclnnAdd': Row(_addition, _ADD),
    'aclnnInplaceAdd': Row(_addition, _ADD),
    'aclnnInplaceCopy': Row(_copy, _MATH, inferred=True),
    'aclnnCast': Row(_copy, _MATH, inferred=True),
    'aclnnForeachCopy': Row(_copy, _MATH, inferred=True),
}

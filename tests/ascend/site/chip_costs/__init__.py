"""The kernels that a call of the operator log becomes on a chip, and the bytes that they read and write.

CANN's public sources say how each aclnn function is split into kernels. ``TABLE`` has a row for each function that the
network uses, with the file it was read from (hicann/ops-nn and hicann/ops-math, 9.1.0); a row that was not read there
is marked as inferred. A kernel reads each input once and writes each output once: no cache, and no second pass over
inputs that do not fit into the chip's buffers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from . import rules
from .tensors import Chip, Kernel, Tensor, flat, parse

__all__ = ['CHIPS', 'DEFAULT', 'TABLE', 'Kernel', 'Row', 'kernels_of', 'kernels_of_calls']

CHIPS = {
    # Internal formats are on there (torch_npu's npu_sys_ctrl.cpp), so the older operators run, not those of aclnn. How
    # often a private layout is converted for another operator is not known: no conversion is counted.
    '910a': Chip(keeps_private=True, pools_with_indices=False),
    '910b': Chip(batch_norm_from=64, pools_by_convolution=True, most_aligned=2048, fuses_lazily=True),
    '950': Chip(convolves_nchw=True, batch_norm_from=1, batch_norm_backward=True, adds_strided=True,
                most_concatenated=2048),
}


def kernels_of(operator: str, tensors: str, chip: str) -> list[Kernel]:
    """Return the kernels that one call becomes.

    Args:
        operator: Name of the aclnn function.
        tensors: Tensors of the call, as the operator log describes them.
        chip: A key of ``CHIPS``.
    """
    arguments = parse(tensors)
    return list(TABLE.get(operator, DEFAULT).rule(CHIPS[chip], arguments))


def kernels_of_calls(calls: Iterable[tuple[str, str]], chip: str, lazy_fusion: bool = False) -> list[Kernel]:
    """Return the kernels of several calls in a row.

    Args:
        calls: (aclnn function, tensors) of each call.
        chip: A key of ``CHIPS``.
        lazy_fusion: Fusion of additions, products and ReLUs that follow one another, as by TORCH_NPU_LAZY_FUSION, which
            does nothing but on 910b. Inferred: a call joins the kernel of the call before it if it reads that one's
            output.
    """
    kernels: list[Kernel] = []
    run: list[list[Tensor]] = []
    for name, tensors in calls:
        every = flat(parse(tensors)) if lazy_fusion and CHIPS[chip].fuses_lazily and name in FUSIBLE else []
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


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        rule: Function from a chip and the call's arguments to kernels.
        source: File and version that it was read from.
        inferred: True if it follows from similar functions and was not read.
    """

    rule: rules.Rule
    source: str
    inferred: bool = False


def _nn(path: str) -> str:
    return f'hicann/ops-nn 9.1.0 {path}'


def _math(path: str) -> str:
    return f'hicann/ops-math 9.1.0 {path}'


DEFAULT = Row(rules.elementwise, 'hicann/ops-math 9.1.0, function not read', inferred=True)
_ADD = Row(rules.mixed('Add'), _math('math/add/op_api/aclnn_add.cpp'))
_MUL = Row(rules.mixed('Mul'), _math('math/mul/op_api/aclnn_mul.cpp'))
_ADD_RELU = Row(rules.add_relu, _nn('activation/relu/op_api/aclnn_add_relu.cpp'))
_RELU = Row(rules.one('Relu'), _nn('activation/relu/op_api/aclnn_relu.cpp'))
_ELU = Row(rules.one('Elu'), _nn('activation/elu/op_api/aclnn_elu.cpp'))
_MAX_POOL = Row(rules.max_pool, _nn('pooling/max_pool3d_with_argmax_v2/op_api/aclnn_max_pool2d_with_indices.cpp'))
_MAX_POOL_BACKWARD = Row(
    rules.max_pool_backward,
    _nn('pooling/max_pool3d_grad_with_argmax/op_api/aclnn_max_pool2d_with_indices_backward.cpp'))
TABLE = {
    'aclnnAddRelu': _ADD_RELU,
    'aclnnInplaceAddRelu': _ADD_RELU,
    'aclnnRelu': _RELU,
    'aclnnInplaceRelu': _RELU,
    'aclnnElu': _ELU,
    'aclnnInplaceElu': _ELU,
    'aclnnEluBackward': Row(rules.one('EluGradV2'), _nn('activation/elu_grad_v2/op_api/aclnn_elu_backward.cpp')),
    'aclnnThresholdBackward': Row(
        rules.one('ReluGrad'), _nn('activation/threshold_grad_v2_d/op_host/op_api/aclnn_threshold_backward.cpp')),
    'aclnnConvolution': Row(
        rules.convolution, _nn('conv/convolution_forward/op_host/op_api/aclnn_convolution.cpp')),
    'aclnnConvolutionBackward': Row(
        rules.convolution_backward, _nn('conv/convolution_backward/op_api/aclnn_convolution_backward.cpp')),
    'aclnnBatchNorm': Row(rules.batch_norm, _nn('norm/batch_norm_v3/op_host/op_api/aclnn_batch_norm.cpp')),
    'aclnnBatchNormBackward': Row(
        rules.batch_norm_backward, _nn('norm/batch_norm_grad_v3/op_host/op_api/aclnn_batch_norm_backward.cpp')),
    'aclnnMatmul': Row(rules.matmul, _nn('matmul/mat_mul_v3/op_host/op_api/aclnn_matmul.cpp')),
    'aclnnMm': Row(rules.product, _nn('matmul/mat_mul_v3/op_host/op_api/aclnn_mm.cpp')),
    'aclnnBatchMatMul': Row(rules.product, _nn('matmul/batch_mat_mul_v3/op_host/op_api/aclnn_batch_matmul.cpp')),
    'aclnnAddbmm': Row(rules.sum_of_products, _nn('matmul/batch_mat_mul_v3/op_host/op_api/aclnn_addbmm.cpp')),
    # With factors of 1 the addend is the bias of the product, where it has one row.
    'aclnnAddmm': Row(rules.product, _nn('matmul/mat_mul_v3/op_host/op_api/aclnn_addmm.cpp'), inferred=True),
    'aclnnMaxPool2dWithMask': _MAX_POOL,
    'aclnnMaxPool2dWithMaskBackward': _MAX_POOL_BACKWARD,
    'aclnnMaxPool2dWithIndices': _MAX_POOL,
    'aclnnMaxPool2dWithIndicesBackward': _MAX_POOL_BACKWARD,
    'aclnnAvgPool2d': Row(rules.average_pool, _nn('pooling/avg_pool3_d/op_api/aclnn_avgpool2d.cpp')),
    'aclnnAvgPool2dBackward': Row(
        rules.average_pool_backward, _nn('pooling/avg_pool3_d_grad/op_api/aclnn_avgpool2d_backward.cpp')),
    'aclnnFusedSgd': Row(rules.one('FusedSgd'), _nn('optim/fused_sgd/op_api/aclnn_fused_sgd.cpp')),
    'aclnnCat': Row(rules.concatenation, _math('conversion/concat_d/op_api/aclnn_cat.cpp')),
    'aclnnAdd': _ADD,
    'aclnnInplaceAdd': _ADD,
    'aclnnMul': _MUL,
    'aclnnInplaceMul': _MUL,
    'aclnnInplaceCopy': Row(rules.copy, _math('conversion/view_copy/op_api/aclnn_copy.cpp')),
    'aclnnCast': Row(rules.copy, _math('math/cast/op_api/aclnn_cast.cpp')),
    'aclnnForeachCopy': Row(rules.copies, _nn('foreach/foreach_copy/op_host/foreach_copy_def.cpp'), inferred=True),
}

"""The table of a chip's kernels against cases worked out by hand; every row of it names its source."""

import pytest

from .site import chip_costs

N, HALF, FLOAT = 2, 2, 4


def tensor(role: str, *sizes: int, dtype: str = 'Half', strides: tuple[int, ...] | None = None) -> str:
    if strides is None:
        strides, step = (), 1
        for size in reversed(sizes):
            strides, step = (step, *strides), step * size
    return f'{role}:{dtype}:{",".join(map(str, sizes))}:{",".join(map(str, strides))}'


def kernels(operator: str, *tensors: str, chip: str = '910b') -> list[tuple[str, int, int]]:
    return [tuple(each) for each in chip_costs.kernels_of(operator, ' '.join(tensors), chip)]


def test_a_strided_input_of_a_relus_gradient_is_copied_first_but_on_950():
    slice_of_64, elements = (64 * 49, 49, 7, 1), N * 32 * 49
    call = (tensor('r', N, 32, 7, 7), tensor('r', N, 32, 7, 7, strides=slice_of_64), tensor('w', N, 32, 7, 7))
    gradient = ('ReluGrad', 2 * elements * HALF, elements * HALF)
    assert kernels('aclnnThresholdBackward', *call) == [('Contiguous', elements * HALF, elements * HALF), gradient]
    assert kernels('aclnnThresholdBackward', *call, chip='950') == [gradient]


@pytest.mark.parametrize('channels, chip, names', [
    (64, '910b', ['BatchNormV3']),
    (63, '910b', ['BNTrainingReduce', 'BNTrainingUpdate']),
    (64, '910a', ['BNTrainingReduce', 'BNTrainingUpdate']),
])
def test_batch_norm_is_one_kernel_from_64_channels_on(channels, chip, names):
    parameters = [tensor('r', channels, dtype='Float')] * 2 + [tensor('b', channels, dtype='Float')] * 2
    saved = [tensor('w', channels, dtype='Float')] * 2
    image = N, channels, 7, 7
    found = kernels('aclnnBatchNorm', tensor('r', *image), *parameters, tensor('w', *image), *saved, chip=chip)
    size = N * channels * 49 * HALF
    assert [name for name, _, _ in found] == names
    assert sum(read for _, read, _ in found) == size * len(names) and found[-1][2] == size


def test_add_relu_in_float16_is_five_kernels_and_38_bytes_an_element():
    shape = N, 320, 35, 35
    found = kernels('aclnnAddRelu', tensor('r', *shape), tensor('r', *shape), tensor('w', *shape))
    assert [name for name, _, _ in found] == ['Cast', 'Cast', 'Add', 'Relu', 'Cast']
    assert sum(read + written for _, read, written in found) == 38 * N * 320 * 35 * 35
    plain = kernels('aclnnAdd', tensor('r', *shape), tensor('r', *shape), tensor('w', *shape))
    plain += kernels('aclnnInplaceRelu', tensor('b', *shape))
    assert len(plain) == 2 and sum(read + written for _, read, written in plain) == 10 * N * 320 * 35 * 35


def test_a_1x1_convolution_converts_its_input_its_weight_and_its_output():
    call = tensor('r', N, 40, 7, 7), tensor('r', 24, 40, 1, 1), '-', tensor('w', N, 24, 7, 7)
    x, padded_x, y, padded_y = (N * channels * 49 * HALF for channels in (40, 48, 24, 32))
    weight, fractal = 24 * 40 * HALF, 32 * 48 * HALF
    assert kernels('aclnnConvolution', *call) == [
        ('TransData', x, padded_x), ('TransData', weight, fractal), ('Conv2D', padded_x + fractal, padded_y),
        ('TransData', padded_y, y)]
    assert kernels('aclnnConvolution', *call, chip='950') == [('Conv2D', x + weight, y)]


def test_the_gradients_of_a_1x1_convolution_convert_both_ways_and_the_weights_is_float32_first():
    call = (tensor('r', N, 24, 7, 7), tensor('r', N, 40, 7, 7), tensor('r', 24, 40, 1, 1), tensor('w', N, 40, 7, 7),
            tensor('w', 24, 40, 1, 1), '-')
    x, padded_x, y, padded_y = (N * channels * 49 * HALF for channels in (40, 48, 24, 32))
    weight, fractal = 24 * 40, 32 * 48
    assert kernels('aclnnConvolutionBackward', *call) == [
        ('TransData', y, padded_y),
        ('TransData', weight * HALF, fractal * HALF),
        ('Conv2DBackpropInput', padded_y + fractal * HALF, padded_x),
        ('TransData', padded_x, x),
        ('TransData', x, padded_x),
        ('Conv2DBackpropFilter', padded_y + padded_x, fractal * FLOAT),
        ('TransData', fractal * FLOAT, weight * FLOAT),
        ('Cast', weight * FLOAT, weight * HALF)]


def test_a_product_reads_an_expanded_or_transposed_operand_as_it_is():
    weight = tensor('r', N, 24, 40, strides=(0, 40, 1))
    transposed = tensor('r', N, 40, 24, strides=(0, 1, 40))
    x, y = tensor('r', N, 40, 49), tensor('w', N, 24, 49)
    size_x, size_y = N * 40 * 49 * HALF, N * 24 * 49 * HALF
    assert kernels('aclnnBatchMatMul', weight, x, y) == [('MatMul', 24 * 40 * HALF + size_x, size_y)]
    found = kernels('aclnnBatchMatMul', transposed, tensor('r', N, 24, 49), tensor('w', N, 40, 49))
    assert found == [('MatMul', 24 * 40 * HALF + size_y, size_x)]


def test_max_pooling_keeps_indices_of_4_bytes_in_the_masks_memory_and_the_910a_the_mask():
    x, out, mask = (N, 40, 7, 7), (N, 40, 3, 3), (N, 40, 9, 64)
    size, pooled, padded = N * 40 * 49, N * 40 * 9, N * 48
    call = tensor('r', *x), tensor('w', *out), tensor('w', *mask, dtype='Char')
    assert kernels('aclnnMaxPool2dWithMask', *call) == [
        ('MaxPool3DWithArgmaxV2', size * HALF, pooled * (HALF + 4))]
    assert kernels('aclnnMaxPool2dWithMask', *call, chip='910a') == [
        ('MaxPoolWithArgmaxV1', padded * 49 * HALF, padded * 9 * HALF + N * 40 * 9 * 64)]
    back = tensor('r', *out), tensor('r', *x), tensor('r', *mask, dtype='Char'), tensor('w', *x)
    assert kernels('aclnnMaxPool2dWithMaskBackward', *back) == [
        ('MaxPool3DGradWithArgmax', pooled * (HALF + 4) + size * HALF, size * HALF)]


def test_a_concatenation_of_many_tensors_has_stages_unless_all_are_aligned():
    pieces = [tensor('r', 16)] * 64
    found = kernels('aclnnCat', '[', *pieces, ']', tensor('w', 1024))
    assert found == [('Concat', 1024 * HALF, 1024 * HALF)]
    found = kernels('aclnnCat', '[', *pieces, tensor('r', 8), ']', tensor('w', 1032, dtype='Float'))
    assert found == [('Concat', 1024, 1024), ('Concat', 1024, 1024), ('Concat', 2064, 2064), ('Cast', 2064, 4128)]
    found = kernels('aclnnCat', '[', *pieces, tensor('r', 8), ']', tensor('w', 1032), chip='950')
    assert found == [('Concat', 2064, 2064)]


def test_mixed_types_are_cast_to_the_wider_one_but_for_an_addition():
    addition = kernels('aclnnAdd', tensor('r', 8), tensor('r', 8, dtype='Float'), tensor('w', 8, dtype='Float'))
    assert addition == [('Add', 48, 32)]
    found = kernels('aclnnMul', tensor('r', 8), tensor('r', 8, dtype='Float'), tensor('w', 8, dtype='Float'))
    assert found == [('Cast', 16, 32), ('Elementwise', 64, 32)]


def test_lazy_fusion_makes_one_kernel_of_what_follows_one_another():
    shape, bias = (N, 320, 35, 35), tensor('r', 320, 1)
    calls = [('aclnnInplaceAdd', f'{tensor("b", *shape)} {bias}'),
             ('aclnnAdd', ' '.join((tensor('r', *shape), tensor('r', *shape), tensor('w', *shape)))),
             ('aclnnInplaceRelu', tensor('b', *shape)),
             ('aclnnThresholdBackward', ' '.join((tensor('r', *shape), tensor('r', *shape), tensor('w', *shape))))]
    size = N * 320 * 35 * 35 * HALF
    fused, alone = (chip_costs.kernels_of_calls(calls, '910b', lazy) for lazy in (True, False))
    assert [tuple(each) for each in fused] == [
        ('LazyFusion', 2 * size + 320 * HALF, size), ('ReluGrad', 2 * size, size)]
    assert len(alone) == 4 and sum(r + w for _, r, w in alone) == (2 + 3 + 2 + 3) * size + 320 * HALF


def test_each_row_names_its_source():
    for name, row in (*chip_costs.TABLE.items(), ('default', chip_costs.DEFAULT)):
        assert 'hicann/ops-' in row.source and ('9.1.0' in row.source), name
        assert row.inferred or row.source.endswith('.cpp'), name

"""The table of a chip's kernels against cases worked out by hand; every row of it names its source."""

import re

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


@pytest.mark.parametrize('chip', chip_costs.CHIPS)
def test_a_strided_input_of_a_relus_gradient_is_copied_first(chip):
    slice_of_64, elements = (64 * 49, 49, 7, 1), N * 32 * 49
    call = (tensor('r', N, 32, 7, 7), tensor('r', N, 32, 7, 7, strides=slice_of_64), tensor('w', N, 32, 7, 7))
    assert kernels('aclnnThresholdBackward', *call, chip=chip) == [
        ('Contiguous', elements * HALF, elements * HALF), ('ReluGrad', 2 * elements * HALF, elements * HALF)]


@pytest.mark.parametrize('chip, names', [('910b', ['Contiguous', 'Add']), ('950', ['Add'])])
def test_additions_and_cat_read_strided_inputs_on_950_alone(chip, names):
    x, strided = tensor('r', N, 32, 7, 7), tensor('r', N, 32, 7, 7, strides=(64 * 49, 49, 7, 1))
    assert [name for name, _, _ in kernels('aclnnAdd', x, strided, tensor('w', N, 32, 7, 7), chip=chip)] == names
    found = kernels('aclnnCat', '[', x, strided, ']', tensor('w', N, 64, 7, 7), chip=chip)
    assert [name for name, _, _ in found] == [name.replace('Add', 'Concat') for name in names]
    many = kernels('aclnnCat', '[', *[strided] * 33, ']', tensor('w', N, 33 * 32, 7, 7), chip=chip)
    assert many[0][0] == 'Contiguous'


@pytest.mark.parametrize('channels, chip, names, backward', [
    (64, '910b', ['BatchNormV3'], ['BNTrainingUpdateGrad', 'BNTrainingReduceGrad']),
    (63, '910b', ['BNTrainingReduce', 'BNTrainingUpdate'], ['BNTrainingUpdateGrad', 'BNTrainingReduceGrad']),
    (64, '910a', ['BNTrainingReduce', 'BNTrainingUpdate'], ['BNTrainingUpdateGrad', 'BNTrainingReduceGrad']),
    (1, '950', ['BatchNormV3'], ['BatchNormGradV3']),
])
def test_batch_norm_is_one_kernel_from_64_channels_on_and_both_ways_on_950(channels, chip, names, backward):
    parameters = [tensor('r', channels, dtype='Float')] * 2 + [tensor('b', channels, dtype='Float')] * 2
    saved = [tensor('w', channels, dtype='Float')] * 2
    x, out = tensor('r', N, channels, 7, 7), tensor('w', N, channels, 7, 7)
    found = kernels('aclnnBatchNorm', x, *parameters, out, *saved, chip=chip)
    size = N * channels * 49 * HALF
    assert [name for name, _, _ in found] == names
    assert sum(read for _, read, _ in found) == size * len(names) and found[-1][2] == size
    found = kernels('aclnnBatchNormBackward', x, x, *parameters, out, chip=chip)
    assert [name for name, _, _ in found] == backward
    assert all(read == 2 * size for _, read, _ in found) and sum(written for _, _, written in found) == size


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
    weight_gradient = [
        ('Conv2DBackpropFilter', padded_y + padded_x, fractal * FLOAT),
        ('TransData', fractal * FLOAT, weight * FLOAT),
        ('Cast', weight * FLOAT, weight * HALF)]
    conversions = [('TransData', y, padded_y), ('TransData', x, padded_x), ('TransData', weight * HALF, fractal * HALF)]
    assert kernels('aclnnConvolutionBackward', *call) == [
        *conversions,
        ('Conv2DBackpropInput', padded_y + fractal * HALF, padded_x),
        ('TransData', padded_x, x),
        *weight_gradient]
    assert kernels('aclnnConvolutionBackward', *call[:3], '-', *call[4:]) == conversions + weight_gradient


@pytest.mark.parametrize('dtype, size, block', [('Half', 2, 16), ('BFloat16', 2, 16), ('Float', 4, 8)])
def test_the_three_channels_of_an_image_have_a_block_of_32_bytes(dtype, size, block):
    call = tensor('r', N, 3, 9, 9, dtype=dtype), tensor('r', 32, 3, 3, 3, dtype=dtype), '-', tensor(
        'w', N, 32, 7, 7, dtype=dtype)
    (_, read, written), (_, _, weight), *_ = kernels('aclnnConvolution', *call)
    assert (read, written, weight) == (N * 3 * 81 * size, N * block * 81 * size, 32 * block * 9 * size)


def test_a_product_reads_a_transposed_operand_as_it_is_but_for_one_matrix_before_many():
    x, y = tensor('r', N, 40, 49), tensor('r', N, 24, 49)
    transposed = tensor('r', N, 49, 40, strides=(40 * 49, 1, 49))
    size_x, size_y, weight = N * 40 * 49 * HALF, N * 24 * 49 * HALF, 24 * 40 * HALF
    assert kernels('aclnnMatmul', y, transposed, tensor('w', N, 24, 40)) == [('MatMul', size_x + size_y, N * weight)]
    found = kernels('aclnnMatmul', tensor('r', 24, 40), x, tensor('w', N, 24, 49))
    assert found == [('MatMul', weight + size_x, size_y)]
    left = tensor('r', 40, 24, strides=(1, 40))
    assert kernels('aclnnMatmul', left, y, tensor('w', N, 40, 49)) == [
        ('Contiguous', weight, weight), ('MatMul', weight + size_y, size_x)]
    found = kernels('aclnnAddbmm', tensor('r', 24, 40), y, transposed, tensor('w', 24, 40))
    assert found == [('MatMul', size_x + size_y, N * weight), ('ReduceSum', N * weight, weight),
                     ('Muls', weight, weight)]
    assert kernels('aclnnMm', left, tensor('r', 24, 49), tensor('w', 40, 49))[0][0] == 'MatMul'
    expanded, sliced = tensor('r', N, 24, 40, strides=(0, 40, 1)), tensor('r', N, 40, 49, strides=(80 * 49, 49, 1))
    assert kernels('aclnnBatchMatMul', expanded, sliced, tensor('w', N, 24, 49)) == [
        ('Contiguous', weight, N * weight), ('Contiguous', size_x, size_x), ('MatMul', N * weight + size_x, size_y)]


def test_average_pooling_is_a_convolution_on_910b_and_its_gradient_has_the_channels_last():
    shape, size, padded = (N, 40, 7, 7), N * 40 * 49, N * 48 * 49
    forward, back = (tensor('r', *shape), tensor('w', *shape)), (tensor('r', *shape),) * 2 + (tensor('w', *shape),)
    assert kernels('aclnnAvgPool2d', *forward) == [
        ('TransData', size * HALF, padded * HALF), ('Pooling', padded * HALF, padded * HALF),
        ('AvgPoolUpdate', 2 * padded * HALF, padded * HALF), ('TransData', padded * HALF, size * HALF)]
    assert kernels('aclnnAvgPool2dBackward', *back) == [
        (name, size * HALF, size * HALF) for name in ('Transpose', 'AvgPool3DGrad', 'Transpose')]
    names = [name for name, _, _ in kernels('aclnnAvgPool2d', *(each.replace('Half', 'BFloat16') for each in forward))]
    assert names == ['Cast', 'TransData', 'Pooling', 'AvgPoolUpdate', 'TransData', 'Cast']
    assert kernels('aclnnAvgPool2d', *forward, chip='950') == [('AvgPoolV2', size * HALF, size * HALF)]
    assert kernels('aclnnAvgPool2dBackward', *back, chip='950') == [('AvgPoolV2Grad', size * HALF, size * HALF)]


@pytest.mark.parametrize('target, source, names', [
    (tensor('w', 4, 8), tensor('r', 4, 8), ['ViewCopy']),
    (tensor('w', 4, 8), tensor('r', 4, 8, dtype='Float'), ['Cast']),
    (tensor('w', 4, 8), tensor('r', 4, 8, strides=(1, 4)), ['Contiguous']),
    (tensor('w', 4, 8), tensor('r', 8), ['BroadcastTo']),
    (tensor('w', 4, 8, strides=(1, 4)), tensor('r', 4, 8, dtype='Float', strides=(1, 4)), [
        'Contiguous', 'Cast', 'ViewCopy']),
])
def test_a_copy_has_a_kernel_for_each_difference(target, source, names):
    assert [name for name, _, _ in kernels('aclnnInplaceCopy', target, source)] == names


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


@pytest.mark.parametrize('name', ['Add', 'Mul'])
def test_additions_and_products_take_mixed_types_and_cast_a_narrow_result(name):
    inputs = tensor('r', 8), tensor('r', 8, dtype='Float')
    assert kernels(f'aclnn{name}', *inputs, tensor('w', 8, dtype='Float')) == [(name, 48, 32)]
    assert kernels(f'aclnn{name}', *inputs, tensor('w', 8)) == [(name, 48, 32), ('Cast', 32, 16)]


def test_other_operators_cast_mixed_types_to_the_wider_one():
    found = kernels('aclnnDiv', tensor('r', 8), tensor('r', 8, dtype='Float'), tensor('w', 8, dtype='Float'))
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
    assert chip_costs.kernels_of_calls(calls, '910a', True) == chip_costs.kernels_of_calls(calls, '910a', False)
    assert len(alone) == 4 and sum(r + w for _, r, w in alone) == (2 + 3 + 2 + 3) * size + 320 * HALF


def test_each_row_names_its_source():
    for name, row in (*chip_costs.TABLE.items(), ('default', chip_costs.DEFAULT)):
        assert re.match(r'hicann/ops-(nn|math) 9\.1\.0[, ]', row.source), name
        assert row.inferred or re.fullmatch(r'\S+ 9\.1\.0 [\w/]+/\w+\.cpp', row.source), name

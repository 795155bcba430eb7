"""What a training step at 299 px asks of an NPU stays as little as it is: calls, bytes, memory, no wait for the device.
The processes run no operators, only count them."""

import json
import sys
from pathlib import Path

from ..ascend.environment import only_here

only_here()

ROOT = Path(__file__).parents[2]


def test_a_step_at_o2_costs_no_more_than_it_did(start_on_standin, tmp_path):
    process = start_on_standin(
        sys.executable, str(ROOT / 'train_scripts' / 'benchmark.py'), 'step', '--recompute',
        '--variants', 'default', 'best', '--json', 'step.json',
        run_operators=False, memory=200 << 30)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    found = json.loads((tmp_path / 'step.json').read_text())
    rows = {name: dict(zip(found['columns'], row, strict=True)) for name, row in found['rows'].items()}
    ours, recomputing = rows['inception_resnet_v2_npu'], rows['inception_resnet_v2_npu, recomputing']
    assert ours['calls'] <= 1240 and ours['synchronizations'] == 0
    assert ours['MB an image'] <= 850 and ours['MB a step'] <= 2200
    assert ours['chip MB an image'] <= 1485 and ours['chip kernels'] <= 3600
    best = rows['inception_resnet_v2_npu, best variants']
    assert best['chip MB an image'] <= 1210 and best['chip MB a step'] < ours['chip MB a step']
    assert ours['peak MB an image'] <= 99 and recomputing['peak MB an image'] <= 75
    timm = rows['inception_resnet_v2 (timm)']
    assert timm['calls'] > 2500 and timm['MB a step'] > 4500 and timm['chip MB an image'] > 1900  # it counts


def test_batch_norm_and_relu_in_one_kernel_save_a_tenth_of_the_bytes(start_on_standin):
    process = start_on_standin(
        sys.executable, '-m', 'tests.npu.fused_kernels', run_operators=False, memory=200 << 30,
        variables={'TIMM_NPU_IRV2_KERNELS': 'triton'})
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    found = json.loads(output.splitlines()[-1])
    assert found['convolution']['handed over']['image'] <= 690 and found['convolution']['handed over']['step'] <= 2200
    assert found['product']['chip']['image'] <= 1150

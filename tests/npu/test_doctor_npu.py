"""`timm-npu-irv2 doctor` on the stand-in: the chip's generation and the operators that it lacks."""

import json
import re
import sys

import pytest

from ..ascend.environment import only_here

only_here()


@pytest.mark.parametrize('chip, generation, missing', [
    ('Ascend910A', '910A', {'FusedSgd', 'ForeachMulScalarV2', 'ForeachNonFiniteCheckAndUnscale'}),
    ('Ascend910B3', 'A2', set()), ('Ascend910_9382', 'A3', set())])
def test_the_chip_and_what_it_lacks_are_named(start_on_standin, chip, generation, missing):
    process = start_on_standin(sys.executable, '-m', 'timm_npu_irv2', 'doctor', '--json', chip=chip, devices=2)
    text, errors = process.communicate()
    findings = {each['name']: each['value'] for each in json.loads(text)}
    assert findings['device'] == f'2 × {chip}, 64 GiB each', errors
    assert findings['chip'].startswith(f'generation {generation}:')
    named = {each['value'].split()[0] for each in json.loads(text) if each['name'] == 'operator'}
    assert named == missing


@pytest.mark.parametrize('port', ['http', '65520'])
def test_a_base_port_that_is_none_is_a_problem(start_on_standin, port):
    variables = {'HCCL_IF_BASE_PORT': port}
    process = start_on_standin(sys.executable, '-m', 'timm_npu_irv2', 'doctor', variables=variables, devices=2)
    text, errors = process.communicate()
    assert process.returncode == 1 and re.search(rf'✗ HCCL_IF_BASE_PORT +{port}', text), errors

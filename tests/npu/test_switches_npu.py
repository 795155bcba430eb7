"""--allow-hf32, --jit-compile and --deterministic reach torch_npu, CANN and HCCL, and end with their block."""

import json
import sys

import pytest

from ..ascend.environment import only_here

only_here()


def states(start_on_standin, *options: str) -> list[dict]:
    process = start_on_standin(sys.executable, '-m', 'tests.npu.switches', *options)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


VENDORS = {'convolutions': True, 'products': False, 'jit_compile': False, 'internal_format': 'disable',
           'deterministic': 0, 'hccl': 0}


@pytest.mark.parametrize('option, changes', [
    ('', {}),
    ('--allow-hf32', {'products': True}),
    ('--no-allow-hf32', {'convolutions': False}),
    ('--deterministic', {'deterministic': 1, 'hccl': 1}),
])
def test_a_switch_changes_what_it_names_and_nothing_else(start_on_standin, option, changes):
    before, after, restored, inside = states(start_on_standin, *option.split())
    assert before == VENDORS  # of an A2
    assert after == restored == {**VENDORS, **changes}
    assert inside == {'products': not after['products'], 'internal_format': 'enable'}

"""Any module of the package may be the first import of a program."""

import subprocess
import sys

import pytest

PROGRAM = """
import timm_npu_irv2.{module} as module
import timm, torch
from timm_npu_irv2 import model, layers
assert model.BlockSequence is layers.BlockSequence
network = timm.create_model('inception_resnet_v2_npu', num_classes=2)
assert type(network.repeat) is layers.BlockSequence
"""


@pytest.mark.parametrize('module', ['layers', 'model', 'optim', 'ops', 'tuning'])
def test_a_module_imported_first_registers_without_a_warning(module):
    command = [sys.executable, '-W', 'error:timm_npu_irv2', '-c', PROGRAM.format(module=module)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and 'could not register' not in found.stderr, found.stderr

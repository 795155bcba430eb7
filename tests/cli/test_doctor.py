"""`timm-npu-irv2 doctor`: software and devices of this machine, and of machines made up of files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from timm_npu_irv2.chips import find_generation, load_facts
from timm_npu_irv2.cli.doctor import diagnose


def doctor(*words: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-m', 'timm_npu_irv2', 'doctor', *words], capture_output=True, text=True,
                          env={**os.environ, **variables}, check=False)


def install_broken_torch_npu(folder: Path, version: str) -> str:
    """Put a torch_npu that fails to load where PYTHONPATH finds it first, and return that PYTHONPATH."""
    (folder / 'torch_npu.py').write_text(
        'def _autoload():\n    raise ImportError("libhccl.so: cannot open shared object file")\n_autoload()\n')
    metadata = folder / f'torch_npu-{version}.dist-info'
    metadata.mkdir()
    (metadata / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n')
    (metadata / 'entry_points.txt').write_text('[torch.backends]\ntorch_npu = torch_npu:_autoload\n')
    return os.pathsep.join([str(folder), os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep)


def install_cann(root: Path, version: str) -> Path:
    toolkit = root / 'usr/local/Ascend/cann'
    (toolkit / 'arm64-linux').mkdir(parents=True)
    (toolkit / 'arm64-linux' / 'ascend_toolkit_install.info').write_text(f'package_name=toolkit\nversion={version}\n')
    return toolkit


def finding(findings, name):
    return next(each for each in findings if each.name == name)


def test_a_machine_without_npus_has_no_problem():
    process = doctor('--json')
    findings = json.loads(process.stdout)
    assert process.returncode == 0
    assert {each['status'] for each in findings} <= {'ok', 'info', 'warning'}
    assert next(each for each in findings if each['name'] == 'import torch')['value'] == 'works'


@pytest.mark.parametrize('home', ['', 'relative'])
def test_a_home_that_is_no_folder_is_no_traceback(home):
    process = doctor(HOME=home)
    assert (process.returncode, process.stderr) == (0, '')


def test_a_folder_that_may_not_be_looked_into_is_no_traceback(tmp_path, monkeypatch):
    look = os.stat

    def refuse(path: object, *words: object, **options: object) -> os.stat_result:  # root may look into every folder
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(13, 'Permission denied')
        return look(path, *words, **options)

    monkeypatch.setattr(os, 'stat', refuse)
    assert finding(diagnose(dict(os.environ), root=tmp_path), 'CANN').value == 'not found'


def test_a_broken_torch_npu_is_diagnosed_though_it_breaks_import_torch(tmp_path):
    process = doctor(PYTHONPATH=install_broken_torch_npu(tmp_path, '2.1.0'))
    assert process.returncode == 1
    assert 'libhccl.so: cannot open shared object file' in process.stdout
    assert 'pip install torch==2.1.0' in process.stdout  # it is of another version than torch
    assert 'TORCH_DEVICE_BACKEND_AUTOLOAD=0' in process.stdout
    assert 'Traceback' not in process.stdout + process.stderr


def test_a_torchvision_that_does_not_fit_torch_is_a_problem(tmp_path):
    (tmp_path / 'torchvision.py').write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    process = doctor(PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep))
    assert process.returncode == 1
    assert '✓ import torch' in process.stdout
    assert '✗ import timm' in process.stdout and 'operator torchvision::nms does not exist' in process.stdout
    assert 'install torch and torchvision together' in process.stdout


@pytest.mark.parametrize('cann, status', [('9.0.0', 'problem'), ('8.1.RC1', 'ok'), ('99.0', 'info')])
def test_cann_is_compared_with_the_published_table(tmp_path, monkeypatch, cann, status):
    (tmp_path / 'site').mkdir()
    monkeypatch.syspath_prepend(tmp_path / 'site')
    install_broken_torch_npu(tmp_path / 'site', '2.1.0.post12')
    install_cann(tmp_path, cann)
    found = finding(diagnose({**os.environ, 'HOME': '/nobody'}, root=tmp_path), 'CANN and torch')
    assert found.status == status
    assert load_facts()['compatibility']['date'] in found.value + found.meaning


def test_a_toolkit_that_is_not_loaded_names_its_set_env(tmp_path):
    toolkit = install_cann(tmp_path, '9.1.0')
    variables = {key: value for key, value in os.environ.items() if not key.startswith('ASCEND')}
    found = finding(diagnose(variables, root=tmp_path), 'CANN')
    assert found.status == 'problem'
    assert f'source {toolkit}/set_env.sh' in found.remedy


def test_devices_out_of_order_are_put_in_order():
    found = finding(diagnose({**os.environ, 'ASCEND_RT_VISIBLE_DEVICES': '3,1'}), 'ASCEND_RT_VISIBLE_DEVICES')
    assert (found.status, found.remedy) == ('problem', 'export ASCEND_RT_VISIBLE_DEVICES=1,3')


@pytest.mark.parametrize('chip, generation', [
    ('Ascend910A', '910A'), ('Ascend910B', '910A'), ('Ascend910ProB', '910A'), ('Ascend910B3', 'A2'),
    ('Ascend910B4-1', 'A2'), ('Ascend910_9382', 'A3'), ('Ascend310P3', '310P'), ('Ascend950PR_9589', '950'),
    ('NVIDIA H100 80GB HBM3', None)])
def test_a_chips_name_tells_its_generation(chip, generation):
    assert find_generation(chip) == generation

"""timm knows the plugin without an import, and no fault of ours breaks torch or timm."""

import subprocess
import sys
from pathlib import Path

import pytest

import timm_npu_irv2

PACKAGES = Path(timm_npu_irv2.__file__).parents[1]
KNOWS = "assert timm.list_models('*npu*') == ['inception_resnet_v2_npu'], timm.list_models('*npu*')"


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, with the package under test and the installed entry point."""
    return subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=False, cwd='/',
        env={'PATH': '/usr/bin:/bin', 'PYTHONDONTWRITEBYTECODE': '1', 'PYTHONPATH': str(PACKAGES), **environment},
    )


def test_it_is_the_package_that_is_tested():
    assert run('import timm_npu_irv2; print(timm_npu_irv2.__file__)').stdout.strip() == timm_npu_irv2.__file__


@pytest.mark.parametrize('imports', [
    'import timm', 'import torch, timm', 'import timm.models, timm', 'import timm; import timm_npu_irv2',
    'import timm_npu_irv2.model, timm', 'import timm_npu_irv2.optim, timm',
])
def test_no_import_is_needed(imports):
    done = run(f'{imports}\n{KNOWS}')
    assert done.returncode == 0 and done.stderr == '', done.stderr


def test_import_torch_stays_light():
    code = ("import sys, torch\n"
            "print(*sorted(m for m in sys.modules if m.startswith(('timm.', 'timm_npu_irv2.', 'torchvision.'))))")
    assert run(code).stdout.split() == ['timm_npu_irv2.autoload', 'timm_npu_irv2.errors']


@pytest.mark.parametrize('imports', ['import timm_npu_irv2, timm', 'import timm, timm_npu_irv2'])
def test_with_autoload_off_the_import_does_it(imports):
    assert run(f'import timm\n{KNOWS}', TORCH_DEVICE_BACKEND_AUTOLOAD='0').returncode == 1
    done = run(f'{imports}\n{KNOWS}', TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    assert done.returncode == 0 and done.stderr == '', done.stderr


def test_a_broken_plugin_breaks_nothing():
    # A module of ours that raises while it is imported: timm goes on without us and says so.
    code = ("import sys; sys.modules['timm_npu_irv2.weights'] = None\n"
            "import torch, timm\n"
            "assert timm.list_models('inception_resnet_v2') and not timm.list_models('*npu*')")
    done = run(code)
    assert done.returncode == 0 and 'could not register' in done.stderr


def test_the_awaited_module_is_found_by_its_own_loader():
    code = ("import timm.models, sys, importlib\n"
            "assert type(timm.models.__spec__.loader).__name__ == 'SourceFileLoader'\n"
            "assert not [f for f in sys.meta_path if 'timm_npu_irv2' in type(f).__module__]\n"
            "importlib.reload(timm.models)")
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_optimizers_are_registered_with_timm():
    done = run("import timm.optim\nassert 'npufusedsgd' in timm.optim.list_optimizers('npufused*')")
    assert done.returncode == 0, done.stderr

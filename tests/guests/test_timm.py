"""timm's own tests and scripts, run with this network.

They are not part of timm's wheel. TIMM_SOURCE names a folder that has them: an unpacked source distribution
(``pip download --no-deps --no-binary timm timm==VERSION``) or a clone of timm's repository, which has train.py, too.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ..conftest import ROOT

SOURCE = Path(os.environ.get('TIMM_SOURCE', Path(sys.prefix) / 'timm-source'))

pytestmark = pytest.mark.long


def run(folder: Path, *arguments: str) -> str:
    """Run Python in a folder; return what it printed."""
    # timm's tests are a package of the same name as ours, so the plugin is found by its own folder.
    path = os.pathsep.join(filter(None, [str(ROOT), str(Path(__file__).parent), os.environ.get('PYTHONPATH')]))
    env = {**os.environ, 'PYTHONPATH': path, 'TORCH_DEVICE': 'cpu', 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize('file, chosen, at_least', [
    ('test_models.py', 'inception_resnet_v2_npu and not pretrained', 12),  # pretrained: with a download
    ('test_optim.py', 'npufused', 100),
])
def test_timms_tests_pass(tmp_path, file, chosen, at_least):
    if not (SOURCE / 'tests' / file).exists():
        pytest.skip("timm's tests are not here: see TIMM_SOURCE")
    shutil.copytree(SOURCE / 'tests', tmp_path / 'tests')  # without timm's configuration of pytest
    plugin = ['-p', 'only_these'] if 'models' in file else []
    told = run(tmp_path, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-W', 'ignore', '--rootdir', '.', *plugin,
               str(tmp_path / 'tests' / file), '-k', chosen)
    assert int(re.search(r'(\d+) passed', told)[1]) >= at_least, told[-2000:]


def test_timms_train_script_scripts_it(tmp_path):
    if not (SOURCE / 'train.py').exists():
        pytest.skip("timm's train.py is not here: see TIMM_SOURCE")
    generator = np.random.default_rng(0)
    for split in ('train', 'validation'):
        for label in 'ab':
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for index in range(4):
                Image.fromarray(generator.integers(0, 256, (110, 110, 3), dtype='uint8')).save(folder / f'{index}.png')
    told = run(SOURCE, 'train.py', '--data-dir', str(tmp_path), '--model', 'inception_resnet_v2_npu', '--torchscript',
               '--num-classes', '2', '--img-size', '107', '-b', '4', '--epochs', '2', '--device', 'cpu', '-j', '0',
               '--no-prefetcher', '--output', str(tmp_path / 'output'), '--experiment', 'run', '--lr', '0.001')
    assert 'Best metric' in told
    assert (tmp_path / 'output' / 'run' / 'last.pth.tar').exists()

"""The wheel and the source distribution: what people have who install without a clone."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from setuptools import find_packages

from tests.pictures import write_pictures

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def distributions(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution of a clone."""
    folder = tmp_path_factory.mktemp('distributions')
    clone = folder / 'clone'
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True,
                            check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder, clone)
    return folder


@pytest.fixture(scope='module')
def installed(distributions, tmp_path_factory) -> dict[str, str]:
    """The environment of processes that find the installed wheel, and no clone."""
    target = tmp_path_factory.mktemp('installed')
    run(sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', target, wheel_in(distributions))
    return {**os.environ, 'PYTHONPATH': str(target), 'PATH': f'{target / "bin"}:{os.environ["PATH"]}'}


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **kwargs)
    assert process.returncode == 0, process.stdout + process.stderr
    return process


def wheel_in(folder: Path) -> Path:
    return next(folder.glob('*.whl'))


def test_every_package_is_in_the_wheel():
    declared = re.search(r'packages = \[(.*?)\]', (ROOT / 'pyproject.toml').read_text(), re.DOTALL)[1]
    expected = {*find_packages(ROOT, include=['timm_npu_irv2*']), 'timm_npu_irv2.train_scripts'}
    assert set(re.findall(r"'([^']+)'", declared)) == expected


def test_the_wheel_has_the_scripts_and_the_source_distribution_all_files(distributions):
    with zipfile.ZipFile(wheel_in(distributions)) as wheel:
        names = set(wheel.namelist())
    scripts = {path.relative_to(ROOT / 'train_scripts').as_posix() for path in (ROOT / 'train_scripts').rglob('*')
               if path.is_file() and '__pycache__' not in path.parts}
    assert {f'timm_npu_irv2/train_scripts/{name}' for name in scripts} <= names
    with tarfile.open(next(distributions.glob('*.tar.gz'))) as archive:
        packed = {name.partition('/')[2] for name in archive.getnames()}
    clone = distributions / 'clone'
    missing = {path.relative_to(clone).as_posix() for path in clone.rglob('*') if path.is_file()} - packed
    assert {name for name in missing if 'egg-info' not in name and name != '.gitignore'} == set()


def test_the_index_would_take_both(distributions):
    run(sys.executable, '-m', 'twine', 'check', '--strict', *distributions.glob('timm*'))
    run(Path(sys.executable).with_name('check-wheel-contents'), wheel_in(distributions))


def test_the_console_command_trains_validates_and_exports_without_a_clone(installed, tmp_path):
    write_pictures(tmp_path / 'images')
    options = ['--device', 'cpu', '--img-size', '75', '-b', '4', '-j', '0', '--num-classes', '3']
    run('timm-npu-irv2', 'train', '--data-dir', tmp_path / 'images', *options, '--epochs', '2', '--output', tmp_path,
        '--experiment', 'run', '--warmup-epochs', '0', env=installed, cwd=tmp_path)
    weights = tmp_path / 'run' / 'last.pth.tar'
    run('timm-npu-irv2', 'validate', '--data-dir', tmp_path / 'images', *options, '--checkpoint', weights,
        env=installed, cwd=tmp_path)
    run('timm-npu-irv2', 'hub', 'export', weights, tmp_path / 'model', env=installed, cwd=tmp_path)
    assert (tmp_path / 'model' / 'model.safetensors').is_file()


@pytest.mark.parametrize('words, code, text', [
    (['--version'], 0, '0.1.0'), (['--help'], 0, 'export-onnx'), ([], 2, 'usage'),
    (['trian'], 2, "unknown command 'trian'"), (['launch'], 2, 'usage: dist_train_npu.sh N'),
    (['train', '--lr', 'x'], 2, '--lr'), (['weights', '--help'], 0, 'dialect')])
def test_the_console_command_answers_in_a_line(installed, tmp_path, words, code, text):
    process = subprocess.run(['timm-npu-irv2', *words], capture_output=True, text=True, env=installed, cwd=tmp_path,
                             check=False)
    assert process.returncode == code
    assert text in process.stdout + process.stderr
    assert 'Traceback' not in process.stderr

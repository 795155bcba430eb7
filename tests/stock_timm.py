"""An environment with everything that is installed here but this package, as people have it who only have timm."""

import os
import subprocess
import sys
from pathlib import Path

import timm


def run_without_plugin(code: str, *args: object, folder: Path, cwd: Path) -> subprocess.CompletedProcess:
    """Run Python code in a process that cannot import the plugin, unless it lies in ``cwd``.

    Args:
        code: The code.
        args: Its ``sys.argv[1:]``.
        folder: An empty folder for links to the installed packages.
        cwd: The process's working directory, which is on Python's path.
    """
    for entry in Path(timm.__file__).parents[1].iterdir():
        if 'timm_npu_irv2' not in entry.name:  # the package, its metadata, and what makes it importable in place
            (folder / entry.name).symlink_to(entry)
    env = {**os.environ, 'PYTHONPATH': str(folder), 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, '-S', '-c', code, *map(str, args)], capture_output=True, text=True,
                          check=False, env=env, cwd=cwd)

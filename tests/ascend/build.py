"""Builds the stand-in for CANN's shared libraries: `python tests/ascend/build.py OUT_DIR`.

Compiles against the headers of the torch_npu and torch that belong to the Python that runs this script, and puts
libascendcl.so, libopapi.so, libhccl.so and four empty libraries into OUT_DIR. Nothing is done when OUT_DIR already
holds what these sources, headers and compiler make; an interrupted build leaves OUT_DIR as it was.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
LIBRARIES = {
    'libascendcl.so': ('standin', 'runtime', 'refusals'),
    'libopapi.so': ('operators', 'operators_elementwise', 'operators_shape', 'operators_network', 'operators_foreach'),
    'libhccl.so': ('collectives',),
}
# torch_npu links against these; everything it calls in them is in libascendcl.so.
EMPTY_LIBRARIES = ('libacl_op_compiler.so', 'libge_runner.so', 'libgraph.so', 'libacl_tdt_channel.so')
# torch_npu looks the functions of a group of transfers up in this one.
HCCL_ALIAS = 'libhcomm.so'
FLAGS = ('-std=c++20', '-fPIC', '-Wall', '-Wextra')
# An operator's time is that of ATen's kernel, which is compiled already; -O0 halves the time of the build.
OPERATOR_FLAGS = ('-O0',)
OTHER_FLAGS = ('-O2',)
STAMP = 'built_from'


class BuildError(Exception):
    """Something is missing or does not compile; the message is one line for the user."""


def package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it (torch_npu cannot be imported yet)."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(f'{name} is not installed for {sys.executable}')
    return Path(next(iter(spec.submodule_search_locations)))


def compiler() -> str:
    found = shutil.which(os.environ.get('CXX', 'g++'))
    if found is None:
        raise BuildError(f'no C++ compiler: {os.environ.get("CXX", "g++")} is not on PATH (g++ 11 or newer is needed)')
    return found


def run(command: list[str]) -> None:
    """Runs a compiler and raises with its first error line."""
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.stderr:
        sys.stderr.write(result.stderr)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if 'error' in line]
        raise BuildError(f'{" ".join(command[:1] + command[-3:])} failed: {lines[0] if lines else result.returncode}')


def fingerprint(cxx: str) -> str:
    """Changes whenever the result of a build could."""
    digest = hashlib.sha256()
    version = subprocess.run([cxx, '--version'], check=True, capture_output=True, text=True).stdout.splitlines()[0]
    packages = [f'{name} {importlib.metadata.version(name)} {package_folder(name)}' for name in ('torch', 'torch_npu')]
    digest.update('\n'.join([version, *FLAGS, *OPERATOR_FLAGS, *OTHER_FLAGS, *packages]).encode())
    for path in sorted([*SOURCES.glob('*.cpp'), *SOURCES.glob('*.h'), Path(__file__)]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def include_flags() -> list[str]:
    torch, torch_npu = package_folder('torch'), package_folder('torch_npu')
    folders = (torch / 'include', torch_npu / 'include' / 'third_party' / 'acl' / 'inc', torch_npu / 'include')
    return [flag for folder in folders for flag in ('-isystem', str(folder))]


def compile_all(cxx: str, work: Path) -> None:
    """Compiles every source into `work`, two at a time, the operators on one precompiled header."""
    flags = [*FLAGS, *include_flags()]
    header = work / 'precompiled.h'
    header.write_text(f'#include "{SOURCES / "operators.h"}"\n')

    def compile_source(name: str) -> None:
        own = [*OPERATOR_FLAGS, '-include', str(header)] if name.startswith('operators') else OTHER_FLAGS
        run([cxx, *flags, *own, '-c', str(SOURCES / f'{name}.cpp'), '-o', str(work / f'{name}.o')])

    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        precompile = [cxx, *flags, *OPERATOR_FLAGS, '-x', 'c++-header', str(header), '-o', f'{header}.gch']
        pending = [pool.submit(run, precompile)]
        names = [name for sources in LIBRARIES.values() for name in sources]
        pending += [pool.submit(compile_source, name) for name in names if not name.startswith('operators')]
        pending[0].result()
        pending += [pool.submit(compile_source, name) for name in names if name.startswith('operators')]
        for each in pending:
            each.result()


def link_all(cxx: str, work: Path, target: Path) -> None:
    torch = package_folder('torch') / 'lib'

    def link(library: str, objects: tuple[str, ...], *dependencies: str) -> None:
        inputs = [str(work / f'{name}.o') for name in objects]
        run([cxx, '-shared', '-o', str(target / library), *inputs, f'-L{target}', '-Wl,--no-as-needed', *dependencies])

    link('libascendcl.so', LIBRARIES['libascendcl.so'])
    link('libopapi.so', LIBRARIES['libopapi.so'], '-lascendcl', f'-L{torch}', '-ltorch_cpu', '-lc10')
    link('libhccl.so', LIBRARIES['libhccl.so'], '-lascendcl')
    for library in EMPTY_LIBRARIES:
        link(library, (), '-lascendcl')
    link(HCCL_ALIAS, (), '-lhccl', '-lascendcl')


def build(out_dir: Path) -> Path:
    """Makes OUT_DIR hold the libraries and returns it. Raises BuildError."""
    cxx = compiler()
    wanted = fingerprint(cxx)
    stamp = out_dir / STAMP
    if stamp.is_file() and stamp.read_text() == wanted:
        return out_dir
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f'.{out_dir.name}.') as folder:
        work, target = Path(folder), Path(folder) / 'libraries'
        target.mkdir()
        compile_all(cxx, work)
        link_all(cxx, work, target)
        (target / STAMP).write_text(wanted)
        if out_dir.exists():
            out_dir.rename(work / 'old')
        target.rename(out_dir)
    return out_dir


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out_dir', type=Path, help='folder for the libraries; made if missing')
    try:
        print(build(parser.parse_args().out_dir.resolve()))
    except BuildError as error:
        print(f'build.py: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())

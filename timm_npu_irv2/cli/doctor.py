"""A diagnosis of this machine: which software and devices there are, whether they fit, and what to do if they do not.

    timm-npu-irv2 doctor [--json]

Nothing here imports torch: a torch_npu of the wrong version breaks ``import torch`` itself, which is what most people
come here for. Torch is tried in processes of its own.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..chips import find_generation, load_facts
from ..program import run_script
from .arguments import Parser

__all__ = ['Finding', 'diagnose', 'main']

SIGNS = {'ok': '✓', 'info': '·', 'warning': '!', 'problem': '✗'}
PACKAGES = ('torch', 'torchvision', 'timm', 'huggingface_hub', 'safetensors')
_SURVEY = 'import json; from timm_npu_irv2 import device; print(json.dumps(device.survey()))'


@dataclass(frozen=True)
class Finding:
    """A fact about this machine.

    Attributes:
        name: Subject, such as 'torch'.
        status: 'ok', 'info', 'warning' (works, but slower or fragile) or 'problem' (does not work).
        value: The fact as found.
        meaning: Consequence of it; empty for a plain fact.
        remedy: Step that mends it; empty if nothing needs mending.
    """

    name: str
    status: str
    value: str
    meaning: str = ''
    remedy: str = ''


def diagnose(environ: Mapping[str, str] = os.environ, root: Path = Path('/')) -> list[Finding]:
    """Return the findings about this machine, software first.

    Args:
        environ: Environment variables.
        root: Root of the file system in which CANN and its driver are looked for.
    """
    facts = load_facts()
    package = facts['compatibility']['package']
    installed = {name: _version(name) for name in (*PACKAGES, package)}
    cann = _cann_version(environ, root)
    findings = [Finding('Python', 'ok', platform.python_version()), *_packages(installed, package)]
    findings += _cann(cann, environ, root, wanted=installed[package] is not None)
    torch, vendors = installed['torch'], installed[package]
    if torch and vendors:
        findings += _pair(facts['compatibility'], torch, vendors, cann)
    devices, torch_findings = _torch(environ, package if vendors else None)
    findings += torch_findings
    for accelerators in devices.values():
        findings += _chips(facts, [each['name'] for each in accelerators], [each['memory'] for each in accelerators])
    findings += _variables(environ, len(devices.get('npu', ())))
    if devices.get('npu'):
        findings += _network(facts['collectives'], environ)
    return [*findings, *_host(environ)]


# Software


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages(installed: Mapping[str, str | None], vendors: str) -> Iterator[Finding]:
    for name, version in installed.items():
        if version is not None:
            yield Finding(name, 'ok', version)
        elif name == vendors:
            yield Finding(name, 'info', 'not installed', 'NPUs cannot be used', "pip install 'timm-npu-irv2[npu]'")
        else:
            yield Finding(name, 'problem', 'not installed', 'this package needs it', f'pip install {name}')


def _toolkits(environ: Mapping[str, str], root: Path) -> list[Path]:
    """Return the folders in which CANN is installed, the newest layout first."""
    home = Path('/', environ.get('HOME') or 'root').relative_to('/')
    bases = (root / 'usr/local/Ascend', root / home / 'Ascend')
    places = [base / name for base in bases for name in ('cann', 'ascend-toolkit')]
    if environ.get('ASCEND_TOOLKIT_HOME'):
        places.insert(0, Path(environ['ASCEND_TOOLKIT_HOME']))
    return [place for place in places if os.path.isdir(place)]  # noqa: PTH112 - Path.is_dir raises where it may not look


def _cann_version(environ: Mapping[str, str], root: Path) -> str | None:
    for folder in _toolkits(environ, root):
        for path in sorted(folder.rglob('ascend_*_install.info')):
            if match := re.search(r'^version=(\S+)', path.read_text(errors='replace'), re.MULTILINE):
                return match[1]
    return None


def _cann(version: str | None, environ: Mapping[str, str], root: Path, wanted: bool) -> Iterator[Finding]:
    folders = _toolkits(environ, root)
    if not folders:
        yield Finding('CANN', 'problem' if wanted else 'info', 'not found', 'NPUs cannot be used',
                      'install the CANN toolkit and the kernels of your chip')
        return
    value = f'{version or "version unknown"} in {folders[0]}'
    if 'ASCEND_OPP_PATH' in environ:
        yield Finding('CANN', 'ok', value)
    else:
        yield Finding('CANN', 'problem', f'{value}, not loaded', 'its libraries will not be found',
                      f'source {folders[0]}/set_env.sh (the launchers do it by themselves)')
    driver = root / 'usr/local/Ascend/driver/version.info'
    found = re.search(r'^Version=(\S+)', driver.read_text(errors='replace'), re.MULTILINE) if driver.is_file() else None
    if found:
        yield Finding('driver', 'ok', found[1])
    else:
        yield Finding('driver', 'warning', 'not found', 'a container needs /usr/local/Ascend/driver from its host',
                      'mount it, and the devices /dev/davinci*')


def _release(version: str) -> str:
    """Return 'X.Y.Z' of a version such as '2.9.0.post2' or '2.9.0+cpu'."""
    return '.'.join(re.findall(r'\d+', version)[:3])


def _pair(table: Mapping[str, Any], torch: str, vendors: str, cann: str | None) -> Iterator[Finding]:
    """Yield the findings about the versions of torch, the vendor's package and CANN, which must fit each other."""
    name, source = f'torch and {table["package"]}', f'{table["source"]} of {table["date"]}'
    if _release(torch) != _release(vendors):
        yield Finding(name, 'problem', f'{torch} and {vendors}', 'they must be of the same version',
                      f'pip install torch=={_release(vendors)}')
    else:
        yield Finding(name, 'ok', f'both {_release(torch)}')
    rows = table['torch_for_cann']
    if cann is None:
        return
    match = next((row for row in rows if row.lower() == cann.lower()), None)
    if match is None:
        yield Finding('CANN and torch', 'info', f'CANN {cann} has no row', f'known: {", ".join(rows)} ({source})')
    elif _release(vendors) in rows[match]:
        yield Finding('CANN and torch', 'ok', f'CANN {cann} fits {_release(vendors)} ({source})')
    else:
        yield Finding('CANN and torch', 'problem', f'CANN {cann} does not fit {table["package"]} {vendors}',
                      f'it fits {", ".join(rows[match])} ({source})',
                      f'pip install torch=={rows[match][0]} {table["package"]}=={rows[match][0]}.*')


def _torch(environ: Mapping[str, str], vendors: str | None) -> tuple[dict[str, list[dict[str, Any]]], list[Finding]]:
    """Return the accelerators that torch sees, by kind, and what importing it shows."""
    whole = _run(_SURVEY, environ)
    if whole.returncode == 0:
        return json.loads(whole.stdout.splitlines()[-1]), [Finding('import torch', 'ok', 'works'), _timm(environ)]
    reason = _reason(whole)
    alone = _run('import torch', {**environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'})
    if alone.returncode == 0 and vendors:
        return {}, [Finding('import torch', 'problem', reason, f'torch itself works; {vendors} does not load',
                            "load CANN's set_env.sh and check the versions above; until then "
                            'TORCH_DEVICE_BACKEND_AUTOLOAD=0 gives torch without NPUs')]
    return {}, [Finding('import torch', 'problem', reason, 'torch does not load', 'install torch again')]


def _timm(environ: Mapping[str, str]) -> Finding:
    """Return what importing timm shows, which imports torchvision."""
    process = _run('import timm', environ)
    if process.returncode == 0:
        return Finding('import timm', 'ok', 'works')
    if 'torchvision' in process.stderr:
        return Finding('import timm', 'problem', _reason(process), 'torchvision does not fit this build of torch',
                       'install torch and torchvision together, from the same index')
    return Finding('import timm', 'problem', _reason(process), 'timm does not load',
                   'pip install --force-reinstall timm')


def _reason(process: subprocess.CompletedProcess[str]) -> str:
    """Return the cause of a failure: the first error of a chain; those after it say that something failed."""
    errors = re.findall(r'^\w*Error: .+', process.stderr, re.MULTILINE) or process.stderr.strip().splitlines()[-1:]
    return errors[0] if errors else 'it ends without a message'


def _run(code: str, environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, '-c', code], env=dict(environ), capture_output=True, text=True, check=False)


# Devices


def _chips(facts: Mapping[str, Any], names: Sequence[str], memory: Sequence[int]) -> Iterator[Finding]:
    """Yield the devices of one kind, and the operators of the network that their generation lacks."""
    for name in dict.fromkeys(names):
        size = max(each for each, of in zip(memory, names, strict=True) if of == name) / 2 ** 30
        yield Finding('device', 'ok', f'{names.count(name)} × {name}, {size:.0f} GiB each')
        generation = find_generation(name)
        if generation is None:
            continue
        half = 'float16 and bfloat16' if facts['generations'][generation]['bfloat16'] else 'float16, no bfloat16'
        yield Finding('chip', 'info', f'generation {generation}: {half}')
        for operator, meaning in facts['operators']['missing'][generation].items():
            yield Finding('operator', 'warning', f'{operator} does not exist on {generation}', meaning)


def _variables(environ: Mapping[str, str], npus: int) -> Iterator[Finding]:
    """Yield environment variables that are known to cause trouble."""
    visible = environ.get('ASCEND_RT_VISIBLE_DEVICES', '')
    numbers = [int(part) for part in visible.split(',') if part.strip().isdecimal()]
    if numbers != sorted(set(numbers)):
        yield Finding('ASCEND_RT_VISIBLE_DEVICES', 'problem', visible, 'CANN takes ascending numbers only',
                      f'export ASCEND_RT_VISIBLE_DEVICES={",".join(map(str, sorted(set(numbers))))}')
    if npus and 'PYTORCH_ALLOC_CONF' in environ and 'PYTORCH_NPU_ALLOC_CONF' in environ:
        yield Finding('PYTORCH_ALLOC_CONF', 'problem', 'set beside PYTORCH_NPU_ALLOC_CONF',
                      'from TorchNPU 26.2 on the process aborts', 'unset one of them')


def _network(collectives: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[Finding]:
    """Yield the findings about the ports and the interface through which several devices communicate."""
    base = environ.get('HCCL_IF_BASE_PORT', '')
    count = collectives['last_port'] - collectives['first_port'] + 1
    first = int(base) if base.isdecimal() else collectives['first_port']
    if base and (not base.isdecimal() or first + count > 65536):
        yield Finding('HCCL_IF_BASE_PORT', 'problem', base, f'it is not the first of {count} ports',
                      f'export HCCL_IF_BASE_PORT={collectives["first_port"]}')
    elif taken := [port for port in range(first, first + count) if not _is_free(port)]:
        yield Finding('ports', 'warning', f'{len(taken)} of {first}–{first + count - 1} are in use',
                      f'a second job on this machine fails with {collectives["error"]}',
                      f'export HCCL_IF_BASE_PORT={first + 2 * count}')
    else:
        yield Finding('ports', 'ok', f'{first}–{first + count - 1} are free')
    interfaces = [name for _, name in socket.if_nameindex()]
    for variable in ('HCCL_SOCKET_IFNAME', 'GLOO_SOCKET_IFNAME'):
        wanted = environ.get(variable)
        if wanted and not any(name.startswith(wanted.lstrip('=')) for name in interfaces):
            yield Finding(variable, 'problem', wanted, f'there is no such interface: {", ".join(interfaces)}',
                          f'export {variable}=NAME of one of them')


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(('127.0.0.1', port)) != 0


# Host


def _host(environ: Mapping[str, str]) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    threads = environ.get('OMP_NUM_THREADS')
    yield Finding('CPU', 'ok', f'{cores} core(s), OMP_NUM_THREADS={threads or "unset"}')
    if threads and threads.isdecimal() and int(threads) > cores:
        yield Finding('OMP_NUM_THREADS', 'warning', threads, f'more threads than {cores} core(s) slow each other down',
                      'unset OMP_NUM_THREADS')
    pages, size = os.sysconf('SC_PHYS_PAGES'), os.sysconf('SC_PAGE_SIZE')
    yield Finding('memory', 'ok', f'{pages * size / 2 ** 30:.0f} GiB')
    shared = Path('/dev/shm')
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / 2 ** 30
        if free < 1:
            yield Finding('shared memory', 'warning', f'{free:.2f} GiB free in {shared}',
                          'processes that load images pass batches through it and fail when it is full',
                          'docker run --shm-size 16g, or fewer --workers')
        else:
            yield Finding('shared memory', 'ok', f'{free:.1f} GiB free')


def main(argv: Sequence[str] | None = None) -> int:
    """Print the diagnosis; return 1 if it names a problem."""
    parser = Parser(prog='timm-npu-irv2 doctor', description='Diagnose this machine.')
    parser.add_argument('--json', action='store_true', help='print the findings as JSON')
    return run_script(parser.prog, lambda words: _print_findings(as_json=parser.parse_args(words).json),
                      sys.argv[1:] if argv is None else argv)


def _print_findings(as_json: bool) -> int:
    findings = diagnose()
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            print(f'{SIGNS[finding.status]} {finding.name:<{width}}  {finding.value}')
            for label, text in (('', finding.meaning), ('→ ', finding.remedy)):
                if text:
                    print(f'  {"":<{width}}  {label}{text}')
    return int(any(finding.status == 'problem' for finding in findings))


if __name__ == '__main__':
    sys.exit(main())

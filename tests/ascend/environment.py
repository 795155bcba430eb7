"""The environment of a process that runs torch_npu on the stand-in.

As a script it runs a command there: `python tests/ascend/environment.py LIBRARIES [--devices N …] -- COMMAND …`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

SITE = Path(__file__).resolve().parent / 'site'
GIBIBYTE = 1 << 30
LIBRARIES = 'ASCEND_STANDIN_LIBRARIES'  # tells a process which stand-in it runs on, so that it can start others


def running_on() -> Path | None:
    """The stand-in's libraries that this process runs on, or None."""
    return Path(os.environ[LIBRARIES]) if LIBRARIES in os.environ else None


def only_here() -> None:
    """Called at the top of a test module: skips it in a process that does not run on the stand-in."""
    import pytest  # noqa: PLC0415 - the rest of this file needs nothing

    if running_on() is None:
        pytest.skip('runs on the stand-in for CANN: see tests/ascend/README.md', allow_module_level=True)


def environment(
        libraries: Path,
        *,
        devices: int = 8,
        memory: int = 64 * GIBIBYTE,
        chip: str = 'Ascend910B3',
        operator_log: Path | str | None = None,
        trace: Path | str | None = None,
        fault: tuple[str, float] | None = None,
        run_operators: bool = True,
        base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The variables with which a new Python process finds the stand-in when it imports torch.

    They must be set before the process starts: the dynamic loader reads LD_LIBRARY_PATH only then.

    Args:
        libraries: The folder that build.py made.
        devices: How many devices there are (1 to 64).
        memory: The memory of each of them, in bytes.
        chip: The chip's name, as ``torch.npu.get_device_name()`` reports it.
        operator_log: A file that gets a line for each operator; ``%r`` in its name stands for $RANK.
        trace: A file that gets a line for each synchronisation, copy and collective; ``%r`` as above.
        fault: (operator, factor): the results of e.g. 'aclnnMul' are multiplied by the factor.
        run_operators: False runs only operators on mere scalars: what remains is the host's own time.
        base: The variables to start from; None means those of this process.
    """
    variables = dict(os.environ if base is None else base)
    variables.pop('TORCH_DEVICE_BACKEND_AUTOLOAD', None)  # 0 would keep torch from loading torch_npu
    for name, folder in ('LD_LIBRARY_PATH', Path(libraries).resolve()), ('PYTHONPATH', SITE):
        others = [part for part in variables.get(name, '').split(os.pathsep) if part and part != str(folder)]
        variables[name] = os.pathsep.join([str(folder), *others])
    switches = {
        'LIBRARIES': Path(libraries).resolve(),
        'DEVICES': devices,
        'MEMORY': memory,
        'CHIP': chip,
        'OPLOG': operator_log,
        'TRACE': trace,
        'FAULT': fault and f'{fault[0]}:{fault[1]!r}',
        'NOOP': None if run_operators else 1,
    }
    for name, value in switches.items():
        variables.pop(f'ASCEND_STANDIN_{name}', None)
        if value is not None:
            variables[f'ASCEND_STANDIN_{name}'] = str(value)
    return variables


def main() -> None:
    words = sys.argv[1:]
    own, command = (words[: words.index('--')], words[words.index('--') + 1 :]) if '--' in words else (words, [])
    parser = argparse.ArgumentParser(description='Runs a command on the stand-in.', usage='%(prog)s … -- COMMAND …')
    parser.add_argument('libraries', type=Path, help='the folder that build.py made')
    parser.add_argument('--devices', type=int, default=8)
    parser.add_argument('--memory', type=int, default=64 * GIBIBYTE, help='bytes of each device')
    parser.add_argument('--chip', default='Ascend910B3')
    parser.add_argument('--operator-log', help='a file; %%r in its name stands for $RANK')
    parser.add_argument('--trace', help='a file; %%r in its name stands for $RANK')
    parser.add_argument('--skip-operators', dest='run_operators', action='store_false', help='measure the host alone')
    options = vars(parser.parse_args(own))
    if not command:
        parser.error('no command after --')
    if not (options['libraries'] / 'libascendcl.so').is_file():
        parser.error(f'{options["libraries"]} holds no libraries: python tests/ascend/build.py {options["libraries"]}')
    os.execvpe(command[0], command, environment(**options))


if __name__ == '__main__':
    main()

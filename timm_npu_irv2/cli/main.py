"""The console command: each subcommand runs a script, a launcher or a module of this package.

    timm-npu-irv2 train --data-dir DIR [options]        # python train_scripts/train.py …
    timm-npu-irv2 launch 8 --data-dir DIR [options]     # bash train_scripts/dist_train_npu.sh 8 …
"""

import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..program import run_script

__all__ = ['COMMANDS', 'Command', 'main', 'scripts_dir']

PROGRAM = 'timm-npu-irv2'


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        target: File in train_scripts/ (.py or .sh), or a module.
        help: One line for ``--help``.
        arguments: Words that come before the user's.
    """

    target: str
    help: str
    arguments: tuple[str, ...] = ()


COMMANDS = {
    'train': Command('train.py', 'train on one device'),
    'launch': Command('dist_train_npu.sh', 'train on N devices: launch N --data-dir DIR'),
    'validate': Command('validate.py', 'measure the accuracy of a checkpoint'),
    'infer': Command('inference.py', 'classify images'),
    'export-onnx': Command('onnx_export.py', 'write a checkpoint as an ONNX file'),
    'quantize': Command('onnx_quantize.py', 'turn an ONNX file into int8'),
    'benchmark': Command('benchmark.py', 'measure the network beside its peers'),
    'tune': Command('benchmark.py', 'find the fastest settings on this device, for the other commands', ('tune',)),
    'shards': Command('make_shards.py', 'make WebDataset shards of images: shards DIR OUT'),
    'hub': Command('timm_npu_irv2.hub', 'publish and download models on the Hugging Face Hub'),
    'doctor': Command('timm_npu_irv2.cli.doctor', 'diagnose this machine: versions, devices, what does not fit'),
    'weights': Command('timm_npu_irv2.cli.weights', 'translate weights between dialects'),
}


def scripts_dir() -> Path:
    """Return the folder of the scripts: inside the installed package, or beside it in a clone.

    Raises:
        UserError: Neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / 'train_scripts', package.parent / 'train_scripts'):
        if (folder / 'train.py').is_file():
            return folder
    raise UserError(f'the scripts are missing beside {package}: install the package again.')


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code: 2 for one that does not exist."""
    if '_ARGCOMPLETE' in os.environ:  # the shell asks for completions
        from .completion import complete  # noqa: PLC0415 - the tables of options take a moment

        complete({name: (command.target, command.arguments) for name, command in COMMANDS.items()})
    return run_script(PROGRAM, _dispatch, list(sys.argv[1:] if argv is None else argv))


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ('-h', '--help'):
        print(_help())
        return 0 if words else 2
    if words[0] == '--version':
        print(f'{PROGRAM} {sys.modules[__name__.partition(".")[0]].__version__}')
        return 0
    if words[0] not in COMMANDS:
        raise UserError(f"unknown command '{words[0]}': use one of {', '.join(COMMANDS)}.")
    return _run(COMMANDS[words[0]], words[1:])


def _run(command: Command, words: Sequence[str]) -> int:
    """Run the command's target in this process, as ``python`` would."""
    arguments = [*command.arguments, *words]
    if not command.target.endswith(('.py', '.sh')):
        _check_options(command.target, arguments)
        sys.argv = [command.target, *arguments]
        runpy.run_module(command.target, run_name='__main__', alter_sys=True)
        return 0
    script = scripts_dir() / command.target
    if script.suffix == '.sh':
        os.environ.setdefault('PYTHON', sys.executable)
        os.execvp('bash', ['bash', str(script), *arguments])
    # Replacing the process lets the script find its neighbours and start others of its kind by its own path.
    os.execv(sys.executable, [sys.executable, str(script), *arguments])


def _check_options(target: str, arguments: Sequence[str]) -> None:
    """Answer --help and wrong options of a module before it is loaded, which takes seconds."""
    from .command_lines import COMMAND_LINES  # noqa: PLC0415 - the tables of options take a moment
    from .script import check_command_line  # noqa: PLC0415

    if target in COMMAND_LINES:
        check_command_line(COMMAND_LINES[target], arguments)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f'  {name:<{width}}  {command.help}' for name, command in COMMANDS.items()]
    return '\n'.join([
        f'usage: {PROGRAM} COMMAND [options]', '', 'Train, publish and deploy Inception-ResNet-v2.', '', *lines, '',
        f'{PROGRAM} COMMAND --help lists the options of a command; {PROGRAM} --version tells the version.'])

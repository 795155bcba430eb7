"""Completion of the console command in a shell, by argcomplete."""

import argparse

from .flags import TRAIN
from .inference_flags import INFERENCE
from .onnx_flags import ONNX_EXPORT, ONNX_QUANTIZE
from .validate_flags import VALIDATE

__all__ = ['complete']

_COMMAND_LINES = {each.prog: each for each in (TRAIN, VALIDATE, INFERENCE, ONNX_EXPORT, ONNX_QUANTIZE)}
_COMMAND_LINES['dist_train_npu.sh'] = TRAIN


def complete(targets: dict[str, str]) -> None:
    """Answer the shell, which asks through argcomplete's variables, and end the program.

    Args:
        targets: Scripts or modules by the names of their subcommands.
    """
    import argcomplete  # noqa: PLC0415 - an optional dependency; whoever sets its variables has it

    parser = argparse.ArgumentParser()
    parser.add_argument('--version', action='store_true')
    commands = parser.add_subparsers()
    for name, target in targets.items():
        parents = [_COMMAND_LINES[target].parser()] if target in _COMMAND_LINES else []
        commands.add_parser(name, parents=parents, add_help=not parents)
    argcomplete.autocomplete(parser)

"""The tables of options of all subcommands."""

from .benchmark_flags import BENCHMARK
from .flags import TRAIN
from .hub_flags import HUB
from .inference_flags import INFERENCE
from .make_shards_flags import MAKE_SHARDS
from .onnx_flags import ONNX_EXPORT, ONNX_QUANTIZE
from .parser import CommandLine, Subcommands
from .validate_flags import VALIDATE
from .weights_flags import WEIGHTS

__all__ = ['COMMAND_LINES']

# By the target of the subcommand: a script, a launcher or a module. doctor has its own, which needs no other package.
COMMAND_LINES: dict[str, CommandLine | Subcommands] = {
    **{each.prog: each for each in (BENCHMARK, INFERENCE, MAKE_SHARDS, ONNX_EXPORT, ONNX_QUANTIZE, TRAIN, VALIDATE)},
    'dist_train_npu.sh': TRAIN,
    'timm_npu_irv2.hub': HUB,
    'timm_npu_irv2.cli.weights': WEIGHTS,
}

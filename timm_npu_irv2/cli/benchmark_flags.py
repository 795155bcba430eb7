"""The options of benchmark.py as data, and the names of what it compares."""

from pathlib import Path
from typing import Any

from .flags import HALVES
from .parser import CommandLine, Flag, Group, Subcommands

__all__ = ['BENCHMARK', 'CANDIDATES', 'CHIPS', 'CLIENTS', 'ENGINES', 'INT8']

# Candidates of `infer`.
OURS, OURS_COMPILED, OURS_UNFOLDED = 'ours', 'ours-compiled', 'ours-unfolded'  # the last as train.py evaluates it
OURS_TRACED = 'ours-traced'  # on a CPU and on a GPU
TIMM, COMPILED = 'timm', 'timm-compiled'
CHANNELS_LAST, ONNXRUNTIME, OPENVINO = 'timm-channels-last', 'onnxruntime', 'openvino'
ENGINES = {f'ours-{name}': name for name in (ONNXRUNTIME, OPENVINO)}  # this package's network on them
PEERS = (CHANNELS_LAST, COMPILED, ONNXRUNTIME, OPENVINO)
CANDIDATES = (OURS, *ENGINES, OURS_TRACED, OURS_COMPILED, OURS_UNFOLDED, TIMM, *PEERS)
CLIENTS = 16
INT8 = 'int8'

CHIPS = ('910b', '910a', '950')


def _count(names: str, help: str, default: Any, least: int = 1, **rest: Any) -> Flag:
    return Flag(names, help, int, default, f'[{least}, inf)', {'metavar': 'N', **rest})


def _switch(names: str, help: str) -> Flag:
    return Flag(names, help, bool, False)


_AMP = _switch('--amp', 'train in the 16-bit type of the device')
_BATCH_SIZE = _count('-b --batch-size', 'images in a batch', 8)
_TUNED = Flag('--tuned', 'settings of `benchmark.py tune` for this network', default='auto',
              rest={'metavar': 'auto|off|FILE'})
_SHARED = (
    Flag('--device', 'npu, cuda or cpu (default: the best one available)', rest={'metavar': 'NAME'}),
    _count('--img-size', 'height and width of the images', 299, 75),
    Flag('--json', 'JSON file to write all figures to', Path, rest={'metavar': 'FILE'}),
    Flag('--chart', 'file to draw the figures into (.png, .svg or .pdf)', Path, rest={'metavar': 'FILE'}),
)

_STEP = (
    _count('--batch-sizes', 'two batch sizes, to separate bytes per image from bytes per step', [2, 8], nargs=2),
    _count('--memory-batch-sizes', 'two batch sizes for the peak of memory; not on the CPU', [16, 24], nargs=2),
    _switch('--float32', 'train in float32 instead of 16 bits'),
    _switch('--recompute', 'add this network with --recompute cheap'),
    _switch('--zoo', "add the recipe of the model zoo's script; only in 16 bits, and with Ascend's apex"),
    Flag('--variants', 'default: the network as it comes; best: also with the variants that move the fewest bytes on '
         'an NPU by count', default=['default'], rest={'nargs': '+', 'choices': ('default', 'best')}),
    Flag('--chip', 'chip whose kernels are counted, on the stand-in for CANN', default='910b',
         rest={'choices': CHIPS}),
    _count('--host-rounds', 'also time the host, N times alternately; only where operators take no time: on the '
           'stand-in with --skip-operators', 0, 0),
    Flag('--tuned', _TUNED.help, default='off', rest=_TUNED.rest),  # else counts depend on a file that nobody sees
)

_TRAIN = (
    _AMP, _BATCH_SIZE,
    _count('--rounds', 'turns of each network', 7),
    _count('--steps', 'steps in a turn', 3),
    _count('--warmup', 'steps before the first turn', 2, 0),
    _switch('--compiled', 'also measure both networks compiled by Inductor; compiling takes minutes'),
    _TUNED,
)

_INFER = (
    Flag('--dtype', 'dtype of all candidates but `timm`, which stays in float32; int8 is that of our engines, beside '
         'the others in bfloat16', default='float32', rest={'choices': ('float32', 'bfloat16', 'float16', INT8)}),
    _BATCH_SIZE,
    _count('--rounds', 'turns of each candidate', 7),
    _count('--warmup', 'batches before the first turn', 2, 0),
    _count('--latencies', 'single images timed for each candidate', 50),
    Flag('--only', f'measure only these candidates: {", ".join(CANDIDATES)} (default: all installed)',
         rest={'nargs': '+', 'choices': CANDIDATES, 'metavar': 'NAME'}),
    _switch('--predictor', f'also measure Predictor on each engine, with {CLIENTS} threads that send single images'),
    _TUNED,
)

_INPUT = (
    Flag('--data-dir', 'folder or tar of at least 50 photographs, for a stable mean', rest={'metavar': 'DIR'}),
    _count('-b --batch-size', 'images in a batch', 32),
    _count('-j --workers', 'worker processes', 1),
    _count('--images', 'images in a turn; the files repeat', 512),
    _count('--rounds', 'turns of each loader', 5),
)

_OPERATORS = (
    _switch('--amp', 'tensors in the 16-bit type of the device'),
    _BATCH_SIZE,
    _count('--rounds', 'turns of each operator', 30),
    _TUNED,
)

_TUNE = (
    Flag('--task', 'train: forward, backward and step; eval: logits, also by other engines', default='train',
         rest={'choices': ('train', 'eval')}),
    _BATCH_SIZE,
    _switch('--amp', 'mixed precision, as train.py --amp; for eval: 16 bits'),
    Flag('--amp-dtype', "16-bit type (default: the device's)", rest={'choices': HALVES}),
    Flag('--opt-level', 'as train.py --opt-level; implies --amp', rest={'choices': ('O1', 'O2')}),
    _count('--budget', 'seconds after which no further alternative is measured', 540, metavar='SECONDS'),
    _count('--rounds', 'turns of an alternative and of the fastest settings so far', 5),
    Flag('--only', 'measure only these groups of settings', rest={'nargs': '+', 'metavar': 'GROUP'}),
    Flag('--output', "file of the result (default: one in the user's cache folder, where the scripts find it)",
         rest={'metavar': 'FILE'}),
)

_PROFILE = (
    _AMP, _BATCH_SIZE,
    _count('--steps', 'steps to profile', 10),
    Flag('--output', 'folder of the tables', default='profile', rest={'metavar': 'DIR'}),
    _TUNED,
)

_BUSY = (
    _BATCH_SIZE,
    _count('--loops', 'busy loops beside the training', 4),
    _count('--rounds', 'runs of each', 3),
    _count('--steps', 'updates in a run', 8),
)

_GROWTH = (
    _count('--images', 'numbers of listed images', [10**3, 10**4, 10**5, 10**6], nargs='*'),
    _count('--processes', 'numbers of processes', [1, 2, 4, 8], nargs='*'),
    _count('--classes', 'numbers of classes; each number of processes has the first one, and two processes have the '
           'others', [10, 1000, 10000], nargs='+'),
    _count('--steps', 'steps that are measured', 20),
    _count('-b --batch-size', 'images of a process in a batch', 4),
    _count('--rounds', 'turns of each row, of which the fastest counts', 3),
    Flag('--folder', 'folder for the images (default: a temporary one)', Path, rest={'metavar': 'DIR'}),
)

_TABLE = (Flag('reports', 'report.json files of train.py', rest={'nargs': '+', 'metavar': 'REPORT'}),)


def _command(name: str, description: str, flags: tuple[Flag, ...]) -> CommandLine:
    return CommandLine(f'benchmark.py {name}', description, (Group('Measurement', flags), Group('All', _SHARED)),
                       takes_config=False, usage=None)


BENCHMARK = Subcommands('benchmark.py', 'Compare this network with others: cost, speed, memory.', {
    'step': _command('step', 'Count calls, bytes and memory of a training step.', _STEP),
    'train': _command('train', "Measure images/s of training, in turn with timm's network.", _TRAIN),
    'infer': _command('infer', 'Measure images/s, latency and memory of inference, in turn with others.', _INFER),
    'input': _command('input', 'Measure images/s of decoding and augmentation on one core, by stage, beside the '
                      'loaders of timm and torchvision.', _INPUT),
    'ops': _command('ops', 'Measure each fused operator in turn with the plain ones that it stands for.', _OPERATORS),
    'tune': _command('tune', 'Find the fastest settings on this device, for the other scripts.', _TUNE),
    'profile': _command('profile', 'Write the operators of ten training steps and their times as a table.', _PROFILE),
    'busy': _command('busy', 'Measure train.py and the launcher beside busy loops.', _BUSY),
    'growth': _command('growth', 'Measure time and memory by the numbers of listed images, of processes and of '
                       'classes.', _GROWTH),
    'table': _command('table', 'Print rows for the table in docs/model_zoo.md from report.json files.', _TABLE),
})

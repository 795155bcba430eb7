"""train.py and validate.py on an NPU: what they compute is the CPU's, and what a step costs the device.

Runs of one process, here. test_jobs_npu.py has those of several.
"""

import importlib.util
import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ..ascend.environment import only_here

only_here()

import standin_journal  # noqa: E402 - from here on torch_npu is needed
import timm  # noqa: E402
import torch  # noqa: E402
from timm.models import register_model  # noqa: E402

from timm_npu_irv2.cli.script import run_script  # noqa: E402
from timm_npu_irv2.serialization import read_checkpoint  # noqa: E402

from ..ascend.pieces import error, vector  # noqa: E402
from ..pictures import write_pictures  # noqa: E402

SCRIPTS = Path(__file__).parents[2] / 'train_scripts'
COMMON = '--num-classes 3 -j 0 --lr 0.01 --warmup-epochs 0 --log-interval 100'
OURS = f'{COMMON} --img-size 75 -b 2 --epochs 1 --train-batches-per-epoch 2'
SMALL = f'{COMMON} --opt npufusedsgd --model test_resnet --img-size 64 -b 4'
BRIEF = f"{SMALL} --epochs 1 --val-split ''"
FEWER, STEPS = 4, 7  # at least two updates of accumulated gradients: after the first a line of the log is written

pytestmark = pytest.mark.filterwarnings('ignore')


@register_model
def npu_teacher(pretrained=False, device=None, **kwargs):
    """A teacher that needs no download: random weights, the same on every device, whose own random streams differ.

    Its features are as many as the student's, so that no layer with other random weights comes between them.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return timm.create_model('test_resnet', **kwargs).to(device)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f'npu_{name}', SCRIPTS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp('pictures'))


@pytest.fixture(scope='module')
def train(pictures, tmp_path_factory) -> Callable[..., Path]:
    """train(options, device): runs train.py and returns its output folder."""
    script, output = load('train'), tmp_path_factory.mktemp('output')

    def run(options: str, device: str = 'npu') -> Path:
        name = str(len(list(output.iterdir())))
        where = ['--data-dir', str(pictures), '--output', str(output), '--experiment', name, '--device', device]
        assert run_script('train.py', script.main, [*where, *shlex.split(options)]) == 0
        return output / name

    return run


@dataclass
class Cost:
    """What a run asked of the device."""

    operators: Counter[str]
    waits: int  # of the host for the device
    reads: int  # copies to the host
    uploads: Counter[str]  # copies from the host: 'copy' waits, 'copy_async' does not

    @classmethod
    def of(cls, record: standin_journal.Recording) -> 'Cost':
        return cls(record.calls(), record.synchronizations, len(record.copies('D2H')),
                   Counter(event.kind for event in record.copies('H2D')))

    def __sub__(self, other: 'Cost') -> 'Cost':
        for counter, less in ((self.operators, other.operators), (self.uploads, other.uploads)):
            counter.subtract(less)
        return Cost(+self.operators, self.waits - other.waits, self.reads - other.reads, +self.uploads)

    def check(self, waits: int, batches: int = STEPS - FEWER) -> None:
        """An operator without a kernel on the device would copy its arguments to the host."""
        assert (self.waits, self.reads) == (waits * batches, waits * batches)
        assert self.uploads['copy'] == 0  # pinned and not waited for
        assert self.uploads['copy_async'] >= 2 * batches
        assert self.operators and all(name.startswith('aclnn') for name in self.operators)


def weights(folder: Path, name: str = 'last', key: str = 'state_dict') -> torch.Tensor:
    return vector(read_checkpoint(folder / f'{name}.pth.tar')[key].values())


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / 'report.json').read_text())


def train_loss(folder: Path) -> float:
    return figures(folder)['last_epoch']['train_loss']


# ---- a small network: what it learns is what it learns on the CPU, and a step leaves the host alone ------------------

FEATURES = {
    'plain': '',
    'AdamW': '--opt npufusedadamw',
    'Mixup and CutMix': '--mixup 0.5 --cutmix 0.5',
    'moving average': '--model-ema --model-ema-decay 0.5',
    'accumulation, clipping': '--grad-accum-steps 2 --clip-grad 0.1',
    'logit distillation': '--kd-model-name npu_teacher',
    'feature distillation': '--kd-model-name npu_teacher --kd-distill-type feature',
}
LEVELS = {
    'O1 static': ('--amp --opt-level O1 --loss-scale 128', 0),
    'O1 dynamic': ('--amp --opt-level O1', 1),
    'O2 static': ('--amp --opt-level O2 --loss-scale 128', 0),
    'O2 dynamic': ('--amp --opt-level O2 --loss-scale dynamic', 1),
}


@pytest.fixture(scope='module')
def measured(train) -> Callable[[str], tuple[Path, Cost]]:
    """measured(options): the output of a run of STEPS steps, and what its steps after the first FEWER cost."""

    def measure(options: str) -> tuple[Path, Cost]:
        records = []
        for steps in FEWER, STEPS:  # both write a line of the log after the first step and after the last
            with standin_journal.recording() as record:
                folder = train(f'{BRIEF} {options} --train-batches-per-epoch {steps}')
            records.append(Cost.of(record))
        return folder, records[1] - records[0]

    return measure


@pytest.mark.parametrize('name', FEATURES)
def test_a_feature_trains_as_on_the_cpu_and_no_step_waits(train, measured, name):
    here, cost = measured(FEATURES[name])
    there = train(f'{BRIEF} {FEATURES[name]} --train-batches-per-epoch {STEPS}', 'cpu')
    cost.check(waits=0)
    # The CPU has another layout, whose convolutions round otherwise. Adam scales small gradients' rounding up, and a
    # teacher's gradients are larger.
    tolerance = 1e-2 if name in ('AdamW', 'logit distillation', 'feature distillation') else 1e-3
    assert error(weights(here), weights(there)) < tolerance
    if '--model-ema' in FEATURES[name]:
        averages = [weights(folder, key='state_dict_ema') for folder in (here, there)]
        assert error(*averages) < tolerance
        assert error(averages[0], weights(here)) > 1e-4
    assert train_loss(here) == pytest.approx(train_loss(there), rel=tolerance)


@pytest.mark.parametrize('level', LEVELS)
def test_mixed_precision_trains_and_waits_for_a_dynamic_scale_only(train, measured, level):
    options, waits = LEVELS[level]
    here, cost = measured(options)
    plain = train(f'{BRIEF} --train-batches-per-epoch {STEPS}')
    assert 0 < abs(train_loss(here) / train_loss(plain) - 1) < 0.05
    assert figures(here)['precision'].startswith(level[:2])
    cost.check(waits)


def test_a_batch_of_an_evaluation_does_not_wait(train):
    records = []
    for batch_size in 12, 4:
        with standin_journal.recording() as record:
            train(f'{SMALL} --epochs 0 --validation-batch-size {batch_size}')
        records.append(Cost.of(record))
    (records[1] - records[0]).check(waits=0, batches=2)


@pytest.mark.parametrize('options', [SMALL, f"{OURS} --opt npufusedsgd --val-split ''"], ids=['small', 'this network'])
def test_a_resumed_run_goes_on_bit_for_bit(train, options):
    whole = train(f'{options} --epochs 2')
    resumed = train(f'{options} --epochs 2 --resume {whole / "checkpoint-0.pth.tar"}')
    assert torch.equal(weights(resumed), weights(whole))


# ---- the network of this package -------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def trained(train) -> Path:
    return train(OURS)


def test_gradient_checkpointing_changes_no_bit(train, trained):
    assert torch.equal(weights(train(f'{OURS} --grad-checkpointing')), weights(trained))


def test_validation_gives_the_figures_of_the_training_run(trained, pictures, tmp_path):
    script, results = load('validate'), {}
    for device in 'npu', 'cpu':
        where = ['--data-dir', str(pictures), '--checkpoint', str(trained / 'last.pth.tar'), '--device', device]
        file = tmp_path / f'{device}.json'
        options = f'--img-size 75 -b 2 -j 0 --results-file {file} --results-format json'
        assert run_script('validate.py', script.main, [*where, *shlex.split(options)]) == 0
        results[device] = json.loads(file.read_text())
    assert results['npu']['top1'] == results['cpu']['top1'] == pytest.approx(figures(trained)['top1'], abs=1e-3)
    assert results['npu']['loss'] == pytest.approx(results['cpu']['loss'], rel=1e-4)

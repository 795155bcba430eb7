"""The network on a real NPU, with tolerances for its numerics: `bash tests/run.sh --npu`. It prints a table to report:
the relative error of each case against timm's network on the CPU in float32, and the largest one allowed.

REAL_NPU=cpu runs the same tests on a CPU, where they must pass too.
"""

import copy
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_npu_irv2 import UserError
from timm_npu_irv2 import device as devices
from timm_npu_irv2.ops import use_variants
from timm_npu_irv2.ops.variants import CHOICES
from timm_npu_irv2.precision import create_precision

from ..ascend.environment import running_on
from .real_device import CHOSEN, describe, find

if CHOSEN == 'npu' and running_on() is not None:
    pytest.skip('is for a real NPU: bash tests/run.sh --npu', allow_module_level=True)
FORMS = [{name: value} for name in ('pointwise', 'siblings', 'residual') for value in CHOICES[name]]


def words(form: dict[str, str]) -> str:
    return '='.join(*form.items())


# Relative errors. Convolutions round float32 to HF32 (10 bits) on A2, and to float16 on the 910A.
LOGITS, HALF_LOGITS = 2e-2, 1e-1


@pytest.fixture(scope='module')
def device() -> torch.device:
    try:
        return find()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope='module')
def report(device, request) -> Iterator[Callable[[str, float, float], None]]:
    """report(case, error, limit): a row of the table that is printed at the end."""
    rows: list[str] = []
    yield lambda name, error, limit: rows.append(f'| {name} | {error:.2e} | {limit:.0e} |')
    with request.config.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled():
        print('\n', f'| {describe()} | error | allowed |', '|---|---|---|', *rows, sep='\n')


@pytest.fixture(scope='module')
def case(device):  # after the device, for which everything may be skipped
    """timm's network, images, and its logits and the loss of a step on the CPU in float32."""
    torch.manual_seed(0)
    reference = timm.create_model('inception_resnet_v2', num_classes=10)
    images, targets = torch.randn(4, 3, 149, 149), torch.arange(4)
    with torch.no_grad():
        logits = reference.eval()(images)
        loss = F.cross_entropy(copy.deepcopy(reference).train()(images), targets)  # a copy: its statistics move
    return reference, images, targets, logits, loss.item()


def ours(case, device) -> torch.nn.Module:
    model = timm.create_model('inception_resnet_v2_npu', num_classes=10)
    model.load_state_dict(case[0].state_dict())
    return model.to(device, memory_format=devices.memory_format(device))


@pytest.mark.parametrize('half', [False, True], ids=['float32', '16 bits'])
@pytest.mark.parametrize('form', FORMS, ids=words)
def test_logits_are_timms(case, device, report, form, half):
    model, limit = ours(case, device).eval(), HALF_LOGITS if half else LOGITS
    dtype = devices.half_dtype(device) if half else torch.float32
    with use_variants(**form), torch.no_grad():
        logits = model.to(dtype)(case[1].to(device, dtype)).float().cpu()
    error = ((logits - case[3]).norm() / case[3].norm()).item()
    report(f'logits, {words(form)}, {dtype}'.replace('torch.', ''), error, limit)
    assert error < limit


@pytest.mark.parametrize('level', ['O0', 'O1', 'O2'])
@pytest.mark.parametrize('form', FORMS, ids=words)
def test_the_loss_of_a_step_is_timms_and_falls(case, device, report, form, level):
    half = level != 'O0'
    scale = 128.0 if half and devices.half_dtype(device) == torch.float16 else None
    precision = create_precision(device, amp=half, opt_level=level, loss_scale=scale)
    model = ours(case, device).train()
    optimizer = timm.optim.create_optimizer_v2(model, 'sgd', lr=1e-2, momentum=0.9)
    model, optimizer = precision.prepare(model, optimizer)
    images, targets = case[1].to(device, precision.input_dtype), case[2].to(device)
    losses = []
    with use_variants(**form):
        for _ in range(4):
            with precision.autocast():
                loss = F.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            precision.step(loss, optimizer)
            losses.append(loss.item())
    error = abs(losses[0] / case[4] - 1)
    report(f'first loss, {words(form)}, {level}', error, HALF_LOGITS)
    assert error < HALF_LOGITS and losses[-1] < losses[0]

"""What a training script asks of the device gives on the stand-in what it gives on the CPU."""

import copy
from collections.abc import Callable

import pytest

from .environment import only_here

only_here()

import standin_journal  # noqa: E402 - from here on torch_npu is needed
import timm  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torch_npu  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from .pieces import error, images, largest_error, sgd, small_network, step, train, vector  # noqa: E402


def test_a_small_network_trains_alike():
    assert largest_error(*(train(small_network(), 'plain', device, 32) for device in ('npu', 'cpu'))) < 1e-6


def test_timms_own_network_trains_alike():
    torch.manual_seed(0)
    model = timm.create_model('inception_resnet_v2', num_classes=10)
    assert largest_error(*(train(model, 'plain', device) for device in ('npu', 'cpu'))) < 1e-6


def test_float16_autocast_has_the_cpus_gradients():
    gradients = []
    for device in 'cpu', 'npu':
        model = small_network().to(device)
        x, target = (each.to(device) for each in images(4, 32))
        with standin_journal.recording() as record, torch.autocast(device, torch.float16):
            logits = model(x)
            F.cross_entropy(logits, target).backward()
        gradients.append(vector(each.grad for each in model.parameters()))
    assert logits.dtype == torch.float16
    assert record.calls()['aclnnInplaceCopy'] + record.calls()['aclnnCast'] > 0
    assert F.cosine_similarity(*gradients, dim=0).item() > 0.999


def test_a_dynamic_loss_scale_skips_the_overflow():
    model = small_network().npu()
    optimizer, scaler = sgd(model, 'fused'), torch.amp.GradScaler('npu', init_scale=1024.0, growth_interval=1)
    x, target = (each.npu() for each in images(2, 32))
    scales = []
    for factor in 1.0, float('inf'), 1.0:
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), target) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [2048.0, 1024.0, 2048.0]
    assert all(each.isfinite().all().item() for each in model.parameters())


# torch's optimizer, the one to compare, options of both, switch of the second
OPTIMIZERS = {
    'SGD foreach': (torch.optim.SGD, torch.optim.SGD, dict(momentum=0.9, nesterov=True), 'foreach'),
    'SGD fused': (torch.optim.SGD, torch.optim.SGD, dict(momentum=0.9, weight_decay=0.1), 'fused'),
    'Adam foreach': (torch.optim.Adam, torch.optim.Adam, dict(weight_decay=0.1), 'foreach'),
    'AdamW fused': (torch.optim.AdamW, torch.optim.AdamW, dict(weight_decay=0.1), 'fused'),
    'NpuFusedSGD': (torch.optim.SGD, torch_npu.optim.NpuFusedSGD, dict(momentum=0.9, nesterov=True), None),
    'NpuFusedAdam': (torch.optim.Adam, torch_npu.optim.NpuFusedAdam, dict(weight_decay=0.1), None),
    'NpuFusedAdamW': (torch.optim.AdamW, torch_npu.optim.NpuFusedAdamW, dict(weight_decay=0.1), None),
    'NpuFusedRMSprop': (torch.optim.RMSprop, torch_npu.optim.NpuFusedRMSprop, dict(momentum=0.9), None),
}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_an_optimizer_makes_the_steps_of_torchs(name):
    reference, tested, options, switch = OPTIMIZERS[name]
    torch.manual_seed(0)
    # No BatchNorm: a bias before one has no gradient but rounding, which Adam would scale up.
    start = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 10))
    weights = []
    for device, optimizer_class in ('cpu', reference), ('npu', tested):
        model = copy.deepcopy(start).to(device)
        switches = {switch: True} if switch and device == 'npu' else {}
        optimizer = optimizer_class(model.parameters(), lr=0.01, **options, **switches)
        x, target = (each.to(device) for each in images(8, 8))
        for _ in range(3):
            step(model, optimizer, x, target)
        weights.append(vector(model.parameters()))
    assert error(weights[1], weights[0]) < 1e-6


# ---- the rest of a training script: functions of logits (16, 10) and target (16,) ------------------------------------

def _accuracy(logits: Tensor, target: Tensor) -> list[Tensor]:
    return timm.utils.accuracy(logits, target, topk=(1, 5))


def _mixup_loss(logits: Tensor, target: Tensor) -> Tensor:
    soft = timm.data.mixup.mixup_target(target, 10, lam=0.3, smoothing=0.1)
    return torch.sum(-soft * F.log_softmax(logits, dim=-1), dim=-1).mean()


def _moving_average(logits: Tensor, target: Tensor) -> Tensor:
    averages = [logits * 2]
    torch._foreach_lerp_(averages, [logits], weight=0.1)
    return averages[0].lerp_(logits, 0.5)


def _clipped(logits: Tensor, target: Tensor) -> Tensor:
    weight = nn.Parameter(logits)
    weight.grad = logits * 3
    nn.utils.clip_grad_norm_([weight], 1.0)
    return weight.grad


def _smoothed_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=0.1)


def _distillation(logits: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(-1), (logits * 2).log_softmax(-1), reduction='batchmean', log_target=True)


def _confusion(logits: Tensor, target: Tensor) -> Tensor:
    return torch.bincount(target * 10 + logits.argmax(1), minlength=100)


def _normalised(logits: Tensor, target: Tensor) -> Tensor:
    return (logits * 20 + 100).to(torch.uint8).float().sub_(127.5).div_(58.0).flip(0).clamp(-1, 1)


def _selected(logits: Tensor, target: Tensor) -> Tensor:
    return logits[target == 3]


def _sorted(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return logits.sort(1)


def _spread(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return torch.std_mean(logits, 0)


@pytest.mark.parametrize('function', [
    _accuracy, _mixup_loss, _moving_average, _clipped, _smoothed_loss, _distillation, _confusion, _normalised,
    _selected, _sorted, _spread])
def test_a_piece_of_a_training_script_equals_the_cpu(function: Callable):
    logits, target = torch.randn(16, 10, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
    values = []
    for device in 'npu', 'cpu':
        result = function(logits.clone().to(device), target.to(device))
        values.append(vector([result] if isinstance(result, Tensor) else result))
    assert error(*values) < 1e-6

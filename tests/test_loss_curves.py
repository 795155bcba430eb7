"""Fifty training steps give timm's loss curve. Minutes long: `pytest -m long tests/test_loss_curves.py`."""

import pytest
import timm
import torch
from torch import nn

from timm_npu_irv2.precision import create_precision

from .conftest import OURS, REFERENCE

pytestmark = pytest.mark.long

# With a learning rate ten times as great training is chaotic: rounding grows to the size of the loss in 50 steps, with
# timm's network in two layouts too.
STEPS, LEARNING_RATE, CPU = 50, 1e-3, torch.device('cpu')


def networks(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """timm's network and ours from equal weights."""
    torch.manual_seed(0)
    reference, ours = (timm.create_model(name, num_classes=10).to(dtype) for name in (REFERENCE, OURS))
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def batches(dtype: torch.dtype, count: int, size: int):
    """Equal data for all: four batches in turn, whose classes differ in brightness, so there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    rounds = []
    for _ in range(4):
        targets = torch.randint(10, (count,), generator=generator)
        images = torch.randn(count, 3, size, size, generator=generator) * 0.3 + (targets.view(-1, 1, 1, 1) - 4.5) / 4
        rounds.append((images.to(dtype), targets))
    return [rounds[step % 4] for step in range(STEPS)]


def losses(model: nn.Module, data, layout=torch.contiguous_format, **precision) -> torch.Tensor:
    model = model.to(memory_format=layout).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    level = create_precision(CPU, **precision) if precision else None
    if level is not None:
        model, optimizer = level.prepare(model, optimizer)
    found = []
    for images, targets in data:
        optimizer.zero_grad()
        laid_out = images.to(memory_format=layout)
        if level is None:
            loss = nn.functional.cross_entropy(model(laid_out), targets, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
        else:
            with level.autocast():
                loss = nn.functional.cross_entropy(model(laid_out.to(level.input_dtype)), targets, label_smoothing=0.1)
            level.step(loss, optimizer)
        found.append(loss.detach().double())
    return torch.stack(found)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs() / expected.abs()).max().item()


def test_float64_losses_are_timms():
    reference, ours = networks(torch.float64)
    data = batches(torch.float64, 4, 107)
    apart = distance(losses(ours, data), losses(reference, data))
    print(f'float64: {apart:.2e}')
    assert apart < 1e-8


def test_float32_losses_are_as_near_to_timms_as_timms_in_another_layout():
    data = batches(torch.float32, 4, 107)
    runs = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        reference, ours = networks(torch.float32)
        runs[layout] = losses(reference, data, layout), losses(ours, data, layout)
    theirs = distance(runs[torch.channels_last][0], runs[torch.contiguous_format][0])
    for timms, own in runs.values():
        print(f"float32: ours to timm's {distance(own, timms):.2e}, timm's two layouts {theirs:.2e}")
        assert distance(own, timms) < 3 * theirs


def test_half_weights_learn_as_timms_autocast_does():
    # With 4 images of 75 px timm's own last losses differ by 10 % between two layouts, with these by 1.5 %.
    data = batches(torch.float32, 16, 139)
    reference, ours = networks(torch.float32)
    autocast = losses(reference, data, amp=True, opt_level='O1')
    half = losses(ours, data, amp=True, opt_level='O2')
    last = half[-10:].mean().item(), autocast[-10:].mean().item()
    print(f'O2 {last[0]:.4f}, autocast {last[1]:.4f}')
    assert last[0] == pytest.approx(last[1], rel=0.02)
    assert last[0] < half[:4].mean()  # it has learnt

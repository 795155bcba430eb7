"""What test_precision_npu.py runs on the stand-in, each a function that returns something JSON can hold.

`python precision_pieces.py NAME…` runs some and prints {name: result} as the last line.
"""

import json
import sys

import standin_journal
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import timm_npu_irv2  # noqa: F401 - the optimizers' names
from timm_npu_irv2.precision import create_precision

NPU, CPU = torch.device('npu'), torch.device('cpu')
OPTIMIZERS = ['npufusedsgd', 'npufusedadam', 'npufusedadamw', 'npufusedadadelta', 'npufusedlamb', 'npufusedrmsprop',
              'npufusedrmsproptf', 'npufusedadamp']
LEVELS = {
    'O1 128': dict(amp=True, opt_level='O1', loss_scale=128.0),
    'O1 dynamic': dict(amp=True, opt_level='O1', loss_scale='dynamic'),
    'O2 128': dict(amp=True, opt_level='O2', loss_scale=128.0),
    'O2 dynamic': dict(amp=True, opt_level='O2', loss_scale='dynamic'),
}
FACTOR = 2.0 ** -8  # the first dynamic scale, 65536, would overflow with the whole loss
STEPS = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.block = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.classif = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.classif((x + self.norm2(self.block(x)).relu()).mean((2, 3)))

    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(stem=r'^stem|^norm\.', blocks=[('^block|^norm2', (0,)), ('^classif', (99999,))])


class Run:
    """The small network, one of the optimizers with timm's groups, and a precision, on a device."""

    def __init__(self, device: torch.device, level: dict, opt: str = 'npufusedsgd', **kwargs) -> None:
        torch.manual_seed(0)
        model = Net().to(device)
        self.device = device
        self.precision = create_precision(device, amp_dtype=torch.float16 if level else None, **level)
        optimizer = create_optimizer_v2(model, opt, **{'lr': 0.05, 'weight_decay': 0.05, 'layer_decay': 0.5, **kwargs})
        self.model, self.optimizer = self.precision.prepare(model, optimizer)
        self.images, self.targets = torch.randn(8, 3, 17, 17).to(device), (torch.arange(8) % 4).to(device)

    def step(self, factor: float = FACTOR, **kwargs) -> Tensor:
        self.optimizer.zero_grad()
        with self.precision.autocast():
            loss = nn.functional.cross_entropy(self.model(self.images.to(self.precision.input_dtype)), self.targets)
        self.precision.step(loss * factor, self.optimizer, **kwargs)
        return loss.detach()

    def masters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group['params']]

    def weights(self) -> Tensor:
        return torch.cat([p.detach().cpu().flatten() for p in self.masters()])

    def state(self) -> list[Tensor]:
        """All that a step may change: the optimizer's parameters and states, and the model's own parameters."""
        states = [value for p in self.masters() for value in self.optimizer.state[p].values()]
        return [torch.as_tensor(t).detach().cpu().clone() for t in (*self.masters(), *self.model.parameters(), *states)]


def difference(actual: Tensor, expected: Tensor) -> float:
    """The greatest difference over the greatest value; NaN counts as infinite."""
    return ((actual - expected).abs().max() / expected.abs().max()).nan_to_num(float('inf')).item()


def bit_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def optimizers() -> dict:
    """{name: (class, how far its float32 weights are from the stand-in's on the CPU after a few steps)}."""
    found = {}
    for name in OPTIMIZERS:
        here, there = Run(NPU, {}, name, lr=0.05), Run(CPU, {}, name, lr=0.05)
        start = there.weights()
        for _ in range(STEPS):
            here.step(1.0)
            there.step(1.0)
        apart = difference(here.weights() - start, there.weights() - start)
        found[name] = type(here.optimizer).__module__, apart
    return found


def levels() -> dict:
    """{level: how far weights are from those of float32 on the CPU after a few steps, how far they went}."""
    found = {}
    for name, level in LEVELS.items():
        here, there = Run(NPU, level), Run(CPU, {})
        start = there.weights()
        for _ in range(STEPS):
            here.step(FACTOR)
            there.step(FACTOR)
        moved = there.weights() - start
        found[name] = difference(here.weights() - start, moved), here.precision.skipped_steps
    return found


def overflow() -> dict:
    """{(level, optimizer): (bit-equal after an overflow, steps skipped)}, in the first step and later."""
    found = {}
    for name in ('O1 dynamic', 'O2 dynamic'):
        for opt in ('npufusedsgd', 'npufusedadamw', 'sgd'):
            run = Run(NPU, LEVELS[name], opt)
            first = run.weights()
            run.step(float('inf'))
            at_first = torch.equal(run.weights(), first)
            run.step()
            run.step()
            before = run.state()
            run.step(float('nan'))
            later = bit_equal(run.state(), before)
            run.step()
            found[f'{name} {opt}'] = at_first, later, run.precision.skipped_steps, not bit_equal(run.state(), before)
    return found


def first_overflow() -> dict:
    """{optimizer: weights after [overflow, step, step] and after [step, step] are the same}, BatchNorm aside."""
    found = {}
    for opt in ('npufusedsgd', 'sgd'):
        overflown, plain = (Run(NPU, LEVELS['O2 dynamic'], opt) for _ in range(2))
        overflown.step(float('inf'))
        for run in (overflown, plain):
            run.step()
            run.step()
        found[opt] = difference(overflown.weights(), plain.weights())
    return found


def clipping() -> dict:
    """{level: the norm of the gradients after clipping to 0.001}, with and without combined gradients."""
    found = {}
    for name, level in LEVELS.items():
        run = Run(NPU, level)
        for _ in range(2):
            run.step(clip_grad=0.001, parameters=list(run.model.parameters()))
        found[name] = torch.cat([p.grad.flatten() for p in run.masters()]).norm().item()
    return found


def resumed() -> dict:
    """{optimizer: a resumed run takes the same step, bit for bit}; also when it had already made steps."""
    found = {}
    for opt in OPTIMIZERS:
        run, fresh, used = (Run(NPU, LEVELS['O2 128'], opt, lr=0.01) for _ in range(3))
        run.step()
        run.step()
        used.step()
        weights = {k: v.cpu().clone() for k, v in run.precision.model_state_dict(run.model).items()}
        state = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.cpu().clone(), run.optimizer.state_dict())
        for other in (fresh, used):
            other.precision.load_model_state_dict(other.model, weights)
            other.optimizer.load_state_dict(state)
        for each in (run, fresh, used):
            each.step()
        found[opt] = bit_equal(fresh.state(), run.state()), bit_equal(used.state(), run.state())
    return found


def accumulation() -> dict:
    """{level: how far two halves of a batch lead from the whole one}, with gradients combined before."""
    found = {}
    for name, level in LEVELS.items():
        whole, parts = (Run(NPU, level) for _ in range(2))
        for run in (whole, parts):
            run.model.norm = run.model.norm2 = nn.Identity()  # BatchNorm would tell a half from the whole
            run.step()
        start = whole.weights()
        whole.step()
        parts.optimizer.zero_grad()
        for half in (slice(None, 4), slice(4, None)):
            with parts.precision.autocast():
                logits = parts.model(parts.images[half].to(parts.precision.input_dtype))
                loss = nn.functional.cross_entropy(logits, parts.targets[half])
            parts.precision.step(loss * FACTOR / 2, parts.optimizer, need_update=half.stop is None)
        found[name] = difference(parts.weights() - start, whole.weights() - start)
    return found


def costs() -> dict:
    """{level optimizer: calls, synchronisations and copies from the device of one step}."""
    found = {}
    for name, level in LEVELS.items():
        for opt in ('npufusedsgd', 'sgd'):
            run = Run(NPU, level, opt)
            for _ in range(3):
                run.step(clip_grad=1.0, parameters=list(run.model.parameters()))
            with standin_journal.recording() as step:
                run.step(clip_grad=1.0, parameters=list(run.model.parameters()))
            found[f'{name} {opt}'] = dict(
                calls=len(step.operators), synchronizations=step.synchronizations, reads=len(step.copies('D2H')))
    return found


def our_network() -> dict:
    """What an O2 step of the whole network costs under a static scale. Its values may be anything."""
    model = timm.create_model('inception_resnet_v2_npu', num_classes=10).to(NPU).train()
    precision = create_precision(NPU, amp=True, opt_level='O2', loss_scale=128.0)
    optimizer = create_optimizer_v2(model, 'npufusedsgd', lr=0.1, weight_decay=1e-4)
    model, optimizer = precision.prepare(model, optimizer)
    images, targets = torch.zeros(2, 3, 75, 75, device=NPU), torch.zeros(2, dtype=torch.long, device=NPU)

    def one_step() -> None:
        optimizer.zero_grad()
        precision.step(nn.functional.cross_entropy(model(images), targets), optimizer)

    one_step()
    one_step()
    with standin_journal.recording() as step:
        one_step()
    return dict(calls=len(step.operators), synchronizations=step.synchronizations, reads=len(step.copies('D2H')))


def saturating_chip() -> dict:
    """Where the chip saturates at the largest number: whose dynamic scale it is, and that it trains and skips."""
    found = {}
    for opt in ('npufusedsgd', 'sgd'):
        run = Run(NPU, LEVELS['O2 dynamic'], opt)
        run.step()
        before = run.state()
        run.step(float('inf'))
        same = bit_equal(run.state(), before)
        run.step()
        found[opt] = same, run.precision.skipped_steps, not bit_equal(run.state(), before)
    found['scaler'] = type(run.precision._scaler.scaler).__module__
    return found


if __name__ == '__main__':
    print(json.dumps({name: globals()[name]() for name in sys.argv[1:]}))

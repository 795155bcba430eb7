"""The fused optimizers: in timm's registry, and the same algorithm wherever they run."""

import argparse
import functools
import logging
import subprocess
import sys

import pytest
import timm.optim
import torch
from timm.optim import Lamb, RMSpropTF, create_optimizer_v2
from torch import Tensor, nn

from timm_npu_irv2 import device as devices
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.optim import create_optimizer, gradient_holders, register_optimizers

# The optimizers that the names mean off the NPU, with the arguments that timm passes below.
EQUIVALENTS = {
    'npufusedsgd': functools.partial(torch.optim.SGD, momentum=0.9),
    'npufusedadam': torch.optim.Adam,
    'npufusedadamw': torch.optim.AdamW,
    'npufusedadadelta': torch.optim.Adadelta,
    'npufusedlamb': functools.partial(Lamb, bias_correction=False, max_grad_norm=None, always_adapt=True),
    'npufusedrmsprop': functools.partial(torch.optim.RMSprop, momentum=0.9),
    'npufusedrmsproptf': functools.partial(RMSpropTF, momentum=0.9),
    'npufusedadamp': timm.optim.AdamP,
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.classif = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classif(self.norm(self.stem(x)).relu().mean((2, 3)))

    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(stem='^stem', blocks=[('^norm', (0,)), ('^classif', (99999,))])


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_timm_lists_all_of_them():
    assert timm.optim.list_optimizers('npu*') == sorted(EQUIVALENTS)


@pytest.mark.parametrize('name', EQUIVALENTS)
def test_timm_knows_each_as_a_class_of_optimizers_that_takes_any_shape_of_groups(name):
    assert issubclass(timm.optim.get_optimizer_class(name, bind_defaults=False), torch.optim.Optimizer)
    weight, bias = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5))
    for groups in ([weight, bias], [dict(params=[weight]), dict(params=[bias], lr=0.1)], [dict(params=bias, lr=0.1)]):
        optimizer = create_optimizer_v2(groups, name)
        for each in (weight, bias):
            each.grad = torch.ones_like(each)
        before = bias.detach().clone()
        optimizer.step()
        assert not torch.equal(bias, before)


def test_registering_twice_changes_nothing(caplog):
    before = timm.optim.get_optimizer_info('npufusedsgd')
    register_optimizers()
    assert timm.optim.get_optimizer_info('npufusedsgd') is before
    assert not caplog.records


@pytest.mark.parametrize('name', EQUIVALENTS)
def test_each_is_its_equivalent_with_timms_groups(name):
    ours, theirs = network(), network()
    arguments = dict(lr=0.01, weight_decay=0.05, layer_decay=0.5)
    groups = timm.optim.param_groups_layer_decay(theirs, weight_decay=0.05, layer_decay=0.5)
    reference = EQUIVALENTS[name](groups, lr=0.01)
    optimizer = create_optimizer_v2(ours, name, **arguments)
    assert [(g['weight_decay'], g['lr_scale'], len(g['params'])) for g in optimizer.param_groups] == [
        (g['weight_decay'], g['lr_scale'], len(g['params'])) for g in reference.param_groups]
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    trained = train(ours, optimizer)
    torch.testing.assert_close(trained, train(theirs, reference), rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(trained[name], start[name]) for name in start)


@pytest.mark.parametrize('name', ['npufusedsgd', 'npufusedadam', 'npufusedadamw'])
def test_parameters_with_gaps_between_their_elements_are_updated_rightly(name):
    dense, gaps = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3, 2)[..., 0])
    for parameter in (dense, gaps):
        optimizer = create_optimizer_v2([parameter], name, lr=0.1)
        for _ in range(2):
            parameter.grad = torch.arange(12.0).view(4, 3)
            optimizer.step()
    torch.testing.assert_close(gaps, dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name', EQUIVALENTS)
def test_state_dicts_go_to_the_equivalent_and_back(name):
    model, other = network(), network()
    optimizer, reference = create_optimizer_v2(model, name, lr=0.01), EQUIVALENTS[name](other.parameters(), lr=0.01)
    train(model, optimizer)
    reference.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(reference.state_dict())
    train(model, optimizer)


@pytest.mark.parametrize('name', ['npufusedsgd', 'npufusedadamw', 'npufusedrmsprop'])
def test_foreach_may_be_asked_for(name):
    model = network()
    assert create_optimizer_v2(model, name, lr=0.01, foreach=True).param_groups[0]['foreach'] is True
    train(model, create_optimizer_v2(model, name, lr=0.01, foreach=False))


def test_lookahead_wraps_them():
    model = network()
    assert train(model, create_optimizer_v2(model, 'lookahead_npufusedsgd', lr=0.01), steps=7)


def test_the_optimizer_used_elsewhere_is_logged_in_one_line(caplog):
    with caplog.at_level(logging.INFO, 'timm_npu_irv2.optim'):
        create_optimizer_v2(network(), 'npufusedsgd', lr=0.01)
    assert caplog.messages == ['npufusedsgd: using torch.optim.SGD(fused=True) on this device.']


def test_grad_scaler_skips_the_very_first_step_whole():
    # torch's fused SGD, called through GradScaler's flag, would keep momentum buffers that nobody wrote.
    model = network()
    optimizer = create_optimizer_v2(model, 'npufusedsgd', lr=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaler = torch.amp.GradScaler('cpu')
    scaler.scale(model(torch.ones(2, 3, 6, 6)).mean() * float('inf')).backward()
    scaler.step(optimizer)
    assert not optimizer.state
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize('arguments, words', [
    (dict(opt='npufusedsgd', momemtum=0.5), 'no argument momemtum'),
    (dict(opt='npufusedsgd', momentum=0.0, nesterov=True), 'Nesterov momentum requires'),
    (dict(opt='npufusedadam', lr=-1.0), 'Invalid learning rate'),
])
def test_wrong_arguments_are_one_line(arguments, words):
    with pytest.raises(UserError, match=words) as error:
        create_optimizer_v2(network(), **{'lr': 0.1, **arguments})
    assert '\n' not in str(error.value)


def options(**kwargs) -> argparse.Namespace:
    return argparse.Namespace(**{'opt': 'npufusedsgd', 'lr': 0.1, 'weight_decay': 0.05, 'momentum': 0.8, **kwargs})


def test_options_make_the_optimizer():
    optimizer = create_optimizer(network(), options(layer_decay=0.5), nesterov=True)
    assert {g['weight_decay'] for g in optimizer.param_groups} == {0.0, 0.05}
    assert {(g['momentum'], g['nesterov']) for g in optimizer.param_groups} == {(0.8, True)}
    assert len({g['lr_scale'] for g in optimizer.param_groups}) > 1
    assert type(create_optimizer(network(), options(opt='adamw', opt_betas=(0.8, 0.9)))) is torch.optim.AdamW


def test_an_unknown_name_is_one_line():
    with pytest.raises(UserError, match='--opt npufusedsdg: no such optimizer'):
        create_optimizer(network(), options(opt='npufusedsdg'))


class CombiningSGD(torch.optim.SGD):
    """What the vendor's classes do that matters here: flat tensors, taken once, and an integer counter."""

    is_params_grads_combined = is_states_combined = False

    def get_combined_params(self):
        return [self.flat, None]

    def get_combined_grads(self):
        return [self.flat_gradient, None]


def combining_class(name: str, device: torch.device, use_apex: bool = False) -> type[torch.optim.Optimizer]:
    class Vendor(CombiningSGD):
        from_apex = use_apex

    return Vendor


@pytest.fixture
def vendor(monkeypatch):
    monkeypatch.setattr(devices, 'fused_optimizer_class', combining_class)


def test_the_vendors_class_is_taken_where_there_is_one(vendor):
    optimizer = create_optimizer(network(), options(opt_foreach=True))
    assert isinstance(optimizer, CombiningSGD)
    assert not optimizer.from_apex
    assert optimizer.param_groups[0]['foreach'] is None  # the vendor's classes do not know the word


def test_apex_gives_its_own_class_to_its_own_amp(vendor):
    assert create_optimizer(network(), options(amp_impl='apex')).from_apex


def test_the_vendors_classes_refuse_bfloat16_in_one_line(vendor):
    with pytest.raises(UserError, match='not bfloat16'):
        create_optimizer(network().bfloat16(), options())


def test_loaded_states_are_combined_again_with_integer_counters(vendor):
    model = network()
    adam = torch.optim.Adam(model.parameters())
    train(model, adam, steps=2)
    optimizer = create_optimizer(model, options(weight_decay=0.0))
    optimizer.is_states_combined = True
    optimizer.load_state_dict(adam.state_dict())
    assert not optimizer.is_states_combined
    assert [type(state['step']) for state in optimizer.state.values()] == [int] * len(optimizer.state)
    assert {state['step'] for state in optimizer.state.values()} == {2}


def test_gradients_are_held_by_the_parameters_or_by_the_combined_tensors(vendor):
    model = network()
    optimizer = create_optimizer(model, options(weight_decay=0.0))
    assert {id(p) for p in gradient_holders(optimizer)} == {id(p) for p in model.parameters()}
    optimizer.flat, optimizer.flat_gradient = torch.zeros(5), torch.arange(5.0)
    optimizer.is_params_grads_combined = True
    (holder,) = gradient_holders(optimizer)
    holder.grad.mul_(2)
    assert torch.equal(optimizer.flat_gradient, torch.arange(5.0) * 2)


def test_an_older_timm_without_a_registry_is_a_warning_and_no_error():
    code = ('import sys, warnings, timm.optim; sys.modules["timm.optim._optim_factory"] = None\n'
            'with warnings.catch_warnings(record=True) as caught:\n'
            '    warnings.simplefilter("always"); import timm_npu_irv2.optim as ours; ours.register_optimizers()\n'
            'print([str(w.message) for w in caught])')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert 'no optimizer registry' in done.stdout

"""Master weights in flat buffers compute what master weights by themselves compute, with less traffic."""

import copy
import itertools

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from timm_npu_irv2.benchmarks.counting import cost_of
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.precision import create_precision

CPU = torch.device('cpu')
OPTIMIZERS = {
    'sgd': dict(opt='sgd', momentum=0.9, weight_decay=0.05),
    'momentum': dict(opt='momentum', momentum=0.9, weight_decay=0.05),
    'adamw': dict(opt='adamw', weight_decay=0.05),
    'rmsprop': dict(opt='rmsprop', weight_decay=0.05),
    'rmsproptf': dict(opt='rmsproptf', weight_decay=0.05),
    'adadelta': dict(opt='adadelta'),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Conv2d(8, 16, 3)
        self.classif = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classif(self.block(self.norm(self.stem(x)).relu()).relu().mean((2, 3)))

    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(stem=r'^stem|^norm\.', blocks=[(r'^block', (0,)), (r'^classif', (99999,))])


def opaque(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer, of a class that nobody knows to be elementwise: its masters stay by themselves."""
    optimizer.__class__ = type('Opaque', (type(optimizer),), {})
    return optimizer


class Run:
    def __init__(self, opt='sgd', loss_scale=None, flat=True, layer_decay=0.7, model=None, freeze=(), **kwargs):
        torch.manual_seed(0)
        self.model = (model or Net()).to(memory_format=torch.channels_last)
        for name in freeze:
            self.model.get_parameter(name).requires_grad_(False)
        options = {**OPTIMIZERS.get(opt, {'opt': opt}), 'lr': 0.1, 'layer_decay': layer_decay, **kwargs}
        self.optimizer = create_optimizer_v2(self.model, **options)
        self.precision = create_precision(CPU, amp=True, opt_level='O2', loss_scale=loss_scale)
        optimizer = self.optimizer if flat else opaque(self.optimizer)
        self.model, self.optimizer = self.precision.prepare(self.model, optimizer)

    @property
    def is_flat(self) -> bool:
        """The optimizer holds at most two tensors a group, though the model has more."""
        sizes = [len(group['params']) for group in self.optimizer.param_groups]
        return sum(sizes) < len(list(self.model.parameters())) and max(sizes) <= 2

    def step(self, seed=0, factor=1.0):
        generator = torch.Generator().manual_seed(seed)
        images, targets = torch.randn(4, 3, 9, 9, generator=generator), torch.arange(4) % 3
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images.to(memory_format=torch.channels_last)), targets)
        self.precision.step(loss * factor, self.optimizer)

    def state(self):
        """Everything that a step changes, in the ordinary shape."""
        momenta = {f'{index}.{name}': value for index, state in self.optimizer.state_dict()['state'].items()
                   for name, value in state.items() if isinstance(value, torch.Tensor)}
        halves = {f'half.{name}': p.detach() for name, p in self.model.named_parameters()}
        return copy.deepcopy({**momenta, **halves, **self.precision.model_state_dict(self.model)})


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_flat_masters_are_masters_bit_for_bit(opt):
    flat, single = Run(opt), Run(opt, flat=False)
    assert flat.is_flat and not single.is_flat
    assert len({group['lr_scale'] for group in flat.optimizer.param_groups}) > 1  # the groups are real ones
    for seed in range(3):
        flat.step(seed)
        single.step(seed)
    tolerance = 1e-6 if opt in ('sgd', 'momentum') else 0  # the fused kernel of SGD rounds once less
    torch.testing.assert_close(flat.state(), single.state(), rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize('opt', OPTIMIZERS)
@pytest.mark.parametrize('loss_scale', [None, 128.0])
def test_the_optimizers_state_is_the_ordinary_one_both_ways(opt, loss_scale):
    flat, single = Run(opt, loss_scale), Run(opt, loss_scale, flat=False)
    for run in (flat, single):
        run.step()
    theirs, ours = single.optimizer.state_dict(), flat.optimizer.state_dict()
    assert [g['params'] for g in ours['param_groups']] == [g['params'] for g in theirs['param_groups']]
    assert ours['param_groups'] == theirs['param_groups']
    shapes = [{i: {n: getattr(v, 'shape', None) for n, v in s.items()} for i, s in state['state'].items()}
              for state in (ours, theirs)]
    assert shapes[0] == shapes[1]
    for source, target in itertools.product((flat, single), (True, False)):
        resumed = Run(opt, loss_scale, flat=target)
        resumed.precision.load_model_state_dict(resumed.model, source.precision.model_state_dict(source.model))
        resumed.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict()))
        assert_same(resumed.state(), source.state())


def test_a_static_scale_of_sgd_costs_nothing_and_changes_nothing():
    scaled, plain = Run('sgd', 128.0), Run('sgd', 1.0)
    for seed in range(3):
        scaled.step(seed)
        plain.step(seed)
        scaled.optimizer.param_groups[0]['lr'] = plain.optimizer.param_groups[0]['lr'] = 0.05  # a scheduler may come
    assert_same(scaled.state(), plain.state())
    assert cost_of(scaled.step).calls.total() == cost_of(plain.step).calls.total() + 2  # the loss and its gradient


@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_a_step_skipped_for_an_overflow_changes_no_bit(opt):
    run = Run(opt, 'dynamic')
    run.step()
    before = run.state()
    run.step(1, factor=float('inf'))
    assert run.precision.skipped_steps == 1
    statistics = [name for name in before if 'running' in name or 'num_batches' in name]
    after = run.state()
    assert_same({n: v for n, v in after.items() if n not in statistics},
                {n: v for n, v in before.items() if n not in statistics})
    run.step(2)
    assert not torch.equal(run.state()['stem.weight'], before['stem.weight'])


@pytest.mark.parametrize('loss_scale, most', [(128.0, 10), ('dynamic', 20)])
def test_scaling_checking_updating_and_copying_back_are_few_operators(loss_scale, most):
    run = Run('sgd', loss_scale, layer_decay=None, model=timm.create_model('inception_resnet_v2_npu', num_classes=3))
    losses = [run.model(torch.zeros(2, 3, 75, 75)).square().mean() for _ in range(2)]
    backward = cost_of(losses[0].backward).calls.total()
    run.optimizer.zero_grad()
    for parameter in run.model.parameters():
        parameter.grad = None
    assert cost_of(lambda: run.precision.step(losses[1], run.optimizer)).calls.total() <= backward + most


def test_weights_and_moments_keep_their_layout():
    run = Run('sgd')
    run.step()
    assert run.model.block.weight.is_contiguous(memory_format=torch.channels_last)
    assert run.precision.float32_model(run.model).block.weight.is_contiguous(memory_format=torch.channels_last)
    values = run.optimizer.state_dict()['state'].values()
    moment = next(each['momentum_buffer'] for each in values if each['momentum_buffer'].shape == (16, 8, 3, 3))
    assert moment.is_contiguous(memory_format=torch.channels_last)


def test_every_weight_starts_where_a_kernel_can_load_16_bytes():
    """The three biases of the classifier come first in their group; on a GPU a convolution after them failed."""
    run = Run('sgd')
    run.step()
    twin = run.precision.float32_model(run.model)
    starts = {name: p.data_ptr() % 16 for model in (run.model, twin) for name, p in model.named_parameters()}
    assert not any(starts.values()), starts


def test_frozen_weights_stay_out_of_the_buffers():
    run, free = Run('sgd', freeze=['stem.weight', 'norm.bias']), Run('sgd')
    before = run.state()
    run.step()
    free.step()
    after = run.state()
    assert all(torch.equal(after[name], before[name]) for name in ('stem.weight', 'norm.bias'))
    assert all(torch.equal(after[name], free.state()[name]) for name in ('block.weight', 'norm.weight'))


def test_a_state_that_fits_some_parameters_only_is_one_line():
    run = Run('sgd')
    run.step()
    state = run.optimizer.state_dict()
    state['state'][1]['momentum_buffer'] = None
    with pytest.raises(UserError, match='momentum_buffer fits some of its parameters only'):
        Run('sgd').optimizer.load_state_dict(state)


def test_a_weight_outside_the_loss_is_named():
    run = Run('sgd')
    run.model.forward = lambda x: run.model.stem(x.bfloat16()).float().mean((2, 3))
    with pytest.raises(UserError, match=r'^parameter block\.weight got no gradient; freeze it or use --opt-level O1'):
        run.step()


def test_optimizers_that_look_at_layers_keep_masters_by_themselves():
    for opt in ('lamb', 'lars', 'adamp', 'lookahead_sgd'):
        assert not Run(opt).is_flat
    assert not Run('rmsproptf', caution=True).is_flat

"""Mixed precision: the arithmetic of every level, the loss scale, and the traffic between weights and masters."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from timm_npu_irv2.errors import UserError
from timm_npu_irv2.precision import Apex, Autocast, FullPrecision, HalfWeights, Precision, create_precision

CPU = torch.device('cpu')
LEVELS = {
    'O0': dict(),
    'O1': dict(amp=True, opt_level='O1', amp_dtype=torch.bfloat16),
    'O2': dict(amp=True, opt_level='O2', amp_dtype=torch.bfloat16),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Conv2d(8, 8, 3)
        self.norm2 = nn.BatchNorm2d(8)
        self.classif = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.classif(self.norm2(self.block(x)).relu().mean((2, 3)))

    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(stem=r'^stem|^norm\.', blocks=[(r'^block|^norm2', (0,)), (r'^classif', (99999,))])


class NoNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = self.norm2 = nn.Identity()


def network(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def sgd(model: nn.Module, **kwargs) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{'lr': 0.1, 'momentum': 0.9, **kwargs})


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.randint(3, (6,), generator=generator)


class Run:
    """A network, its optimizer and its precision."""

    def __init__(self, kind: type[nn.Module] = Net, optimizer=sgd, **precision) -> None:
        self.precision: Precision = create_precision(CPU, **precision)
        model = network(kind)
        self.model, self.optimizer = self.precision.prepare(model, optimizer(model))

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        with self.precision.autocast():
            logits = self.model(images.to(self.precision.input_dtype))
            return nn.functional.cross_entropy(logits, targets)

    def step(self, step: int = 0, factor: float = 1.0, **kwargs) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(*batch(step))
        self.precision.step(loss * factor, self.optimizer, **kwargs)
        return loss.item()

    def weights(self) -> dict[str, Tensor]:
        state = self.precision.model_state_dict(self.model)
        return {name: state[name].clone() for name, _ in self.model.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        """All that a step may change: the model's own parameters, the optimizer's, and their momentum."""
        tensors = {f'model.{name}': p for name, p in self.model.named_parameters()}
        for i, p in enumerate(p for group in self.optimizer.param_groups for p in group['params']):
            tensors[f'optimizer.{i}'] = p
        for i, state in self.optimizer.state_dict()['state'].items():
            tensors[f'momentum.{i}'] = state['momentum_buffer']
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def gradients(self, scale: float = 1.0) -> list[Tensor]:
        """The float32 gradients of the last step, each by itself, without the loss scale that may be left in them."""
        masters = getattr(self.precision, 'masters', None)
        updated = self.model.parameters() if masters is None else masters.clipped(self.model.parameters())
        return [p.grad / scale for p in updated]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---- the levels ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('level', ['O1', 'O2'])
def test_bfloat16_trains_near_float32(level):
    reference, run = Run(), Run(**LEVELS[level])
    losses = [(run.step(i), reference.step(i)) for i in range(5)]
    assert all(abs(ours - theirs) < 0.03 * theirs for ours, theirs in losses)
    assert any(ours != theirs for ours, theirs in losses)  # it is not float32 in disguise
    for name, value in reference.weights().items():
        torch.testing.assert_close(run.weights()[name], value, rtol=0.05, atol=0.03)


def test_o2_is_sgd_on_float32_masters_bit_for_bit():
    # Products with powers of two are exact, so it makes no difference where a CPU rounds them before it adds.
    factors = dict(lr=2 ** -3, momentum=2 ** -1, weight_decay=2 ** -10)
    run = Run(optimizer=lambda model: sgd(model, **factors), **LEVELS['O2'])
    masters = {name: p.detach().clone() for name, p in network().named_parameters()}
    model, momentum = network(), {}
    for layer in (model.stem, model.block, model.classif):
        layer.bfloat16()
    for i in range(4):
        images, targets = batch(i)
        logits = model(images.bfloat16()).float()
        gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, targets), list(model.parameters()))
        for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
            decayed = gradient.float().add(masters[name], alpha=factors['weight_decay'])
            momentum[name] = momentum[name].mul(factors['momentum']).add(decayed) if name in momentum else decayed
            masters[name].add_(momentum[name], alpha=-factors['lr'])
            p.data.copy_(masters[name])
        run.step(i)
    assert_same(run.weights(), masters)
    assert_same(dict(run.model.state_dict()), dict(model.state_dict()))


def test_o2_keeps_batchnorm_in_float32_and_the_rest_in_half():
    run = Run(**LEVELS['O2'])
    assert run.model.stem.weight.dtype == run.model.classif.bias.dtype == torch.bfloat16
    assert {t.dtype for t in (run.model.norm.weight, run.model.norm.running_var)} == {torch.float32}
    assert {p.dtype for group in run.optimizer.param_groups for p in group['params']} == {torch.float32}
    assert run.model(batch()[0]).dtype == torch.float32


def test_model_dtype_casts_all_weights_without_amp():
    run = Run(model_dtype=torch.bfloat16)
    assert {p.dtype for p in run.model.parameters()} == {run.precision.input_dtype} == {torch.bfloat16}
    assert run.step() > 0


def test_an_o2_step_of_the_whole_network_is_the_one_worked_out_by_hand():
    torch.manual_seed(0)
    model = timm.create_model('inception_resnet_v2_npu', num_classes=10).to(memory_format=torch.channels_last)
    by_hand, start = copy.deepcopy(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    for module in by_hand.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.bfloat16()
    images, targets = torch.randn(2, 3, 75, 75).to(memory_format=torch.channels_last), torch.arange(2)
    loss = nn.functional.cross_entropy(by_hand(images.bfloat16()).float(), targets)
    gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
    expected = {name: weight - 0.1 * gradient.float()
                for (name, weight), gradient in zip(start.items(), gradients, strict=True)}
    precision = create_precision(CPU, **LEVELS['O2'])
    model, optimizer = precision.prepare(model, sgd(model))
    precision.step(nn.functional.cross_entropy(model(images), targets), optimizer)
    state = precision.model_state_dict(model)
    torch.testing.assert_close({name: state[name] for name in expected}, expected, rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(state[name], start[name]) for name in start)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('level', LEVELS)
def test_ddp_changes_nothing(process_group, level):
    plain, wrapped = Run(**LEVELS[level]), Run(**LEVELS[level])
    wrapped.model = nn.parallel.DistributedDataParallel(wrapped.model)
    for run in (plain, wrapped):
        with wrapped.model.no_sync():
            run.precision.step(run.loss(*batch(1)), run.optimizer, need_update=False)
        run.precision.step(run.loss(*batch(2)), run.optimizer)
        run.step(3)
    expected = dict(plain.precision.model_state_dict(plain.model))
    assert_same(dict(wrapped.precision.model_state_dict(wrapped.model)), expected)
    wrapped.precision.load_model_state_dict(wrapped.model, expected)


@pytest.mark.parametrize('kwargs', [*LEVELS.values(), dict(model_dtype=torch.bfloat16)])
def test_a_teacher_takes_the_images_of_its_student(kwargs):
    run = Run(**kwargs)
    teacher = run.precision.prepare_frozen(network())
    images = batch()[0].to(run.precision.input_dtype)
    with run.precision.autocast():
        torch.testing.assert_close(teacher(images), run.model(images), rtol=0, atol=0)


# ---- the loss scale ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('level', ['O1', 'O2'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_an_overflow_under_a_dynamic_scale_changes_no_bit_and_is_counted(level, dtype):
    run = Run(amp=True, opt_level=level, amp_dtype=dtype, loss_scale='dynamic')
    run.step(0, factor=2.0 ** -8)  # float16's first scale would overflow by itself
    assert run.precision.skipped_steps == 0
    before, scale = run.state(), run.precision.state_dict()['scale']
    run.step(1, factor=float('inf'))
    run.step(2, factor=float('nan'))
    assert_same(run.state(), before)
    assert (run.precision.skipped_steps, run.precision.skipped_in_a_row) == (2, 2)
    assert run.precision.state_dict()['scale'] == scale / 4
    run.step(3, factor=2.0 ** -8)
    assert (run.precision.skipped_steps, run.precision.skipped_in_a_row) == (2, 0)
    assert not torch.equal(run.state()['model.stem.weight'], before['model.stem.weight'])


@pytest.mark.parametrize('level', ['O1', 'O2'])
def test_an_overflow_in_the_very_first_step_leaves_a_fused_sgd_without_momentum(level):
    def fused(model):
        return sgd(model, fused=True)

    overflown, plain = (Run(NoNorm, fused, **LEVELS[level], loss_scale='dynamic') for _ in range(2))
    overflown.step(0, factor=float('inf'))
    for i in (1, 2):
        overflown.step(i)
        plain.step(i)
    assert_same(overflown.state(), plain.state())


@pytest.mark.parametrize('level', ['O1', 'O2'])
def test_a_static_scale_never_skips(level):
    run = Run(**LEVELS[level], loss_scale=128)
    run.step(factor=float('inf'))
    assert run.precision.skipped_steps == 0
    assert not run.weights()['stem.weight'].isfinite().all()


@pytest.mark.parametrize('level', ['O1', 'O2'])
@pytest.mark.parametrize('loss_scale', [1024.0, 'dynamic'])
def test_a_scale_does_not_change_the_step(level, loss_scale):
    scaled, plain = Run(**LEVELS[level], loss_scale=loss_scale), Run(**LEVELS[level])
    for i in range(2):
        scaled.step(i)
        plain.step(i)
    assert_same(scaled.weights(), plain.weights())


def test_float16_is_scaled_dynamically_and_bfloat16_not_at_all_unless_told():
    assert 'dynamic' in create_precision(CPU, amp=True, amp_dtype=torch.float16).description
    assert 'scale' not in create_precision(CPU, amp=True).description  # the CPU's half is bfloat16
    assert create_precision(CPU, amp=True, amp_dtype=torch.float16, loss_scale=64.0).state_dict() == {}


def test_the_scale_resumes():
    run, resumed = (Run(**LEVELS['O2'], loss_scale='dynamic') for _ in range(2))
    run.step(factor=float('inf'))
    resumed.precision.load_state_dict(run.precision.state_dict())
    assert resumed.precision.state_dict() == run.precision.state_dict()
    resumed.precision.load_state_dict({})  # another precision's
    assert resumed.precision.state_dict() == run.precision.state_dict()


# ---- accumulation and clipping -------------------------------------------------------------------------------------

@pytest.mark.parametrize('level', LEVELS)
def test_gradients_accumulate_until_the_update(level):
    whole, parts = (Run(NoNorm, **LEVELS[level]) for _ in range(2))
    before = parts.weights()
    whole.step()
    images, targets = batch()
    parts.precision.step(parts.loss(images[:3], targets[:3]) / 2, parts.optimizer, need_update=False)
    assert_same(parts.weights(), before)
    parts.precision.step(parts.loss(images[3:], targets[3:]) / 2, parts.optimizer)
    tolerance = 1e-6 if level == 'O0' else 3e-3
    torch.testing.assert_close(parts.weights(), whole.weights(), rtol=0, atol=tolerance)


@pytest.mark.parametrize('named', [True, False])
@pytest.mark.parametrize('mode, limit', [('norm', 0.1), ('value', 0.01), ('agc', 0.02)])
@pytest.mark.parametrize('level, loss_scale', [('O1', 1024.0), ('O2', 1024.0), ('O2', 'dynamic')])
def test_clipping_sees_unscaled_float32_gradients(level, loss_scale, mode, limit, named):
    clipped, plain = (Run(**LEVELS[level], loss_scale=loss_scale) for _ in range(2))
    parameters = [nn.Parameter(value) for value in plain.weights().values()]
    plain.step()
    left = loss_scale if (level, loss_scale) == ('O2', 1024.0) else 1.0  # SGD's constants take it up
    for p, gradient in zip(parameters, plain.gradients(left), strict=True):
        p.grad = gradient
    dispatch_clip_grad(parameters, limit, mode=mode)
    parameters_named = clipped.model.parameters() if named else None
    clipped.step(parameters=parameters_named, clip_grad=limit, clip_mode=mode)
    expected = [p.grad for p in parameters]
    unclipped = plain.gradients(left)
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(expected, unclipped, strict=True))
    torch.testing.assert_close(clipped.gradients(left), expected, rtol=1e-6, atol=0)


def test_only_the_parameters_named_are_clipped():
    run, plain = Run(**LEVELS['O2']), Run(**LEVELS['O2'])
    plain.step()
    run.step(parameters=list(run.model.parameters())[:-2], clip_grad=1e-4, clip_mode='value')
    assert all(gradient.abs().max() <= 1e-4 for gradient in run.gradients()[:-2])
    torch.testing.assert_close(run.gradients()[-2:], plain.gradients()[-2:], rtol=0, atol=0)


# ---- weights in, weights out ---------------------------------------------------------------------------------------

def test_o2_gives_its_masters_under_ordinary_names():
    run = Run(**LEVELS['O2'])
    run.step()
    state = run.precision.model_state_dict(run.model)
    assert list(state) == list(network().state_dict())
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    assert not torch.equal(state['stem.weight'], run.model.stem.weight.float())  # more than the half weights know


@pytest.mark.parametrize('first, second', [('O2', 'O1'), ('O2', 'O0'), ('O1', 'O2'), ('O0', 'O2'), ('O2', 'O2')])
def test_weights_and_momentum_resume_under_another_level(first, second):
    run, resumed = Run(**LEVELS[first]), Run(**LEVELS[second])
    run.step()
    resumed.precision.load_model_state_dict(resumed.model, run.precision.model_state_dict(run.model))
    resumed.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))  # torch would share the tensors
    assert_same(resumed.weights(), run.weights())
    assert_same({k: v for k, v in resumed.state().items() if 'momentum' in k},
                {k: v for k, v in run.state().items() if 'momentum' in k})
    assert torch.equal(resumed.model.stem.weight, run.weights()['stem.weight'].to(resumed.model.stem.weight.dtype))
    run.step(1)
    resumed.step(1)
    tolerance = 0 if first == second else 0.03
    torch.testing.assert_close(resumed.weights(), run.weights(), rtol=0, atol=tolerance)


def test_timms_parameter_groups_survive_o2():
    def layerwise(model):
        return create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=0.05, layer_decay=0.5)

    plain, run = Run(optimizer=layerwise), Run(optimizer=layerwise, **LEVELS['O2'])

    assert run.optimizer.state_dict()['param_groups'] == plain.optimizer.state_dict()['param_groups']
    # In the buffers each tensor starts at a multiple of eight elements.
    sizes = [[sum(-(-p.numel() // 8) * 8 for p in group['params']) for group in each.param_groups]
             for each in (run.optimizer, plain.optimizer)]
    assert sizes[0] == sizes[1]
    assert {group['weight_decay'] for group in run.optimizer.param_groups} == {0.0, 0.05}
    assert len({group['lr_scale'] for group in run.optimizer.param_groups}) > 1


def test_an_average_of_weights_follows_the_masters():
    run = Run(**LEVELS['O2'])
    ema = ModelEmaV3(run.precision.float32_model(run.model), decay=0.5)
    before = run.weights()
    run.step()
    ema.update(run.precision.float32_model(run.model))
    expected = {name: (before[name] + value) / 2 for name, value in run.weights().items()}
    torch.testing.assert_close(dict(ema.module.named_parameters()), expected, rtol=1e-6, atol=1e-7, check_dtype=True)
    torch.testing.assert_close(ema.module.norm.running_mean, run.model.norm.running_mean / 2, check_dtype=True)
    assert ema.module.eval()(batch()[0]).isfinite().all()


def test_lookaheads_slow_weights_reach_the_half_model():
    run = Run(optimizer=lambda model: create_optimizer_v2(model, 'lookahead_sgd', lr=0.1), **LEVELS['O2'])
    for i in range(7):
        run.step(i)
    run.optimizer.sync_lookahead()
    assert torch.equal(run.model.stem.weight, run.weights()['stem.weight'].bfloat16())


def test_frozen_weights_stay_what_they_were():
    def first_frozen(model):
        model.stem.requires_grad_(False)
        return sgd(model)

    run = Run(optimizer=first_frozen, **LEVELS['O2'])
    for i in range(2):
        run.step(i)
    assert torch.equal(run.weights()['stem.weight'], network().stem.weight)
    assert not torch.equal(run.weights()['block.weight'], network().block.weight)


# ---- options -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kwargs, words', [
    (dict(amp=True, amp_impl='magic'), '--amp-impl magic'),
    (dict(amp=True, opt_level='O3'), '--opt-level O3'),
    (dict(opt_level='O2'), '--opt-level O2 needs --amp'),
    (dict(amp_impl='apex'), '--amp-impl apex needs --amp'),
    (dict(loss_scale=128.0), '--loss-scale 128.0 needs --amp'),
    (dict(amp=True, loss_scale=0.0), '--loss-scale 0.0'),
    (dict(amp=True, loss_scale=-1.0), '--loss-scale -1.0'),
    (dict(amp=True, loss_scale=float('nan')), '--loss-scale nan'),
    (dict(amp=True, loss_scale='fast'), '--loss-scale fast'),
    (dict(amp=True, model_dtype=torch.bfloat16), 'leave one out'),
    (dict(amp=True, amp_dtype=torch.float32), 'not a 16-bit type'),
    (dict(amp=True, amp_impl='apex', amp_dtype=torch.bfloat16), 'float16 only'),
    (dict(amp=True, opt_level='O0', loss_scale=128.0), '--loss-scale 128.0'),
])
def test_contradictory_options_are_one_line(kwargs, words):
    with pytest.raises(UserError) as error:
        create_precision(CPU, **kwargs)
    assert words in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('kwargs, kind', [
    (dict(), FullPrecision),
    (dict(amp=True), Autocast),
    (dict(amp=True, opt_level='O0'), FullPrecision),
    (dict(amp=True, opt_level='O2'), HalfWeights),
])
def test_options_choose_the_level(kwargs, kind):
    assert type(create_precision(CPU, **kwargs)) is kind


@pytest.mark.parametrize('kwargs', [dict(amp=True, amp_dtype=torch.float16), LEVELS['O2']])
def test_second_order_optimizers_are_refused_where_derivatives_are_scaled_or_halved(kwargs):
    def second_order(model):
        optimizer = sgd(model)
        optimizer.is_second_order = True
        return optimizer

    with pytest.raises(UserError, match='second-order'):
        Run(optimizer=second_order, **kwargs)
    Run(optimizer=second_order, **LEVELS['O1'])


# ---- apex ----------------------------------------------------------------------------------------------------------

def forget_apex() -> None:
    for name in [name for name in sys.modules if name.partition('.')[0] == 'apex']:
        del sys.modules[name]


@pytest.fixture
def fresh_apex(monkeypatch):
    forget_apex()
    yield monkeypatch
    forget_apex()


@pytest.fixture
def apex(fresh_apex):
    fresh_apex.syspath_prepend(Path(__file__).parents[1] / 'doubles')
    return importlib.import_module('apex.amp')


APEX = dict(amp=True, amp_impl='apex')


@pytest.mark.parametrize(('level', 'loss_scale'), [
    ('O0', None), ('O1', None), ('O1', 128.0), ('O2', None), ('O2', 128.0),
])
def test_apex_trains_near_float32(apex, level, loss_scale):
    reference, run = Run(), Run(**APEX, opt_level=level, loss_scale=loss_scale)
    assert isinstance(run.precision, Apex)
    for i in range(3):
        factor = 1.0 if loss_scale or level == 'O0' else 2.0 ** -8
        assert run.step(i, factor) == pytest.approx(reference.step(i, factor), rel=0.02)
    torch.testing.assert_close(run.weights(), reference.weights(), rtol=0.02, atol=0.01)
    assert run.precision.skipped_steps == 0


@pytest.mark.parametrize('level', ['O1', 'O2'])
def test_apex_overflow_changes_no_bit_and_is_counted(apex, level):
    run = Run(**APEX, opt_level=level)
    run.step(0, factor=2.0 ** -8)
    before = run.state()
    run.step(1, factor=float('inf'))
    assert_same(run.state(), before)
    assert (run.precision.skipped_steps, run.precision.state_dict()['loss_scaler0']['loss_scale']) == (1, 2.0 ** 15)
    run.step(2, factor=2.0 ** -8)
    assert (run.precision.skipped_steps, run.precision.skipped_in_a_row) == (1, 0)


def test_apex_under_a_static_scale_never_skips(apex):
    run = Run(**APEX, opt_level='O2', loss_scale=128.0)
    run.step(factor=float('inf'))
    assert run.precision.skipped_steps == 0


def test_apex_o2_gives_and_takes_its_masters(apex):
    run = Run(**APEX, opt_level='O2', loss_scale=128.0)
    run.step()
    state = {name: value.clone() for name, value in run.precision.model_state_dict(run.model).items()}
    masters = [p for group in run.optimizer.param_groups for p in group['params']]
    torch.testing.assert_close(list(run.weights().values()), [p.detach() for p in masters], rtol=0, atol=0)
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    assert all(a is b for a, b in zip(run.precision.float32_model(run.model).parameters(), masters, strict=True))
    run.step(1)
    run.precision.load_model_state_dict(run.model, state)
    assert_same(dict(run.precision.model_state_dict(run.model)), state)
    assert torch.equal(run.model.stem.weight, state['stem.weight'].half())


def test_apex_masters_begin_as_the_float32_weights(apex):
    assert_same(Run(**APEX, opt_level='O2').weights(), dict(network().named_parameters()))


def test_apex_accumulates_and_clips_unscaled_gradients(apex):
    whole = Run(NoNorm, **APEX, opt_level='O2', loss_scale=128.0)
    whole.step(clip_grad=0.05, parameters=whole.model.parameters())
    norm = torch.stack([gradient.norm() for gradient in whole.gradients()]).norm()
    assert norm == pytest.approx(0.05, rel=1e-3)
    parts = Run(NoNorm, **APEX, opt_level='O2', loss_scale=128.0)
    images, targets = batch()
    parts.precision.step(parts.loss(images[:3], targets[:3]) / 2, parts.optimizer, need_update=False)
    parts.precision.step(parts.loss(images[3:], targets[3:]) / 2, parts.optimizer, clip_grad=0.05)
    torch.testing.assert_close(parts.weights(), whole.weights(), rtol=0, atol=1e-4)


def test_apex_scale_resumes(apex):
    run = Run(**APEX)
    run.step(factor=float('inf'))
    state = run.precision.state_dict()
    resumed = Run(**APEX)
    resumed.precision.load_state_dict({})  # another precision's
    resumed.precision.load_state_dict(state)
    assert resumed.precision.state_dict()['loss_scaler0']['loss_scale'] == 2.0 ** 15


def test_what_apex_refuses_is_one_line(apex):
    precision = create_precision(CPU, **APEX)
    model = network().double()
    with pytest.raises(UserError, match='Found param with dtype') as error:
        precision.prepare(model, sgd(model))
    assert '\n' not in str(error.value)


def test_pypis_unrelated_apex_is_recognised_in_one_line(fresh_apex, tmp_path):
    (tmp_path / 'apex').mkdir()
    (tmp_path / 'apex' / '__init__.py').write_text('')
    fresh_apex.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match='unrelated') as error:
        create_precision(CPU, **APEX)
    assert '\n' not in str(error.value)


def test_a_missing_apex_is_one_line(fresh_apex):
    fresh_apex.setitem(sys.modules, 'apex', None)
    with pytest.raises(UserError, match='needs apex') as error:
        create_precision(CPU, **APEX)
    assert '\n' not in str(error.value)

"""The network is timm's, to rounding, and has timm's interface."""

import collections
import copy
import io

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm
from timm.models import group_parameters, model_parameters
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.feature_extraction import create_feature_extractor

from timm_npu_irv2 import weights
from timm_npu_irv2.layers import BatchNormAct2d

from .conftest import OURS, REFERENCE, create_pair, fill, relative_error


@pytest.fixture(scope='module')
def small() -> nn.Module:
    """Our network with 10 classes, in eval mode. Not to be changed."""
    torch.manual_seed(0)
    return fill(timm.create_model(OURS, num_classes=10)).eval()


@pytest.mark.parametrize('size, batch', [(75, 16), (128, 4), (299, 2)])
@pytest.mark.parametrize('num_classes, in_chans', [(10, 3), (1001, 1)])
def test_logits_equal_timms(size, batch, num_classes, in_chans):
    reference, ours = create_pair(num_classes=num_classes, in_chans=in_chans)
    x = torch.randn(batch, in_chans, size, size)
    for training in (False, True):
        reference.train(training)
        ours.train(training)
        with torch.no_grad():
            assert relative_error(ours(x), reference(x)) < 1e-5


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of one training step, under timm's names."""
    F.cross_entropy(model.train()(x), torch.arange(len(x))).backward()
    return weights.convert({name: p.grad for name, p in model.named_parameters()}, to='timm')


def test_gradients_equal_timms():
    reference, ours = create_pair(torch.float64, num_classes=10)
    x = torch.randn(4, 3, 139, 139, dtype=torch.float64)
    actual, expected = gradients(ours, x), gradients(reference, x)
    assert actual.keys() == expected.keys()
    largest = max(grad.norm().item() for grad in expected.values())
    for name, grad in expected.items():
        # The bias before conv2d_7b's BatchNorm has a gradient that is zero but for rounding.
        scale = largest if name == 'block8.conv2d.bias' else grad.norm().item()
        assert (actual[name] - grad).norm().item() < 1e-10 * scale, name


def test_float32_gradients_are_nearer_to_timms_than_timms_own_in_another_layout():
    # In float32 a ReLU near zero may open or close, which moves a gradient by far more than rounding. timm's network in
    # channels_last differs from itself in that way; ours must not differ from it more.
    reference, ours = create_pair(num_classes=10)
    other_layout = copy.deepcopy(reference).to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 107, 107)
    expected = gradients(reference, x)

    def error(actual: dict[str, torch.Tensor]) -> float:
        return sum((actual[name] - grad).norm().item() ** 2 for name, grad in expected.items()) ** 0.5

    assert error(gradients(ours, x)) < error(gradients(other_layout, x.to(memory_format=torch.channels_last)))


def test_twenty_sgd_steps_give_timms_losses():
    # At 107 px: the last grid of smaller images is one pixel, where BatchNorm makes any rounding grow in every step.
    torch.manual_seed(0)
    reference = timm.create_model(REFERENCE, num_classes=10).double()
    ours = timm.create_model(OURS, num_classes=10).double()
    ours.load_state_dict(reference.state_dict())
    curves = []
    for model in (ours, reference):
        generator = torch.Generator().manual_seed(1)
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.002, momentum=0.9, weight_decay=1e-4)
        losses = []
        for _ in range(20):
            x = torch.randn(4, 3, 107, 107, dtype=torch.float64, generator=generator)
            y = torch.randint(10, (4,), generator=generator)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)


@pytest.mark.parametrize('norm_layer', ['groupnorm1', 'layernorm2d'])
def test_norms_across_channels_are_not_merged(norm_layer):
    torch.manual_seed(0)
    reference = timm.create_model(REFERENCE, num_classes=10, norm_layer=norm_layer).eval()
    ours = timm.create_model(OURS, num_classes=10, norm_layer=norm_layer).eval()
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert relative_error(ours(x), reference(x)) < 1e-5


def test_arguments_have_timms_effect():
    reference, ours = create_pair(num_classes=7, act_layer='silu', norm_eps=0.1, global_pool='avgmax', drop_rate=0.3)
    assert ours.head_drop.p == reference.head_drop.p == 0.3
    x = torch.randn(2, 3, 75, 75)
    with torch.no_grad():
        assert relative_error(ours.eval()(x), reference.eval()(x)) < 1e-5
    with pytest.raises(ValueError, match='output_stride 32'):
        timm.create_model(OURS, output_stride=16)


def test_factory_arguments_reach_every_tensor():
    model = timm.create_model(OURS, device='meta', dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.bfloat16)}


def test_features_equal_timms():
    torch.manual_seed(0)
    reference = timm.create_model(REFERENCE, features_only=True)
    whole = timm.create_model(OURS)
    ours = timm.create_model(OURS, features_only=True)
    assert ours.feature_info.channels() == reference.feature_info.channels()
    assert ours.feature_info.reduction() == reference.feature_info.reduction()
    whole.load_state_dict(reference.state_dict(), strict=False)
    ours.load_state_dict(whole.state_dict(), strict=False)
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        for actual, expected in zip(ours.eval()(x), reference.eval()(x), strict=True):
            assert relative_error(actual, expected) < 1e-5


def test_forward_intermediates_returns_the_stages(small):
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        last, stages = small.forward_intermediates(x)
        assert [stage.shape[1] for stage in stages] == [info['num_chs'] for info in small.feature_info]
        assert torch.equal(last, small.forward_features(x)) and torch.equal(stages[-1], last)
        early = small.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        assert len(early) == 1 and torch.equal(early[0], stages[1])
    with pytest.raises(ValueError, match='NCHW'):
        small.forward_intermediates(x, output_fmt='NLC')


def test_prune_intermediate_layers_keeps_what_was_asked_for(small):
    pruned = copy.deepcopy(small)
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = small.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
        assert pruned.prune_intermediate_layers([2]) == [2]
        assert torch.equal(pruned(x), expected)
    assert not any(name.startswith(('mixed_6a', 'classif')) for name in pruned.state_dict())


def test_head(small):
    x = torch.randn(2, 3, 75, 75)
    with torch.no_grad():
        features = small.forward_features(x)
        assert small.forward_head(features, pre_logits=True).shape == (2, small.num_features)
        assert torch.equal(small.forward_head(features), small(x))
    model = copy.deepcopy(small).to(torch.bfloat16)
    model.reset_classifier(3)
    assert model.num_classes == 3 and model.get_classifier().weight.dtype == torch.bfloat16
    model.reset_classifier(0)
    assert model(x.bfloat16()).shape == (2, model.num_features)


@pytest.mark.parametrize('coarse', [False, True])
def test_layer_groups_are_in_order(small, coarse):
    groups = group_parameters(small, small.group_matcher(coarse), reverse=True)
    assert groups.keys() == {name for name, _ in small.named_parameters()}
    assert len(set(groups.values())) == (6 if coarse else 46)
    order = ['conv2d_1a.conv.weight', 'conv2d_4a.conv.weight', 'repeat.9.conv2d.bias', 'repeat_1.19.conv2d.bias',
             'block8.conv2d.bias', 'classif.bias']
    assert [groups[name] for name in order] == sorted(groups[name] for name in order)


def test_layer_groups_are_timms(small):
    reference = timm.create_model(REFERENCE, num_classes=10)
    expected = group_parameters(reference, reference.group_matcher(), reverse=True)
    ours = group_parameters(small, small.group_matcher(), reverse=True)
    marked = {name: torch.full(p.shape, float(ours[name])) for name, p in small.named_parameters()}
    for name, mark in weights.convert(marked, to='timm').items():
        assert mark.unique().item() == expected[name], name


@pytest.mark.parametrize('recompute', [True, 'all', 'cheap'])
def test_grad_checkpointing_changes_nothing_but_memory(recompute):
    _, plain = create_pair(torch.float64, num_classes=10)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing(recompute)
    x, y = torch.randn(4, 3, 75, 75, dtype=torch.float64), torch.arange(4)
    for model in (plain, checkpointed):
        F.cross_entropy(model.train()(x), y).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True))
    # The second forward must not move the running statistics or count the batch again.
    states = plain.state_dict(), checkpointed.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert states[1]['repeat.0.siblings.bn.num_batches_tracked'] == 1


def test_batches_are_counted_on_the_host_and_saved(small):
    model = copy.deepcopy(small).train()
    with torch.no_grad():
        model(torch.randn(2, 3, 75, 75))
    assert sum('num_batches_tracked' in name for name, _ in model.named_buffers()) == 136
    state = model.state_dict()
    counts = [value for name, value in state.items() if name.endswith('num_batches_tracked')]
    assert len(counts) == sum(isinstance(m, BatchNormAct2d) for m in model.modules())
    assert all(count == 1 for count in counts)
    small_state = small.state_dict()
    assert small_state['conv2d_1a.bn.num_batches_tracked'] == 0
    clone = timm.create_model(OURS, num_classes=10)
    clone.load_state_dict(state)
    assert clone.conv2d_1a.bn.num_batches_tracked == 1
    clone.conv2d_1a.bn.reset_running_stats()
    assert clone.conv2d_1a.bn.num_batches_tracked == 0


def test_counting_batches_costs_no_operator(small):
    # Each would be a launch on an NPU. The count is added to its buffer when somebody looks.
    class IntegerOperators(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if any(isinstance(arg, torch.Tensor) and arg.dtype == torch.long and arg.ndim == 0 for arg in args):
                found.append(operator)
            return operator(*args, **(kwargs or {}))

    found, model = [], copy.deepcopy(small).train()
    with IntegerOperators():
        for _ in range(2):
            model(torch.randn(2, 3, 75, 75)).sum().backward()
        assert not found
        assert model.repeat[0].bn.num_batches_tracked == 2
        assert found


def test_eval_mode_leaves_statistics_alone(small):
    before = {name: value.clone() for name, value in small.state_dict().items()}
    with torch.no_grad():
        small(torch.randn(2, 3, 75, 75))
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_torchscript_runs_where_the_package_is_not_installed(small):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(small), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    assert 'timm_npu_irv2::' not in str(loaded.inlined_graph)
    x = torch.randn(2, 3, 75, 75)
    with torch.no_grad():
        assert relative_error(loaded(x), small(x)) < 1e-5


def test_fx_feature_extractor_finds_the_stages(small):
    # Tracing runs BatchNorm's counter, of timm's network as of ours.
    extractor = create_feature_extractor(copy.deepcopy(small), ['repeat', 'conv2d_7b'])
    x = torch.randn(1, 3, 75, 75)
    with torch.no_grad():
        assert relative_error(extractor(x)['conv2d_7b'], small.forward_features(x)) < 1e-5


def test_export_holds_plain_operators_only(small):
    batch = torch.export.Dim('batch', min=1, max=64)
    x = torch.randn(2, 3, 75, 75)
    program = torch.export.export(small, (x,), dynamic_shapes=({0: batch},))
    assert not any('timm_npu_irv2' in str(node.target) for node in program.graph.nodes)
    x = torch.randn(5, 3, 75, 75)
    with torch.no_grad():
        assert relative_error(program.module()(x), small(x)) < 1e-5


def test_compiles_without_a_graph_break(small):
    # 'aot_eager' traces forward and backward as the default backend does, and generates no code.
    compiled = torch.compile(copy.deepcopy(small).train(), backend='aot_eager', fullgraph=True)
    eager = copy.deepcopy(small).train()
    x, y = torch.randn(8, 3, 75, 75), torch.arange(8)
    losses = []
    for model in (compiled, eager):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_ema_averages_weights_and_carries_the_count(small):
    model = copy.deepcopy(small)
    ema = ModelEmaV3(model, decay=0.5)
    model.train()(torch.randn(2, 3, 75, 75))
    with torch.no_grad():
        model.classif.weight.add_(1.0)
    ema.update(model)
    assert torch.allclose(ema.module.classif.weight, model.classif.weight - 0.5, atol=1e-6)
    assert ema.module.conv2d_1a.bn.num_batches_tracked == 1


def test_sync_batch_norm_conversion_keeps_activation_and_count(small):
    model = copy.deepcopy(small).train()
    with torch.no_grad():
        model(torch.randn(2, 3, 75, 75))
    converted = convert_sync_batchnorm(model)
    norm = converted.repeat[0].siblings.bn
    assert isinstance(norm, nn.SyncBatchNorm) and isinstance(norm.act, nn.ReLU)
    assert norm.num_batches_tracked == 1
    assert dict(norm.named_buffers())['num_batches_tracked'].device == norm.running_mean.device
    assert converted.state_dict().keys() == small.state_dict().keys()


def test_the_head_comes_last_among_the_parameters(small):
    # timm's adaptive gradient clipping leaves out the last two parameters as the head's.
    left_out = list(small.parameters())[len(list(model_parameters(small, exclude_head=True))):]
    assert [p.shape for p in left_out] == [small.classif.weight.shape, small.classif.bias.shape]


# ---- recomputing ---------------------------------------------------------------------------------------------------

class Counter(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls[operator.overloadpacket.__name__] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize('recompute, convolutions', [(False, 189), ('cheap', 189), ('all', 189 + 166)])
def test_recomputing_cheap_outputs_convolves_once(recompute, convolutions):
    model = timm.create_model(OURS, num_classes=10).train()
    model.set_grad_checkpointing(recompute)
    with Counter() as counter:
        model(torch.randn(2, 3, 107, 107)).sum().backward()
    assert counter.calls['convolution'] == convolutions
    assert (counter.calls['native_batch_norm'] > 136) == bool(recompute)


def test_an_unknown_way_of_recomputing_is_refused():
    with pytest.raises(ValueError, match="'all' or 'cheap', not 'some'"):
        timm.create_model(OURS).set_grad_checkpointing('some')

"""PyTorch's own tools find in this network what they find in timm's."""

import copy
import gc
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from timm_npu_irv2 import weights
from timm_npu_irv2.deploy import to_inference

from ..conftest import relative_error
from .pair import images, not_in_place, short_pair

pytestmark = pytest.mark.filterwarnings('ignore')  # TorchScript is deprecated, and has users


@pytest.fixture(scope='module')
def pair():
    """Both networks. Not to be changed: see `copies`."""
    return short_pair()


@pytest.fixture
def copies(pair):
    return copy.deepcopy(pair[0]), copy.deepcopy(pair[1])


@pytest.fixture(scope='module')
def inference():
    """Both trained networks whole, and ours that only infers."""
    reference, _ = short_pair(blocks=20)
    return reference, to_inference(reference)


def agree(reference, ours, x=None, limit=1e-5):
    x = images() if x is None else x
    with torch.no_grad():
        return relative_error(ours(x), reference(x)) < limit


# ---- tracers -------------------------------------------------------------------------------------------------------

NODES = ['conv2d_1a', 'conv2d_2b', 'maxpool_3a', 'conv2d_4a', 'repeat.0', 'repeat.1.conv2d', 'repeat_1', 'block8']


def test_fx_extracts_timms_features(pair):
    with torch.no_grad():
        # Tracing in training mode counts a batch, in timm's network as in ours.
        expected, actual = (create_feature_extractor(copy.deepcopy(model), NODES)(images()) for model in pair)
    for name in NODES:
        assert actual[name].shape == expected[name].shape, name
        assert relative_error(actual[name], expected[name]) < 1e-5, name


def test_a_trace_can_be_saved(pair):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(pair[1], images()), buffer)
    buffer.seek(0)
    assert agree(pair[0], torch.jit.load(buffer), images(3))


def test_a_script_is_trained_then_evaluated_under_inference_mode(copies):
    # timm's train.py --torchscript does it.
    outputs = []
    for model in copies:
        scripted = torch.jit.script(model.train())
        for _ in range(3):  # the executor specialises after two
            scripted(images(8, size=107)).sum().backward()
        assert scripted.state_dict()['conv2d_1a.bn.num_batches_tracked'] == 3
        with torch.inference_mode():
            outputs.append(scripted.eval()(images()))
    assert relative_error(outputs[1], outputs[0]) < 1e-3


def test_flops_are_those_of_the_convolutions(pair):
    # Merged convolutions have the sum of their parts; the pooled branch of mixed_5b is on the same grid.
    counts = []
    for model in pair:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


# ---- transforms ----------------------------------------------------------------------------------------------------

def test_gradients_for_each_sample(pair):
    found = []
    for model in pair:
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

        def loss(parameters, x, model=model, buffers=buffers):
            return functional_call(model, (parameters, buffers), (x[None],)).square().sum()

        grads = vmap(grad(loss), in_dims=(None, 0))(parameters, images(3))
        found.append([weights.convert({name: value[i] for name, value in grads.items()}, to='timm') for i in range(3)])
    for expected, actual in zip(*found, strict=True):
        for name in ('conv2d_1a.conv.weight', 'repeat.0.conv2d.bias', 'repeat.1.branch1.0.bn.weight', 'classif.bias'):
            assert relative_error(actual[name], expected[name]) < 1e-3, name


def test_forward_mode_derivatives(pair, inference):
    for models in (pair, inference):
        assert_forward_mode_derivatives_agree(*models)


def assert_forward_mode_derivatives_agree(*models):
    tangent = images().flip(0)
    expected, *others = [jvp(model, (images(),), (tangent,))[1] for model in models]
    for actual in others:
        assert relative_error(actual, expected) < 1e-4
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(images(), tangent)
        for model in models[1:]:
            actual = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
            assert relative_error(actual, expected) < 1e-4


def test_functional_call_with_the_state_dict(pair):
    state = {name: value.clone() for name, value in pair[1].state_dict().items()}
    with torch.no_grad():
        assert relative_error(functional_call(pair[1], state, (images(),)), pair[0](images())) < 1e-5


def test_functional_call_in_training_counts_in_the_buffers_that_were_given(copies):
    for model in copies:
        model.train()
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        functional_call(model, state, (images(8, size=107),))
        assert state['conv2d_1a.bn.num_batches_tracked'] == 1
        assert model.conv2d_1a.bn.num_batches_tracked == 0


# ---- layers changed or replaced ------------------------------------------------------------------------------------

@pytest.mark.parametrize('place', ['repeat.0.conv2d', 'block8.conv2d', 'conv2d_2b.conv', 'repeat_1.1.conv2d'])
def test_pruning_takes_effect_in_the_forward_that_follows(copies, place):
    for model in copies:
        layer = model.get_submodule(place)
        names = ['weight', 'bias'] if layer.bias is not None else ['weight']
        for name in names:
            mask = (torch.arange(getattr(layer, name).numel()) % 2).view_as(getattr(layer, name))
            prune.custom_from_mask(layer, name, mask)
    assert agree(*copies)
    for model in copies:
        layer = model.get_submodule(place)
        with torch.no_grad():
            layer.weight_orig.mul_(2)
            if layer.bias is not None:
                layer.bias_orig.mul_(-3)
    assert agree(*copies)


@pytest.mark.parametrize('place', ['conv2d_2b.bn', 'mixed_6a.branch0.bn'])
def test_pruned_and_parametrized_norms_are_honoured(copies, place):
    for model in copies:
        norm = model.get_submodule(place)
        prune.custom_from_mask(norm, 'weight', torch.arange(norm.num_features) % 2)
        with torch.no_grad():
            norm.weight_orig.mul_(2)
        torch.nn.utils.parametrize.register_parametrization(norm, 'bias', Doubled(nn.Identity()))
    assert agree(*copies)


def test_a_learned_scale_has_a_gradient(copies):
    gradients = []
    for model in copies:
        model.double()
        for block in (*model.repeat, *model.repeat_2):
            block.scale = nn.Parameter(torch.tensor(block.scale, dtype=torch.float64))
        model(images(dtype=torch.float64)).square().sum().backward()
        gradients.append(torch.stack([block.scale.grad for block in (*model.repeat, *model.repeat_2)]))
    assert relative_error(gradients[1], gradients[0]) < 1e-6


@pytest.mark.parametrize('kind', [nn.ReLU, nn.Conv2d, nn.MaxPool2d, nn.Module])
def test_a_replaced_method_of_a_class_is_called(copies, kind, monkeypatch):
    name = '__call__' if kind is nn.Module else 'forward'
    original, called = getattr(kind, name), []

    def replacement(module, *args, **kwargs):
        called.append(module)
        return original(module, *args, **kwargs) * 1.01 if kind is not nn.Module else original(module, *args, **kwargs)

    monkeypatch.setattr(kind, name, replacement)
    x = images()
    reference, ours = (model(x) for model in copies)  # with gradients, when shortcuts are most
    assert relative_error(ours, reference) < 1e-5
    expected = {module for module in copies[1].modules() if isinstance(module, kind)}
    assert expected <= set(called)


def test_parametrizations_take_effect(copies):
    for model in copies:
        for place in ('repeat.0.conv2d', 'conv2d_4a.conv'):
            parametrizations.weight_norm(model.get_submodule(place))
        model.repeat[0].conv2d.parametrizations.weight.original0.data.mul_(2)
    assert agree(*copies)


class Doubled(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args) * 2


def as_attribute(model: nn.Module, *names: str) -> None:
    """Replace parameters by doubled tensors that are plain attributes, as hypernetworks do."""
    for name in names:
        place, _, kind = name.rpartition('.')
        layer = model.get_submodule(place)
        value = getattr(layer, kind).detach() * 2
        delattr(layer, kind)
        setattr(layer, kind, value)


@pytest.mark.parametrize('change', [
    lambda m: m.repeat.__setitem__(1, nn.Identity()),
    lambda m: m.repeat.append(copy.deepcopy(m.repeat[0])),
    lambda m: m.repeat.__setitem__(0, Doubled(m.repeat[0])),
    lambda m: setattr(m.repeat[0], 'conv2d', Doubled(m.repeat[0].conv2d)),
    lambda m: setattr(m.repeat_2[0], 'relu', nn.SiLU()),
    lambda m: setattr(m.repeat[1], 'scale', 0.5),
    lambda m: setattr(m.repeat[1], 'scale', nn.Parameter(torch.tensor(0.5))),
    lambda m: as_attribute(m, 'repeat.0.conv2d.weight', 'repeat_1.0.conv2d.bias'),
    lambda m: as_attribute(m, 'conv2d_2b.bn.weight', 'mixed_6a.branch0.bn.bias'),
    lambda m: setattr(m, 'conv2d_2b', Doubled(m.conv2d_2b)),
    lambda m: setattr(m.conv2d_2b, 'bn', Doubled(m.conv2d_2b.bn)),
    lambda m: setattr(m.conv2d_4a.bn, 'act', nn.GELU()),
    lambda m: setattr(m, 'maxpool_3a', nn.AvgPool2d(3, 2)),
    lambda m: setattr(m, 'maxpool_5a', nn.Sequential(nn.Conv2d(192, 192, 3, 2, bias=False).requires_grad_(False))),
    lambda m: setattr(m.repeat[0].conv2d, 'forward', lambda x: torch.zeros(len(x), 320, *x.shape[2:])),
    lambda m: setattr(m.block8, 'forward', lambda x: -x),
], ids=['identity', 'append', 'wrap a block', 'wrap conv2d', 'another activation', 'another scale', 'learned scale',
        "a convolution's plain tensors", "a norm's plain tensors", 'wrap conv2d_2b', 'wrap its norm',
        'another norm activation', 'another pooling', 'a pooling with weights', 'forward replaced',
        "block's forward replaced"])
def test_surgery_has_the_effect_it_has_on_timms(copies, change):
    before = [model(images()) for model in copies]
    for model in copies:
        torch.manual_seed(0)
        change(model)
        model.eval()
    assert agree(*copies)
    with torch.no_grad():
        assert relative_error(copies[1](images()), before[1]) > 1e-4


def test_every_relu_can_be_replaced(copies):
    for model in copies:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.ReLU):
                    setattr(parent, name, nn.SiLU())
        assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert agree(*copies)


def test_a_frozen_norm_stays_as_it_is(copies):
    for model in copies:
        model.train()
        model.conv2d_2b.bn.eval()
        model.conv2d_4a.bn.track_running_stats = False
        model(images(8, size=107))
    for name in ('conv2d_2b', 'conv2d_4a', 'conv2d_3b'):
        expected, actual = (getattr(model, name).bn for model in copies)
        assert relative_error(actual.running_mean, expected.running_mean) < 1e-5, name
        assert actual.num_batches_tracked == expected.num_batches_tracked == (name == 'conv2d_3b'), name


# ---- the count of batches ------------------------------------------------------------------------------------------

def test_the_count_of_batches_is_a_buffer_like_any_other(copies):
    reference, ours = copies
    for model in copies:
        model.train()(images(8, size=107))
    count = ours.conv2d_1a.bn.num_batches_tracked
    assert count == reference.conv2d_1a.bn.num_batches_tracked == 1
    assert dict(ours.named_buffers())['conv2d_1a.bn.num_batches_tracked'] is count
    assert ours.state_dict(keep_vars=True)['conv2d_1a.bn.num_batches_tracked'] is count
    assert ours.get_buffer('conv2d_1a.bn.num_batches_tracked') is count
    ours.conv2d_1a.bn.num_batches_tracked = torch.tensor(7)
    ours(images(8, size=107))
    assert ours.conv2d_1a.bn.num_batches_tracked == 8
    ours.conv2d_1a.bn.num_batches_tracked.zero_()
    assert copy.deepcopy(ours).conv2d_1a.bn.num_batches_tracked == 0
    assert ours.repeat[0].bn.num_batches_tracked == 2


def test_batches_that_leave_the_statistics_as_they_are_count(copies):
    for model in copies:
        for norm in (model.conv2d_1a.bn, model.conv2d_2b.bn):
            norm.momentum = 0.0
        model.train()(images(8, size=107))
        assert model.conv2d_1a.bn.num_batches_tracked == model.conv2d_2b.bn.num_batches_tracked == 1
        assert model.conv2d_1a.bn.running_var.var() > 0  # they are what they were


def test_the_count_is_shared_and_moves_with_the_model(copies):
    ours = copies[1].train()
    ours(images(8, size=107))
    assert ours.share_memory().conv2d_1a.bn.num_batches_tracked.is_shared()
    assert all(buffer.is_meta for buffer in copy.deepcopy(ours).to('meta').buffers())
    assert {name for name, _ in ours.named_buffers()} <= ours.state_dict().keys()


def test_weights_can_be_assigned(copies):
    # As transformers and accelerate load: a model on meta, whose tensors are replaced one by one.
    source = copies[1].train()
    source(images(8, size=107))
    _, target = short_pair(device='meta')
    target.load_state_dict({name: value.clone() for name, value in source.state_dict().items()}, assign=True)
    assert not any(tensor.is_meta for tensor in (*target.parameters(), *target.buffers()))
    assert target.repeat[0].bn.num_batches_tracked == 1
    assert agree(source.eval(), target.eval())


# ---- the network that only infers ----------------------------------------------------------------------------------

def test_inference_under_transforms_and_tracers(inference):
    reference, network = inference
    with torch.no_grad():
        expected = reference(images())
        assert relative_error(vmap(lambda x: network(x[None])[0])(images()), expected) < 1e-5
        assert relative_error(torch.jit.script(network)(images()), expected) < 1e-5
        assert relative_error(torch.fx.symbolic_trace(network)(images()), expected) < 1e-5
        assert relative_error(torch.jit.trace(network, images())(images()), expected) < 1e-5


def test_inference_sees_weights_edited_in_place(inference):
    network = copy.deepcopy(inference[1])
    with torch.inference_mode():
        before = network(images())
        for parameter in network.parameters():
            parameter.mul_(0.9)
        after = network(images())
        with torch.backends.mkldnn.flags(enabled=False):
            expected = network(images())
    assert relative_error(after, before) > 0.1 and relative_error(after, expected) < 1e-5


def test_inference_remembers_few_sizes(inference):
    network = copy.deepcopy(inference[1]).requires_grad_(False)

    def remembered():  # entries of dictionaries that have sizes of tensors for keys
        dictionaries = [each for each in gc.get_objects() if type(each) is dict]
        return sum(type(key) is torch.Size for each in dictionaries for key in list(each))

    before = remembered()
    with torch.inference_mode():
        for size in range(75, 120):
            network.conv2d_1a(images(1, size=size))
    assert 0 < remembered() - before <= 16


def test_both_directions_of_derivatives_agree(pair):
    x, direction = images().double(), images().double().flip(0)
    model = copy.deepcopy(not_in_place(pair[1])).double()
    _, forward = jvp(lambda x: model(x).sum(), (x,), (direction,))
    backward = torch.autograd.grad(model(x.requires_grad_()).sum(), x)[0]
    assert forward.item() == pytest.approx((backward * direction).sum().item(), rel=1e-6)

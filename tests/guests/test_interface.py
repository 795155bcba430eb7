"""timm's own tools and interface: heads, features, parameter groups, averages, freezing."""

import copy

import pytest
import timm
import torch
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3, freeze, unfreeze
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from timm_npu_irv2 import weights

from ..conftest import create_pair, relative_error
from .pair import images, short_pair

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def pair():
    """Both networks. Not to be changed: see `copies`."""
    return short_pair(blocks=1)


@pytest.fixture
def copies(pair):
    return copy.deepcopy(pair[0]), copy.deepcopy(pair[1])


def agree(reference, ours, x=None, limit=1e-5):
    x = images() if x is None else x
    with torch.no_grad():
        expected, actual = reference(x), ours(x)
    return actual.shape == expected.shape and relative_error(actual, expected) < limit


def assert_same_state(reference, ours):
    expected, actual = reference.state_dict(), weights.convert(ours.state_dict(), to='timm')
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f'{n}: {m}')


def test_a_new_head_is_timms(copies):
    reference, ours = copies
    for arguments in [(3,), (0,), (7, 'max'), (4,), (0, ''), (2, 'catavgmax'), (3,)]:
        for model in copies:
            torch.manual_seed(0)
            model.train().reset_classifier(*arguments)
            assert all(module.training for module in model.modules())
            model.eval()
        for name in ('num_classes', 'num_features', 'head_hidden_size'):
            assert getattr(ours, name) == getattr(reference, name), (arguments, name)
        assert ours.global_pool.pool_type == reference.global_pool.pool_type
        assert agree(reference, ours), arguments


@pytest.mark.parametrize('indices, prune_head', [(1, True), ([0, 2], True), ([4], False), ([2], False), ([3], True)])
def test_stages_left_out_are_timms(copies, indices, prune_head):
    reference, ours = copies
    kept = [model.prune_intermediate_layers(indices, prune_head=prune_head) for model in copies]
    assert kept[0] == kept[1]
    for name in ('num_classes', 'num_features', 'head_hidden_size'):
        assert getattr(ours, name) == getattr(reference, name)
    assert agree(reference, ours)
    ours.reset_classifier(2, 'avg')
    assert ours(images()).shape == (2, 2)


@pytest.mark.parametrize('form', ['list', 'dict', 'hook', 'getter', 'fx'])
def test_features_in_each_form(form):
    reference, ours = create_pair(num_classes=5)
    found = []
    for whole in (reference, ours):
        name = whole.pretrained_cfg['architecture']
        model = timm.create_model(name, features_only=True, feature_cls=form, out_indices=(0, 1, 3)).eval()
        inner = next(iter(model.children())) if form in ('hook', 'getter', 'fx') else model
        state = whole.state_dict()
        if form in ('list', 'dict'):  # names of one level may be flattened
            own = {name.replace('.', '_'): value for name, value in state.items()}
            state = {name: own[name.replace('.', '_')] for name in inner.state_dict()}
        inner.load_state_dict({name: state[name] for name in inner.state_dict()})
        with torch.no_grad():
            maps = model(images())
        found.append((list(maps.values()) if isinstance(maps, dict) else maps, model.feature_info.channels()))
    assert found[0][1] == found[1][1]
    for expected, actual in zip(found[0][0], found[1][0], strict=True):
        assert actual.shape == expected.shape and relative_error(actual, expected) < 1e-5


def test_parameter_groups_are_timms(pair):
    names = ('conv2d_1a.conv.weight', 'conv2d_4a.conv.weight', 'mixed_5b.branch1.1.conv.weight', 'repeat.0.conv2d.bias',
             'mixed_6a.branch0.conv.weight', 'repeat_1.0.conv2d.weight', 'block8.conv2d.weight', 'conv2d_7b.bn.weight',
             'classif.weight', 'classif.bias')
    decayed, plain = [], []
    for model in pair:
        known = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = param_groups_layer_decay(model, 0.05, layer_decay=0.7)
        found = {known[id(p)]: (group['lr_scale'], group['weight_decay']) for group in groups for p in group['params']}
        decayed.append([found[name] for name in names])
        plain.append([sum(p.numel() for p in group['params']) for group in param_groups_weight_decay(model, 0.05)])
    assert decayed[0] == decayed[1] and plain[0] == plain[1]


@pytest.mark.parametrize('kind', [ModelEma, ModelEmaV2, ModelEmaV3])
def test_averages_are_timms(copies, kind):
    averages = []
    for model in copies:
        average = kind(model.train(), decay=0.5)
        for step in range(1, 3):
            model(images(8, size=107))
            with torch.no_grad():
                model.conv2d_7b.conv.weight.mul_(0.9)
            average.update(model, **({'step': step} if kind is ModelEmaV3 else {}))
        averages.append(average.ema if kind is ModelEma else average.module)
    assert_same_state(*averages)
    assert agree(*(average.eval() for average in averages))


def test_torchs_average_and_its_statistics_are_timms(copies):
    averages = []
    for model in copies:
        average = AveragedModel(model.train())
        model(images(8, size=107))
        average.update_parameters(model)
        update_bn([images(8, size=107), images(8, size=107).flip(0)], average.train())
        averages.append(average.module)
    assert_same_state(*averages)


def test_frozen_layers_stay_as_they_are(copies):
    for model in copies:
        freeze(model, ['conv2d_1a', 'conv2d_2b', 'mixed_5b', 'repeat'])
        model.train()(images(8, size=107)).sum().backward()
        assert model.repeat[0].conv2d.weight.grad is None and model.mixed_6a.branch0.conv.weight.grad is not None
        unfreeze(model, ['conv2d_1a', 'conv2d_2b', 'mixed_5b', 'repeat'])
    reference, ours = copies
    for name in ('conv2d_1a', 'conv2d_2a', 'conv2d_2b', 'mixed_6a.branch0'):
        expected, actual = (model.get_submodule(f'{name}.bn') for model in copies)
        assert relative_error(actual.running_var, expected.running_var) < 1e-5, name
    assert agree(reference.eval(), ours.eval())


@pytest.mark.parametrize('convert', [convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm,
                                     lambda model: convert_splitbn_model(model, 2)])
def test_norms_can_be_converted(copies, convert):
    converted = [convert(model).eval() for model in copies]
    assert agree(*converted)

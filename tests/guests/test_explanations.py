"""Libraries that explain predictions see timm's activations and gradients: captum, pytorch-grad-cam."""

import pytest
import torch

from ..conftest import relative_error
from .pair import images, not_in_place, short_pair

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def pair():
    reference, ours = short_pair(torch.float64)
    return not_in_place(reference), not_in_place(ours)


def attributions(pair, attribute):
    x = images(1, torch.float64).requires_grad_()
    return [attribute(model)(x) for model in pair]


@pytest.mark.parametrize('method', ['GuidedBackprop', 'Deconvolution', 'Saliency', 'InputXGradient'])
def test_captums_gradients_are_timms(pair, method):
    captum = pytest.importorskip('captum.attr')
    expected, actual = attributions(pair, lambda model: lambda x: getattr(captum, method)(model).attribute(x, target=2))
    assert relative_error(actual, expected) < 1e-5


def test_deep_lifts_attributions_are_timms(pair):
    captum = pytest.importorskip('captum.attr')
    expected, actual = attributions(pair, lambda model: lambda x: captum.DeepLift(model).attribute(
        x, torch.zeros_like(x), target=2))
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize('method', ['IntegratedGradients', 'DeepLift'])
def test_captums_attributions_add_up(pair, method):
    """Completeness: their sum is the difference of the outputs (Sundararajan et al., 2017; Shrikumar et al., 2017)."""
    captum = pytest.importorskip('captum.attr')
    x, errors = images(1, torch.float64), []
    for model in pair:
        method_of = getattr(captum, method)(model)
        kwargs = {'n_steps': 50, 'internal_batch_size': 25} if method == 'IntegratedGradients' else {}
        found = method_of.attribute(x, torch.zeros_like(x), target=2, **kwargs).sum()
        with torch.no_grad():
            difference = (model(x) - model(torch.zeros_like(x)))[0, 2]
        assert abs(difference) > 1e-3
        errors.append((found - difference).item())
    # An error of the integration, and of DeepLift's rule for a pooling with overlapping windows.
    assert max(map(abs, errors)) <= 1e-4 and errors[1] == pytest.approx(errors[0], abs=1e-9)


@pytest.mark.parametrize('layer', ['conv2d_2b', 'repeat.1', 'repeat.0.conv2d', 'conv2d_7b'])
def test_captums_layers_are_timms(pair, layer):
    captum = pytest.importorskip('captum.attr')
    expected, actual = attributions(
        pair, lambda model: lambda x: captum.LayerGradCam(model, model.get_submodule(layer)).attribute(x, target=2))
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize('method', ['GradCAM', 'GradCAMPlusPlus', 'LayerCAM', 'FullGrad', 'HiResCAM'])
def test_grad_cams_are_timms(method):
    cam = pytest.importorskip('pytorch_grad_cam')
    target = pytest.importorskip('pytorch_grad_cam.utils.model_targets').ClassifierOutputTarget
    maps = []
    for model in short_pair():
        with getattr(cam, method)(model=model, target_layers=[model.conv2d_4a, model.repeat[1]]) as explain:
            found = [explain(input_tensor=images(1), targets=[target(label)]) for label in range(5)]
        maps.append(torch.stack([torch.from_numpy(each) for each in found]))  # some are zero, in both
    if method == 'FullGrad':  # it adds a map for each layer with a bias, and merged layers are fewer
        assert torch.corrcoef(torch.stack([each.flatten() for each in maps]))[0, 1] > 0.98
    else:
        assert relative_error(maps[1], maps[0]) < 1e-3

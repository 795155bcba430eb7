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


@pytest.mark.parametrize('method', ['IntegratedGradients', 'DeepLift'])
def test_captums_attributions_add_up(pair, method):
    captum = pytest.importorskip('captum.attr')
    kwargs = {'n_steps': 50} if method == 'IntegratedGradients' else {}

    def attribute(model):
        explain = getattr(captum, method)(model).attribute
        return lambda x: explain(x, torch.zeros_like(x), target=2, return_convergence_delta=True, **kwargs)

    (expected, expected_delta), (actual, delta) = attributions(pair, attribute)
    assert relative_error(actual, expected) < 1e-5
    # Integration has an error of its own, timm's too.
    assert abs(delta.item()) < max(1e-4, 1.01 * abs(expected_delta.item()))


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

"""The network that only infers gives the trained one's answers, wherever it is taken."""

import copy

import pytest
import timm
import torch

from tests.conftest import OURS, create_pair, fill, relative_error
from timm_npu_irv2 import UserError
from timm_npu_irv2 import device as devices
from timm_npu_irv2.deploy import InferenceNetwork, load, save, to_inference, trace

SIZE = 75
CLASSES = 7


@pytest.fixture(scope='module')
def pair():
    """timm's network and ours with the same random weights, in eval mode."""
    reference, ours = create_pair(num_classes=CLASSES)
    return reference.eval(), ours.eval()


@pytest.fixture(scope='module')
def network(pair):
    reference, _ = pair
    return to_inference(reference)


@pytest.fixture(scope='module')
def images():
    return torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalized(images, mean=0.5, std=0.5):
    return (images / 255 - mean) / std


@pytest.fixture(scope='module')
def expected(pair, images):
    with torch.inference_mode():
        return pair[0](normalized(images))


@pytest.mark.parametrize('source', ['timm', 'ours'])
@pytest.mark.parametrize('kind', ['float', 'uint8'])
def test_outputs_are_the_trained_networks(pair, images, expected, source, kind):
    network = to_inference(pair[source == 'ours'])
    with torch.inference_mode():
        output = network(images if kind == 'uint8' else normalized(images))
    assert relative_error(output, expected) < 2e-6


def test_the_written_out_path_agrees_with_the_fused_one(network, images, expected):
    with torch.inference_mode():
        fused = network(images)
        with torch.backends.mkldnn.flags(enabled=False):
            assert relative_error(network(images), fused) < 2e-6
    x = normalized(images).requires_grad_()
    network(x).sum().backward()  # a gradient of the image, for saliency maps
    assert x.grad.abs().sum() > 0


def test_the_normalisation_of_uint8_images_is_the_models_own(pair, images):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    network = to_inference(pair[0], mean=mean, std=std)
    shape = (1, 3, 1, 1)
    with torch.inference_mode():
        expected = pair[0](normalized(images, torch.tensor(mean).view(shape), torch.tensor(std).view(shape)))
        assert relative_error(network(images), expected) < 2e-6
    assert network.pretrained_cfg['mean'] == mean


@pytest.mark.parametrize('options', [
    dict(num_classes=0), dict(num_classes=1001, in_chans=4, global_pool='catavgmax'),
])
def test_every_head_and_every_number_of_channels(options):
    model = fill(timm.create_model(OURS, **options)).eval()
    x = torch.randn(1, options.get('in_chans', 3), SIZE, SIZE)
    with torch.inference_mode():
        assert relative_error(to_inference(model)(x), model(x)) < 2e-6


def test_trained_in_half_precision_it_is_folded_in_full(pair, images):
    half = copy.deepcopy(pair[1]).bfloat16()
    network = to_inference(half)
    assert network.conv2d_2a.weight.dtype == torch.float32
    with torch.inference_mode():
        exact = half.float()(normalized(images))
        assert relative_error(network(images), exact) < 2e-6
        assert to_inference(pair[1], dtype=torch.bfloat16)(images).dtype == torch.bfloat16
    fast = to_inference(pair[1], dtype='fast').conv2d_2a.weight.dtype
    assert fast == devices.fast_dtype(torch.device('cpu'))


def test_the_trained_network_stays_as_it_is(pair):
    before = {key: value.clone() for key, value in pair[1].state_dict().items()}
    network = to_inference(pair[1])
    network.conv2d_2a.weight.zero_()
    network.classif.weight.zero_()
    assert all(torch.equal(value, before[key]) for key, value in pair[1].state_dict().items())


@pytest.mark.parametrize('options', [dict(norm_layer='groupnorm1'), dict(act_layer='silu')])
def test_what_cannot_be_folded_is_refused(options):
    with pytest.raises(UserError, match='BatchNorm and ReLU'):
        to_inference(timm.create_model(OURS, num_classes=2, **options))
    with pytest.raises(UserError, match='not Inception-ResNet-v2'):
        to_inference(timm.create_model('resnet18'))


def test_new_weights_take_effect(network, images):
    """The packed copies of the weights do not outlive them."""
    other = copy.deepcopy(network)
    with torch.inference_mode():
        before = other(images)
        other.load_state_dict({key: value * 0.9 for key, value in network.state_dict().items()})
        assert relative_error(other(images), before) > 0.1
        assert other.double()(images).dtype == torch.float64


def test_an_image_alone_gets_the_answer_that_it_gets_in_a_batch(network, images):
    """For it some weights are packed otherwise, and the batch's stay."""
    with torch.inference_mode():
        together = network(images)
        for index in range(len(images)):
            assert relative_error(network(images[index:index + 1]), together[index:index + 1]) < 1e-5
        assert torch.equal(network(images), together)


# ------------------------------------------------------------------------------------------------- where it is taken


def test_saved_and_loaded_it_is_the_same_to_the_bit(network, images, tmp_path):
    network.pretrained_cfg['label_names'] = [f'class {i}' for i in range(CLASSES)]
    again = load(save(network, tmp_path / 'deployed'), device='cpu')
    with torch.inference_mode():
        assert torch.equal(again(images), network(images))
    assert again.pretrained_cfg['label_names'] == network.pretrained_cfg.pop('label_names')
    assert sorted(path.name for path in (tmp_path / 'deployed').iterdir()) == ['config.json', 'model.safetensors']


def test_a_folder_that_is_no_network_is_one_line(network, tmp_path):
    with pytest.raises(UserError, match='No such file'):
        load(tmp_path)
    save(network, tmp_path)
    (tmp_path / 'model.safetensors').write_bytes((tmp_path / 'model.safetensors').read_bytes()[:-100])
    with pytest.raises(UserError, match=r'model\.safetensors'):
        load(tmp_path)
    (tmp_path / 'config.json').write_text('{"format": "another"}')
    with pytest.raises(UserError, match='another kind'):
        load(tmp_path)


@pytest.mark.parametrize('kind', ['float', 'uint8'])
def test_exported_with_a_batch_of_any_size(network, images, expected, kind):
    example = images if kind == 'uint8' else normalized(images)
    exported = torch.export.export(network, (example[:2],), dynamic_shapes=({0: torch.export.Dim('batch')},))
    with torch.inference_mode():
        assert relative_error(exported.module()(example), expected) < 2e-6


@pytest.mark.long
def test_compiled_with_freezing(network, images, expected):
    torch._dynamo.reset()
    with torch.inference_mode(), torch._inductor.config.patch(freezing=True):
        assert relative_error(torch.compile(network)(images), expected) < 5e-6


def test_traced_it_is_the_same_for_any_batch(network, images, expected):
    graph = trace(network, images)
    with torch.inference_mode():
        for count in 3, 1, 2, 3, 1:
            assert relative_error(graph(images[:count]), expected[:count]) < 1e-5
    graph = trace(network, normalized(images))
    assert relative_error(graph(normalized(images)), expected) < 1e-5


def test_it_is_an_ordinary_module():
    network = InferenceNetwork(num_classes=2, device='meta')
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert sum(parameter.numel() for parameter in network.parameters()) > 54e6

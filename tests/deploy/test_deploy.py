"""The network that only infers gives the trained one's answers, wherever it is taken; the predictor pairs them."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.conftest import OURS, create_pair, fill, relative_error
from timm_npu_irv2 import UserError
from timm_npu_irv2 import device as devices
from timm_npu_irv2.deploy import InferenceNetwork, Predictor, load, save, to_inference

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


# --------------------------------------------------------------------------------------------------------- predictor


class Echo(torch.nn.Module):
    """Answers with the class that an image has in its first pixel, as a network of the right attributes would."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def forward(self, images):
        self.log.append(len(images))
        return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 256).float()


def marked(mark):
    image = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    image[0, 0, 0] = mark
    return image


@pytest.fixture
def small(network):
    """The network, which takes images of SIZE pixels."""
    network.pretrained_cfg['input_size'] = (3, SIZE, SIZE)
    return network


def test_ten_thousand_answers_go_to_those_who_asked(small):
    batches = []

    def ask(thread):
        wrong = 0
        for index in range(625):
            mark = (thread * 37 + index) % 256
            (answer,) = predictor.predict(marked(mark))
            wrong += answer['indices'][0] != mark
        return wrong

    with Predictor(small, compiled=Echo(batches), batch_size=8) as predictor, ThreadPoolExecutor(16) as threads:
        assert sum(threads.map(ask, range(16))) == 0
    assert sum(batches) == 10_000
    assert max(batches) <= 8
    assert len(batches) < 10_000 / 3  # 16 callers fill batches


def test_answers_are_the_networks(small, images):
    with torch.inference_mode():
        probabilities = small(images).softmax(-1)
    with Predictor(small, topk=3) as predictor:
        answers = predictor.predict(list(images))
    for answer, row in zip(answers, probabilities, strict=True):
        values, indices = row.topk(3)
        assert answer['indices'] == indices.tolist()
        assert answer['labels'] == [str(index) for index in answer['indices']]
        assert answer['probabilities'] == pytest.approx(values.tolist(), rel=1e-4)


def test_files_and_pillow_images_are_prepared_as_in_evaluation(small, tmp_path):
    small.pretrained_cfg['label_names'] = [f'class {i}' for i in range(CLASSES)]
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    config = timm.data.resolve_data_config(model=small)
    transform = timm.data.create_transform(**config, is_training=False)
    with torch.inference_mode():
        expected = small(transform(Image.fromarray(pixels))[None]).softmax(-1)[0]
    with Predictor(small, topk=CLASSES) as predictor:
        from_file, from_memory = predictor.predict([tmp_path / 'image.png', Image.fromarray(pixels)])
    assert from_file == from_memory
    assert from_file['probabilities'] == pytest.approx(expected[from_file['indices']].tolist(), abs=1e-5)
    assert from_file['labels'] == [f'class {index}' for index in from_file['indices']]
    del small.pretrained_cfg['label_names']


def test_an_error_reaches_its_callers_and_no_one_else(small, tmp_path):
    (tmp_path / 'torn.jpg').write_bytes(b'\xff\xd8\xff')

    class Refusing(Echo):
        def forward(self, images):
            if images[0, 0, 0, 0] == 13:
                raise RuntimeError('the device is gone')
            return super().forward(images)

    with Predictor(small, compiled=Refusing([]), batch_size=1) as predictor:
        with pytest.raises(RuntimeError, match='the device is gone'):
            predictor.predict(marked(13))
        with pytest.raises(UserError, match=r'torn\.jpg cannot be read'):
            predictor.predict([marked(1), tmp_path / 'torn.jpg'])
        with pytest.raises(UserError, match=r'the network takes torch.uint8 \(3, 75, 75\)'):
            predictor.predict(torch.zeros(3, 80, 80, dtype=torch.uint8))
        assert predictor.predict(marked(14))[0]['indices'][0] == 14


def test_closing_answers_what_was_asked(small):
    begun, go = threading.Event(), threading.Event()

    class Slow(Echo):
        def forward(self, images):
            begun.set()
            go.wait(10)
            return super().forward(images)

    predictor = Predictor(small, compiled=Slow([]), batch_size=2)
    with ThreadPoolExecutor(5) as threads:
        asked = [threads.submit(predictor.predict, marked(mark)) for mark in range(5)]
        begun.wait(10)
        while predictor._waiting.qsize() < 3:
            pass
        closing = threading.Thread(target=predictor.close)
        closing.start()
        go.set()
        assert [answer.result(10)[0]['indices'][0] for answer in asked] == list(range(5))
        closing.join(10)
    with pytest.raises(RuntimeError, match='closed'):
        predictor.predict(marked(1))
    predictor.close()


def test_it_is_an_ordinary_module():
    network = InferenceNetwork(num_classes=2, device='meta')
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert sum(parameter.numel() for parameter in network.parameters()) > 54e6

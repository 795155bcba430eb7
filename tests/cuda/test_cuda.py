"""The network, its operators, the precisions and a resumed run on a CUDA device: `bash tests/gpu.sh`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from timm_npu_irv2.deploy import Predictor, to_inference, trace
from timm_npu_irv2.ops import batch_norm_relu, normalize_images, scaled_relu, scaled_residual_relu, use_variants
from timm_npu_irv2.ops.activation import scaled_relu_reference
from timm_npu_irv2.ops.batch_norm import batch_norm_relu_reference
from timm_npu_irv2.ops.normalize import normalize_images_reference
from timm_npu_irv2.ops.residual import scaled_residual_relu_reference
from timm_npu_irv2.precision import create_precision

from ..conftest import create_pair, relative_error

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device'),
]

CUDA = torch.device('cuda')
TRAIN = Path(__file__).parents[2] / 'train_scripts' / 'train.py'


@pytest.fixture(autouse=True)
def exact():
    """Compare float32, not TF32."""
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.fixture(params=['aten', 'triton'])
def kernels(request):
    """The family of kernels of the operators."""
    if request.param == 'triton':
        pytest.importorskip('triton')
    with use_variants(kernels=request.param):
        yield request.param


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(CUDA, dtype)


def with_gradients(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    leaves = [each.clone().requires_grad_() for each in inputs]
    out = function(*leaves)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(values(*out.shape, seed=9, dtype=out.dtype))
    return [out.detach(), *(each.grad for each in leaves)]


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_operators(kernels, dtype, layout):
    def check(function, reference, *inputs):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for actual, expected in zip(with_gradients(function, *inputs), with_gradients(reference, *inputs), strict=True):
            assert relative_error(actual.double(), expected.double()) < tolerance

    x, branch = (values(4, 48, 17, 13, seed=seed, dtype=dtype).to(memory_format=layout) for seed in (1, 2))
    weight, bias = values(48, seed=3).abs() + 0.5, values(48, seed=4)
    check(lambda a: scaled_relu(a, 0.17), lambda a: scaled_relu_reference(a, 0.17), x)
    check(lambda a, b: scaled_residual_relu(a, b, 0.17), lambda a, b: scaled_residual_relu_reference(a, b, 0.17),
          x, branch)

    check(lambda a, w, b: batch_norm_relu(a, w, b, None, None, True, 0.1, 1e-3),
          lambda a, w, b: batch_norm_relu_reference(a, w, b, 1e-3), x, weight, bias)


def test_normalised_images(kernels):
    images = torch.randint(0, 256, (3, 3, 33, 31), dtype=torch.uint8, device=CUDA)
    mean, std = torch.tensor([0.5, 0.4, 0.3], device=CUDA), torch.tensor([0.2, 0.3, 0.5], device=CUDA)
    expected = normalize_images_reference(images, mean, std, torch.float32, torch.channels_last)
    torch.testing.assert_close(normalize_images(images, mean, std, torch.float32, torch.channels_last), expected)


def test_the_network_is_that_of_timm(kernels):
    reference, ours = (model.to(CUDA).train() for model in create_pair(num_classes=10))
    for model in reference, ours:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    images = values(4, 3, 107, 107)
    outputs = [model(images) for model in (ours, reference)]
    assert relative_error(*outputs) < 1e-4
    for output in outputs:
        output.square().mean().backward()
    known = dict(reference.named_parameters())
    shared = [(own.grad, known[name].grad) for name, own in ours.named_parameters() if name in known]
    assert len(shared) > 50
    gradients = [torch.cat([grad.flatten() for grad in grads]) for grads in zip(*shared, strict=True)]
    assert relative_error(*gradients) < 1e-2
    with torch.inference_mode():
        assert relative_error(ours.eval()(images), reference.eval()(images)) < 1e-4


def test_the_network_compiles():
    model = timm.create_model('inception_resnet_v2_npu', num_classes=10, drop_rate=0.0).to(CUDA).train()
    images = values(2, 3, 107, 107)
    with torch.no_grad():
        expected = model(images)
        actual = torch.compile(model, backend='aot_eager')(images)
    assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw', 'npufusedsgd'])
@pytest.mark.parametrize('level', ['O1', 'O2'])
def test_a_step_in_16_bits_lowers_the_loss(level, optimizer):
    torch.manual_seed(0)
    model = timm.create_model('inception_resnet_v2_npu', num_classes=10).to(CUDA, memory_format=torch.channels_last)
    try:
        chosen = timm.optim.create_optimizer_v2(model, optimizer, lr=1e-2, momentum=0.9)
    except Exception as error:
        pytest.skip(f'{optimizer} is not for this device: {error}')
    precision = create_precision(CUDA, amp=True, opt_level=level, loss_scale=128.0)
    model, chosen = precision.prepare(model.train(), chosen)
    images, targets = values(8, 3, 107, 107).to(precision.input_dtype), torch.arange(8, device=CUDA)
    losses = []
    for _ in range(8):
        with precision.autocast():
            loss = nn.functional.cross_entropy(model(images), targets)
        chosen.zero_grad()
        precision.step(loss, chosen)
        losses.append(loss.item())
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_inference(dtype):
    reference, ours = create_pair(num_classes=10)
    images = torch.randn(3, 3, 107, 107)
    with torch.inference_mode():
        expected = reference.eval()(images)
        network = to_inference(ours.eval(), CUDA, dtype)
        actual = network(images.to(CUDA)).float().cpu()
        replayed = trace(network, images.to(CUDA, dtype))
        again = [replayed(each.to(CUDA, dtype)).float().cpu() for each in (images.flip(0), images, images[:1])]
        again.append(torch.compile(network, backend='aot_eager')(images.to(CUDA, dtype)).float().cpu())
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    assert relative_error(actual, expected) < tolerance
    for found, right in zip(again, (expected.flip(0), expected, expected[:1], expected), strict=True):
        assert relative_error(found, right) < tolerance
    with Predictor(network, topk=2) as predictor:
        answers = predictor.predict(list(torch.randint(0, 256, (5, 3, 299, 299), dtype=torch.uint8)))
    assert len(answers) == 5 and all(len(answer['indices']) == 2 for answer in answers)


@pytest.mark.parametrize('words', [[], ['--deterministic']], ids=['as it is', 'deterministic'])
def test_a_resumed_run(words, tmp_path):
    """With --deterministic it ends in the same bits; without, in finite weights of the same shapes."""
    for split in 'train', 'val':
        for label in range(2):
            folder = tmp_path / 'data' / split / str(label)
            folder.mkdir(parents=True)
            for index in range(8):
                Image.effect_noise((90, 90), 60 + 60 * label).convert('RGB').save(folder / f'{index}.png')

    def train(name: str, *more: str) -> dict[str, torch.Tensor]:
        command = [sys.executable, TRAIN, '--data-dir', tmp_path / 'data', '--device', CUDA.type, '--img-size', 75,
                   '-b', 4, '-j', 1, '--opt-level', 'O2', '--sched', 'none', '--output', tmp_path, '--experiment', name,
                   *more]
        done = subprocess.run([str(each) for each in (*command, *words)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return torch.load(tmp_path / name / 'last.pth.tar', map_location='cpu', weights_only=True)['state_dict']

    whole = train('whole', '--epochs', '2')
    train('parts', '--epochs', '1')
    parts = train('parts', '--epochs', '2', '--resume', 'auto')
    assert whole.keys() == parts.keys() and all(value.isfinite().all() for value in parts.values())
    if words:
        assert all(torch.equal(whole[key], parts[key]) for key in whole)

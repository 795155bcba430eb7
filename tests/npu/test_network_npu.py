"""The network on an NPU: its logits, gradients and weights are the CPU's, and a training step leaves the host alone."""

import pytest

from ..ascend.environment import only_here

only_here()

import standin_journal  # noqa: E402 - from here on torch_npu is needed
import timm  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from ..ascend.pieces import error, images, sgd, step, train, vector  # noqa: E402


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model('inception_resnet_v2_npu', num_classes=10)


def test_five_steps_are_the_cpus(network):
    here, there = train(network, 'fused', 'npu', steps=5), train(network, 'plain', 'cpu', steps=5)
    names = 'logits', 'gradients', 'losses', 'weights'
    errors = {name: error(a, b) for name, a, b in zip(names, here, there, strict=True)}
    assert max(errors.values()) < 1e-6, errors


def test_a_training_step_neither_waits_nor_reads(network):
    network.npu().train()
    optimizer = sgd(network, 'fused')
    x, target = (each.npu() for each in images(2, 75))
    step(network, optimizer, x, target)
    with standin_journal.recording() as record:
        step(network, optimizer, x, target)
    assert record.synchronizations == 0
    assert not record.copies('D2H') and not record.copies('H2D')
    assert all(name.startswith('aclnn') for name in record.calls())
    assert record.calls()['aclnnFusedSgd'] == 1


def test_half_precision_gradients_are_the_cpus(network):
    # Smaller images leave BatchNorm a single value for each image in the last blocks.
    x, target = images(2, 149)
    gradients = []
    for device in 'cpu', 'npu':
        network.to(device).train().zero_grad()
        with torch.autocast(device, torch.float16):
            F.cross_entropy(network(x.to(device)), target.to(device)).backward()
        gradients.append(vector(parameter.grad for parameter in network.parameters()))
    assert F.cosine_similarity(*gradients, dim=0).item() > 0.99

"""--initial-checkpoint and --pretrained-path: whatever lies there, one line."""

import pytest
import timm
import torch

from timm_npu_irv2.errors import UserError
from timm_npu_irv2.serialization import save_weights
from timm_npu_irv2.training.options import parse_args
from timm_npu_irv2.training.setup import build_model

OPTIONS = ['--initial-checkpoint', '--pretrained-path']


def build(option: str, path) -> torch.nn.Module:
    return build_model(parse_args(['--model', 'test_resnet', '--num-classes', '3', option, str(path)]))


@pytest.mark.parametrize('option', OPTIONS)
@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors', 'a.pth.tar'])
@pytest.mark.parametrize('content', ['text', 'nothing', 'torn', 'list', 'unfolding'])
def test_what_is_no_weights_is_one_line(tmp_path, option, name, content):
    path = tmp_path / name
    save_weights(timm.create_model('test_resnet', num_classes=3).state_dict(), path)
    if content == 'list':
        torch.save([1, 2], path)
    elif content == 'unfolding':
        torch.save({'conv1.weight': torch.zeros(1).expand(10**12)}, path)
    else:
        path.write_bytes({'text': b'hello\n', 'nothing': b'', 'torn': path.read_bytes()[:-500]}[content])
    with pytest.raises(UserError, match=str(path)) as caught:
        build(option, path)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('option', OPTIONS)
@pytest.mark.parametrize('wrapped', [False, True])
def test_weights_are_loaded_averaged_ones_first(tmp_path, option, wrapped):
    torch.manual_seed(0)
    raw, average = (timm.create_model('test_resnet', num_classes=3).state_dict() for _ in range(2))
    torch.save({'state_dict': raw, 'state_dict_ema': average} if wrapped else average, tmp_path / 'a.pth')
    model = build(option, tmp_path / 'a.pth')
    head = 'fc.' if option == '--pretrained-path' else None  # which begins anew
    assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items()
               if head is None or not name.startswith(head))
    assert 'state_dict' not in model.pretrained_cfg


def test_the_head_is_adapted_to_the_classes(tmp_path):
    source = timm.create_model('test_resnet', num_classes=7).state_dict()
    save_weights(source, tmp_path / 'a.safetensors')
    model = build('--pretrained-path', tmp_path / 'a.safetensors')
    assert model.get_classifier().out_features == 3
    first = next(iter(source))
    assert torch.equal(model.state_dict()[first], source[first])

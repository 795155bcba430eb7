"""Weights keep every bit from dialect to dialect, and what is not Inception-ResNet-v2's is told apart."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch

from timm_npu_irv2 import UnknownDialect, UserError, serialization, weights

from .conftest import OURS, REFERENCE
from .kills import differences


def to_cadene(state_dict):
    """Cadene's names, without the counts that its old PyTorch did not keep."""
    return {
        name.replace('classif.', 'last_linear.'): value
        for name, value in state_dict.items() if not name.endswith('num_batches_tracked')
    }


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_timm_and_back_is_bit_equal(reference_state_dict, dtype):
    source = {name: value.to(dtype) if value.is_floating_point() else value
              for name, value in reference_state_dict.items()}
    ours = weights.convert(source, to='npu')
    assert ours.keys() == timm.create_model(OURS, device='meta').state_dict().keys()
    assert not differences(weights.convert(ours, to='timm'), source)


def test_cadene_and_back_is_bit_equal(reference_state_dict):
    source = to_cadene(reference_state_dict)
    source['last_linear.weight'] = torch.randn(1001, 1536)
    source['last_linear.bias'] = torch.randn(1001)
    assert not differences(weights.convert(weights.convert(source, to='npu'), to='cadene'), source)


def test_separate_siblings_and_back_is_bit_equal():
    model = timm.create_model(OURS, norm_layer='groupnorm1')
    source = timm.create_model(REFERENCE, norm_layer='groupnorm1').state_dict()
    separate = weights.convert(source, to='npu_separate')
    assert separate.keys() == model.state_dict().keys()
    assert not differences(weights.convert(separate, to='timm'), source)


def test_dialects_are_told_apart(reference_state_dict):
    assert weights.detect_dialect(reference_state_dict) == 'timm'
    assert weights.detect_dialect(to_cadene(reference_state_dict)) == 'cadene'
    assert weights.detect_dialect(weights.convert(reference_state_dict, to='npu')) == 'npu'


def test_an_unknown_dialect_names_expected_and_found_keys():
    with pytest.raises(UnknownDialect, match=r'siblings.*branch0.*last_linear.*found layer1\.0\.conv1\.weight'):
        weights.detect_dialect({'layer1.0.conv1.weight': torch.zeros(1)})


def test_damaged_weights_are_refused(reference_state_dict):
    ours = weights.convert(reference_state_dict, to='npu')
    ours['block8.siblings.conv.weight'] = ours['block8.siblings.conv.weight'][:-1]
    with pytest.raises(UserError, match=r'block8\.siblings\.conv\.weight has 383 channels where 384'):
        weights.convert(ours, to='timm')
    torn = {name: value for name, value in reference_state_dict.items() if name != 'mixed_5b.branch1.0.conv.weight'}
    with pytest.raises(UserError, match=r'mixed_5b\.siblings\.conv\.weight are not all there'):
        weights.convert(torn, to='npu')
    with pytest.raises(UserError, match="unknown dialect 'keras'"):
        weights.convert(reference_state_dict, to='keras')


def write(path, kind, state_dict):
    """A file as its program writes it."""
    if kind == 'zoo':
        cadene = {f'module.{name}': value for name, value in to_cadene(state_dict).items()}
        torch.save({'epoch': 239, 'arch': 'inceptionresnetv2', 'state_dict': cadene, 'best_acc1': 79.1}, path)
    elif kind == 'cadene':
        torch.save(to_cadene(state_dict), path)
    elif kind == 'timm':
        safetensors.torch.save_file(state_dict, path)
    else:
        serialization.save_weights(weights.convert(state_dict, to='npu'), path)
    return str(path)


@pytest.mark.parametrize('kind, suffix', [('zoo', '.pth.tar'), ('cadene', '.pth'), ('timm', '.safetensors'),
                                          ('npu', '.safetensors'), ('npu', '.pth')])
def test_create_model_loads_a_file_in_any_dialect(tmp_path, reference_state_dict, kind, suffix):
    path = write(tmp_path / f'weights{suffix}', kind, reference_state_dict)
    model = timm.create_model(OURS, checkpoint_path=path)
    actual = weights.convert(model.state_dict(), to='timm')
    expected = {name: value for name, value in reference_state_dict.items() if 'num_batches_tracked' not in name}
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_load_state_dict_converts_inside_a_wrapper(reference_state_dict):
    wrapper = torch.nn.ModuleDict({'student': timm.create_model(OURS)})
    wrapper.load_state_dict({f'student.{name}': value for name, value in reference_state_dict.items()})
    actual = weights.convert(wrapper['student'].state_dict(), to='timm')
    assert torch.equal(actual['mixed_7a.branch2.0.conv.weight'],
                       reference_state_dict['mixed_7a.branch2.0.conv.weight'])


def test_another_architecture_is_one_clear_error(tmp_path):
    path = tmp_path / 'resnet.pth'
    torch.save(timm.create_model('resnet10t', num_classes=2).state_dict(), path)
    with pytest.raises(UnknownDialect, match='not weights of Inception-ResNet-v2'):
        timm.create_model(OURS, checkpoint_path=str(path))


def test_a_file_that_is_no_checkpoint_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match='no such file'):
        serialization.load_weights(tmp_path / 'missing.pth')
    for name, content in (('a.pth', b'not a pickle'), ('a.safetensors', b'\xff' * 64), ('empty.pth', b'')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match='cannot be read as a checkpoint'):
            serialization.load_weights(tmp_path / name)
    torch.save({'state_dict': {'epoch': 1}}, tmp_path / 'none.pth')
    with pytest.raises(UserError, match='holds no weights'):
        serialization.load_weights(tmp_path / 'none.pth')


@pytest.mark.parametrize('num_classes, in_chans', [(1000, 3), (1000, 1), (7, 3)])
def test_pretrained_cadene_weights_are_adapted_as_timm_does(tmp_path, reference_state_dict, num_classes, in_chans):
    source = to_cadene(reference_state_dict)
    source['last_linear.weight'], source['last_linear.bias'] = torch.randn(1001, 1536), torch.randn(1001)
    torch.save(source, tmp_path / 'cadene.pth')
    model = timm.create_model(
        f'{OURS}.cadene_in1k', pretrained=True, num_classes=num_classes, in_chans=in_chans,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'cadene.pth')),
    )
    stem = source['conv2d_1a.conv.weight']
    expected_stem = stem if in_chans == 3 else stem.sum(1, keepdim=True)
    assert torch.allclose(model.conv2d_1a.conv.weight, expected_stem)
    assert torch.equal(model.conv2d_7b.conv.weight, source['conv2d_7b.conv.weight'])
    assert model.classif.out_features == num_classes
    assert torch.equal(model.classif.weight, source['last_linear.weight'][1:]) == (num_classes == 1000)


def test_pretrained_configs_are_registered():
    configs = {cfg.tag: cfg for cfg in map(timm.get_pretrained_cfg, timm.list_models(f'{OURS}.*', pretrained=True))}
    assert configs.keys() == {'tf_in1k', 'tf_ens_adv_in1k', 'cadene_in1k'}
    assert configs['tf_in1k'].hf_hub_id == 'timm/inception_resnet_v2.tf_in1k'
    assert configs['cadene_in1k'].label_offset == 1 and '520b38e4' in configs['cadene_in1k'].url


def test_a_download_with_a_wrong_hash_is_refused(tmp_path, monkeypatch, reference_state_dict):
    # timm checks hashes on demand only, and the file comes over plain http.
    torch.save(to_cadene(reference_state_dict), tmp_path / 'inceptionresnetv2-520b38e4.pth')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    url = (tmp_path / 'inceptionresnetv2-520b38e4.pth').as_uri()
    with pytest.raises(RuntimeError, match='invalid hash value'):
        timm.create_model(f'{OURS}.cadene_in1k', pretrained=True, pretrained_cfg_overlay=dict(url=url))
    assert not list((tmp_path / 'cache').rglob('*.pth'))


def run(*args):
    return subprocess.run(
        [sys.executable, '-m', 'timm_npu_irv2.weights', *map(str, args)], capture_output=True, text=True, check=False,
    )


def test_the_command_converts_files(tmp_path, reference_state_dict):
    source = write(tmp_path / 'zoo.pth.tar', 'zoo', reference_state_dict)
    assert 'cadene' in run(source, tmp_path / 'npu.safetensors', '--to', 'npu').stdout
    run(tmp_path / 'npu.safetensors', tmp_path / 'back.pth', '--to', 'cadene')
    expected = to_cadene(reference_state_dict)
    assert not differences(serialization.load_weights(tmp_path / 'back.pth'), expected)
    with (tmp_path / 'npu.safetensors').open('rb') as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), 'little')))
    assert header['__metadata__']['format'] == 'pt'  # what timm and transformers look for


def test_the_command_fails_in_one_line_and_leaves_nothing(tmp_path):
    torch.save({'x': torch.zeros(1)}, tmp_path / 'other.pth')
    for source, reason in (('missing.pth', 'no such file'), ('other.pth', 'not weights of Inception-ResNet-v2')):
        done = run(tmp_path / source, tmp_path / 'out.safetensors', '--to', 'timm')
        assert done.returncode == 2 and reason in done.stderr and done.stderr.count('\n') == 1
    done = run(tmp_path / 'other.pth', tmp_path / 'out.onnx', '--to', 'timm')
    assert done.returncode == 2 and 'use the ending .safetensors or .pth. `timm-npu-irv2 export-onnx`' in done.stderr
    folder = run(tmp_path / 'other.pth', tmp_path / 'nowhere' / 'out.pth', '--to', 'timm')
    assert folder.returncode == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ['other.pth']

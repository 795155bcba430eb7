"""Exports: what is written into the folder, and for whom."""

import argparse
import json
import shutil

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from tests.conftest import OURS, REFERENCE, relative_error
from tests.stock_timm import run_without_plugin
from timm_npu_irv2 import hub, serialization, weights
from timm_npu_irv2.hub.__main__ import main

from .conftest import (
    CLASSES,
    FILES,
    contents,
    images,
    logits,
    save_checkpoint,
    training_entry,
)

pytestmark = pytest.mark.filterwarnings('ignore')


def test_the_folder_holds_no_pickle(published, for_timm):
    assert set(contents(published)) == set(contents(for_timm)) == FILES
    assert load_file(published / 'model.safetensors')['classif.weight'].shape == (4, 1536)


def test_the_config_tells_what_the_training_did_with_images(published):
    config = json.loads((published / 'config.json').read_text())
    cfg = config['pretrained_cfg']
    assert config['architecture'] == OURS and config['num_classes'] == 4 and config['label_names'] == CLASSES
    assert cfg['input_size'] == [3, 96, 96] and cfg['crop_pct'] == 0.9 and cfg['interpolation'] == 'bilinear'
    assert cfg['mean'] == [0.4, 0.5, 0.6] and cfg['std'] == [0.2, 0.2, 0.2] and cfg['license'] == 'apache-2.0'


def test_timm_loads_the_folder_with_its_labels(published, state_dict):
    model = timm.create_model(f'local-dir:{published}', pretrained=True)
    assert type(model).__name__ == 'InceptionResnetV2Npu' and model.pretrained_cfg['label_names'] == CLASSES
    reference = timm.create_model(REFERENCE, num_classes=4)
    reference.load_state_dict(state_dict)
    assert relative_error(logits(model), logits(reference)) < 1e-5


def test_stock_timm_without_the_plugin_gives_our_logits(published, for_timm, tmp_path):
    (tmp_path / 'packages').mkdir()
    code = '''
import importlib.util, sys, timm, torch
assert importlib.util.find_spec('timm_npu_irv2') is None and not timm.is_model('inception_resnet_v2_npu')
model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval()
assert type(model).__name__ == 'InceptionResnetV2' and model.pretrained_cfg['label_names'][3] == 'dog'
with torch.inference_mode():
    torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
'''
    torch.save(images(), tmp_path / 'images.pt')
    done = run_without_plugin(code, for_timm, tmp_path / 'images.pt', tmp_path / 'logits.pt',
                              folder=tmp_path / 'packages', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert relative_error(torch.load(tmp_path / 'logits.pt'), logits(hub.from_pretrained(published))) < 1e-5


@pytest.mark.parametrize('kind', ['timm', 'cadene', 'zoo', 'safetensors'])
def test_export_takes_everyones_files(state_dict, tmp_path, kind):
    source = tmp_path / ('weights.safetensors' if kind == 'safetensors' else 'weights.pth')
    cadene = weights.convert(state_dict, to='cadene')
    if kind == 'safetensors':
        serialization.save_weights(state_dict, source)
    else:
        torch.save({
            'timm': {'state_dict': state_dict, 'epoch': 1, 'args': argparse.Namespace(img_size=96)},
            'cadene': cadene,
            'zoo': {'epoch': 3, 'arch': 'inceptionresnetv2', 'best_acc1': torch.tensor(1.0),
                    'state_dict': {f'module.{key}': value for key, value in cadene.items()}},
        }[kind], source)
    hub.export(source, tmp_path / 'out', target='timm')
    written = load_file(tmp_path / 'out' / 'model.safetensors')
    assert written.keys() == state_dict.keys()
    assert all(torch.equal(written[key], state_dict[key]) for key in written)
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['architecture'] == REFERENCE
    size = json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg']['input_size'][-1]
    assert size == (96 if kind == 'timm' else 299)


def test_ema_takes_the_average_and_its_figures(state_dict, run, tmp_path, caplog):
    average = {key: value + 1 if value.is_floating_point() else value for key, value in state_dict.items()}
    path = save_checkpoint(tmp_path / 'last.pth.tar', state_dict, epoch=5,
                           state_dict_ema=weights.convert(average, to='npu'))
    shutil.copy(run / 'report.json', tmp_path)
    hub.export(path, tmp_path / 'ema', target='timm', ema=True, dtype='float16')
    hub.export(path, tmp_path / 'raw', target='timm')
    written = load_file(tmp_path / 'ema' / 'model.safetensors')
    assert torch.equal(written['classif.bias'], average['classif.bias'].half())
    assert torch.equal(load_file(tmp_path / 'raw' / 'model.safetensors')['classif.bias'], state_dict['classif.bias'])
    assert ModelCard.load(tmp_path / 'ema' / 'README.md').data.eval_results[0].metric_value == 90.5
    assert 'rounded to float16' in (tmp_path / 'ema' / 'README.md').read_text()
    # the run evaluated the average: its figures are not those of the weights themselves
    assert ModelCard.load(tmp_path / 'raw' / 'README.md').data.eval_results is None
    assert 'use --ema to export those' in caplog.text


@pytest.mark.parametrize(('epoch', 'top1'), [(5, 90.5), (3, 91.25), (4, None)])
def test_a_checkpoint_is_published_with_the_figures_of_its_own_epoch(state_dict, run, tmp_path, epoch, top1):
    shutil.copy(run / 'report.json', tmp_path)
    hub.export(save_checkpoint(tmp_path / 'a.pth.tar', state_dict, epoch), tmp_path / 'out')
    results = ModelCard.load(tmp_path / 'out' / 'README.md').data.eval_results or []
    assert [each.metric_value for each in results][:1] == ([] if top1 is None else [top1])


def test_names_of_classes_are_as_many_as_the_logits(run, tmp_path, capsys):
    (tmp_path / 'names.txt').write_text('eins\nzwei\n')
    names = ['--class-names', str(tmp_path / 'names.txt')]
    assert main(['export', str(run / 'last.pth.tar'), str(tmp_path / 'out'), *names]) == 2
    assert 'has 2 names' in (error := capsys.readouterr().err) and error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_logits_without_a_class_are_named_unused(state_dict, tmp_path):
    training = training_entry(class_to_idx={'b': 1, 'a': 0})
    path = save_checkpoint(tmp_path / 'a.pth.tar', state_dict, 5, training=training)
    hub.export(path, tmp_path / 'out')
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['label_names'] == [
        'a', 'b', 'unused_2', 'unused_3']


def test_a_data_set_gives_the_names_of_its_classes(run, tmp_path):
    for name in ('train/n02, with a blank', 'train/n01', 'train/n04', 'train/n03', 'val/n01'):
        (tmp_path / 'data' / name).mkdir(parents=True)
    hub.export(run / 'last.pth.tar', tmp_path / 'out', class_names=tmp_path / 'data')
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['label_names'] == [
        'n01', 'n02, with a blank', 'n03', 'n04']


@pytest.mark.parametrize(('arguments', 'message'), [
    (['missing.pth', 'out'], 'no such file'),
    (['report.json', 'out'], 'cannot be read as a checkpoint'),
    (['other.pth', 'out'], 'not weights of Inception-ResNet-v2'),
    (['last.pth.tar', 'out', '--ema'], 'no averaged weights'),
    (['last.pth.tar', 'report.json'], 'cannot write report.json: File exists.'),
    (['last.pth.tar', 'out', '--report', 'curves.png'], 'curves.png cannot be read as JSON'),
])
def test_mistakes_are_told_in_a_line(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(run)
    torch.save({'fc.weight': torch.zeros(2, 2)}, run / 'other.pth')
    assert main(['export', *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
    assert not (run / 'out').exists()

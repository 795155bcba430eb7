"""Publishing: what export writes, and the way to the hub and back, against a real server (tests/hub_server.py)."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import OURS, REFERENCE, fill, relative_error
from tests.hub.server import TOKEN, HubServer, Repository
from tests.stock_timm import run_without_plugin
from timm_npu_irv2 import hub, serialization, weights
from timm_npu_irv2.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ['ant', 'bee', 'cat', 'dog']
FILES = {'model.safetensors', 'config.json', 'README.md', 'curves.png'}
ARGS = {
    'model': OURS, 'num_classes': 4, 'img_size': 96, 'mean': [0.4, 0.5, 0.6], 'std': [0.2, 0.2, 0.2], 'crop_pct': 0.9,
    'interpolation': 'bilinear', 'opt': 'adamw', 'lr': 0.001, 'hflip': 0.0, 'data_dir': '/secret/place', 'gp': None,
    'output': '/secret/place', 'amp': False, 'amp_impl': 'native', 'val_split': 'validation', 'model_kwargs': {},
}
REPORT = {
    'top1': 91.25, 'top5': 99.5, 'loss': 0.3, 'best_epoch': 3, 'epochs': 6, 'seconds': 7200.0, 'world_size': 8,
    'last_epoch': {'epoch': 5, 'eval_top1': 90.5, 'eval_top5': 99.0, 'eval_loss': 0.31},
    'device': {'type': 'npu', 'name': 'Ascend910B'}, 'precision': 'O2', 'versions': {'torch': '2.9.0'},
}

pytestmark = pytest.mark.filterwarnings('ignore')


# ------------------------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope='module')
def state_dict() -> dict[str, torch.Tensor]:
    """Weights of timm's network with four classes."""
    torch.manual_seed(0)
    return fill(timm.create_model(REFERENCE, num_classes=4)).state_dict()


@pytest.fixture(scope='module')
def run(state_dict, tmp_path_factory) -> Path:
    """The output folder of a training run: a checkpoint as train.py writes it, and its report."""
    folder = tmp_path_factory.mktemp('run')
    save_checkpoint(folder / 'last.pth.tar', state_dict, epoch=5)
    (folder / 'report.json').write_text(json.dumps(REPORT))
    Image.new('RGB', (8, 8)).save(folder / 'curves.png')
    return folder


def save_checkpoint(path: Path, state_dict, epoch: int, **more) -> Path:
    torch.save({
        'epoch': epoch, 'version': 2, 'arch': OURS, 'args': ARGS, 'state_dict': weights.convert(state_dict, to='npu'),
        'training': {'class_to_idx': {name: index for index, name in enumerate(CLASSES)}}, **more}, path)
    return path


@pytest.fixture(scope='module')
def published(run, tmp_path_factory) -> Path:
    """An export in this package's dialect."""
    return hub.export(run / 'last.pth.tar', tmp_path_factory.mktemp('export') / 'insects', datasets=['owner/insects'])


@pytest.fixture(scope='module')
def for_timm(run, tmp_path_factory) -> Path:
    """An export for stock timm."""
    return hub.export(run / 'last.pth.tar', tmp_path_factory.mktemp('export') / 'insects-timm', target='timm')


@pytest.fixture
def server():
    started = HubServer()
    yield started
    started.stop()


@pytest.fixture
def online(server, tmp_path, monkeypatch) -> HubServer:
    """This process talks to the server, with a token and an empty cache."""
    monkeypatch.setattr(constants, 'ENDPOINT', server.url)
    template = server.url + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setattr(huggingface_hub.hf_api.api, 'endpoint', server.url)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    return server


def environment(server: HubServer, cache: Path, **more: str) -> dict[str, str]:
    """As a user would set it."""
    return {**os.environ, 'HF_ENDPOINT': server.url, 'HF_HOME': str(cache), 'HF_TOKEN': TOKEN,
            'HF_HUB_DISABLE_XET': '1', 'OMP_NUM_THREADS': '1',
            'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}', **more}


def python(code: str, *args: object, env=None, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True,
                          check=False, env=env, cwd=cwd)


def command(*args: object, env=None, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-m', 'timm_npu_irv2.hub', *map(str, args)], capture_output=True, text=True,
                          check=False, env=env, cwd=cwd)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def images() -> torch.Tensor:
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model.eval()(images())


# ------------------------------------------------------------------------------------------------------- export


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
    assert '--ema takes them' in caplog.text


@pytest.mark.parametrize(('epoch', 'top1'), [(5, 90.5), (3, 91.25), (4, None)])
def test_a_checkpoint_is_published_with_the_figures_of_its_own_epoch(run, epoch, top1):
    content = hub._Checkpoint({}, epoch=epoch)
    assert hub._figures(run / 'checkpoint.pth.tar', content, None)['top1'] == top1


def test_names_of_classes(run, published, tmp_path, capsys):
    (tmp_path / 'names.txt').write_text('eins\nzwei\n')
    assert hub.main(['export', str(run / 'last.pth.tar'), str(tmp_path / 'out'), '--class-names',
                     str(tmp_path / 'names.txt')]) == 2
    assert 'has 2 names' in (error := capsys.readouterr().err) and error.count('\n') == 1
    assert not (tmp_path / 'out').exists()
    assert hub._names_in(hub._Checkpoint({}, class_to_idx={'b': 1, 'a': 0}), 3) == ['a', 'b', 'unused_2']
    for name in ('train/n02, with a blank', 'train/n01', 'val/n01'):
        (tmp_path / 'data' / name).mkdir(parents=True)
    assert hub._read_names(tmp_path / 'data') == ['n01', 'n02, with a blank']


@pytest.mark.parametrize(('arguments', 'message'), [
    (['missing.pth', 'out'], 'no such file'),
    (['report.json', 'out'], "can't be read as weights"),
    (['other.pth', 'out'], 'not weights of Inception-ResNet-v2'),
    (['last.pth.tar', 'out', '--ema'], 'no averaged weights'),
    (['last.pth.tar', 'report.json'], 'cannot be written'),
    (['last.pth.tar', 'out', '--report', 'curves.png'], 'not a report'),
])
def test_mistakes_are_told_in_a_line(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(run)
    torch.save({'fc.weight': torch.zeros(2, 2)}, run / 'other.pth')
    assert hub.main(['export', *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
    assert not (run / 'out').exists()


# ------------------------------------------------------------------------------------------------------ the card


def test_huggingface_hub_accepts_the_card(published, online):
    card = ModelCard.load(published / 'README.md', ignore_metadata_errors=False)
    card.validate()  # asks the server, which reads the metadata as strictly as huggingface_hub does
    data = card.data
    assert data.library_name == 'timm' and data.license == 'apache-2.0' and data.datasets == ['owner/insects']
    assert data.pipeline_tag == 'image-classification' and {'timm', 'npu'} <= set(data.tags)
    [top1, top5] = data.eval_results
    assert (top1.metric_type, top1.metric_value, top1.dataset_type) == ('accuracy', 90.5, 'owner/insects')
    assert top5.metric_value == 99.0 and data.model_name == 'insects'


def test_the_card_tells_the_recipe_and_no_place_of_the_machines(published):
    text = (published / 'README.md').read_text()
    assert 'lr: 0.001' in text and 'hflip: 0.0' in text and '8 × npu (Ascend910B)' in text
    assert '](curves.png)' in text and '`ant`, `bee`' in text and 'amp_impl' not in text
    for file in ('README.md', 'config.json'):
        assert 'secret' not in (published / file).read_text()


def test_every_block_of_the_card_runs(published, server, tmp_path):
    clone = tmp_path / 'clone'
    clone.mkdir()
    for name in ('hubconf.py', 'timm_npu_irv2', 'train_scripts'):
        (clone / name).symlink_to(ROOT / name)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 100, 3), dtype=np.uint8)).save(clone / 'image.jpg')
    env = environment(server, tmp_path / 'home')
    done = command('push', published, 'me/insects', env=env)
    assert done.returncode == 0, done.stderr
    text = server.files('me/insects')['README.md'].decode()
    blocks = re.findall(r'```(\w+)\n(.*?)```', text, flags=re.DOTALL)
    assert [language for language, _ in blocks] == ['python', 'python', 'python', 'bash', 'yaml']
    assert text.count('hf-hub:me/insects') == 5 and 'local-dir' not in text
    code = 'import json, sys\nfor block in json.loads(sys.argv[1]):\n    exec(block, {})'
    done = python(code, json.dumps([block for language, block in blocks if language == 'python']), env=env, cwd=clone)
    assert done.returncode == 0, done.stderr
    assert any(f'{name}: ' in done.stdout for name in CLASSES) and 'torch.Size([1, 4])' in done.stdout
    done = subprocess.run(
        ['bash', '-ec', blocks[3][1]], env=env, cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (clone / 'answers.png').stat().st_size > 1000 and any(name in done.stdout for name in CLASSES)
    from timm_npu_irv2.training.options import parse_args  # noqa: PLC0415 - the rest of this file needs no training

    (tmp_path / 'recipe.yaml').write_text(blocks[4][1])
    assert parse_args(['-c', str(tmp_path / 'recipe.yaml')]).hflip == 0


def test_the_commands_of_the_readme_are_known():
    text = (ROOT / 'README.md').read_text()
    commands = re.findall(r'^python -m timm_npu_irv2\.hub (.*)', text, flags=re.MULTILINE)
    assert [hub._parser().parse_args(shlex.split(each)).command for each in commands] == ['export', 'push', 'pull']
    for option in re.findall(r'`(--(?:for timm|ema|dtype|class-names)[^`]*)`', text):
        hub._parser().parse_args(['export', 'a', 'b', *option.replace('\n', ' ').split()])


# ------------------------------------------------------------------------------------------------------ transfers


def test_push_and_pull_with_the_environment_of_huggingface_hub(published, server, tmp_path):
    env = environment(server, tmp_path / 'home')
    done = command('push', published, 'me/insects', '--private', env=env)
    assert done.returncode == 0 and '/me/insects/commit/' in done.stdout, done.stderr
    assert 'model.safetensors: 100%' in done.stderr  # the progress bar
    assert server.repositories['me/insects'].private
    files = server.files('me/insects')
    assert files['model.safetensors'] == (published / 'model.safetensors').read_bytes()

    done = command('pull', 'me/insects', tmp_path / 'copy', env=env)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / 'copy') == {name: files[name] for name in FILES}
    assert all(headers.get('authorization') is None for kind, *_, headers in server.log if kind == 'cdn')

    server.stop()
    code = '''
import sys, timm
from timm_npu_irv2 import hub
print(timm.create_model('hf-hub:me/insects', pretrained=True).pretrained_cfg['label_names'])
sys.exit(hub.main(['pull', 'me/other']))
'''
    done = python(code, env={**env, 'HF_HUB_OFFLINE': '1'}, cwd=tmp_path)
    assert str(CLASSES) in done.stdout
    assert done.returncode == 2 and 'HF_HUB_OFFLINE is set' in done.stderr and done.stderr.count('\n') == 1


def test_create_model_from_the_hub(for_timm, online, published):
    online.add('me/insects', contents(for_timm))
    stock = timm.create_model('hf-hub:me/insects', pretrained=True)
    ours = hub.from_pretrained('me/insects')
    assert (type(stock).__name__, type(ours).__name__) == ('InceptionResnetV2', 'InceptionResnetV2Npu')
    assert ours.pretrained_cfg['label_names'] == CLASSES
    assert relative_error(logits(ours), logits(stock)) < 1e-5
    assert not any(path.endswith('.bin') for _, _, path, _ in online.log)


def test_a_branch_and_a_second_push(published, online):
    hub.push(published, 'me/insects')
    first = online.repositories['me/insects'].branches['main']
    hub.push(published, 'me/insects', revision='v2')
    repository = online.repositories['me/insects']
    assert repository.branches['main'] == first and set(repository.branches) == {'main', 'v2'}
    assert 'hf-hub:me/insects@v2' in online.files('me/insects', 'v2')['README.md'].decode()
    puts = [path for _, method, path, _ in online.log if method == 'PUT']
    assert len(puts) == len(set(puts)) == 2  # what is there is not sent again


@pytest.mark.parametrize('no_ranges', [False, True])
def test_an_interrupted_download_is_resumed(for_timm, online, tmp_path, no_ranges):
    online.add('me/insects', contents(for_timm))
    online.faults.cut, online.faults.no_ranges = [25_000_000, 35_000_000], no_ranges
    folder = hub._download('me/insects')
    assert (folder / 'model.safetensors').read_bytes() == (for_timm / 'model.safetensors').read_bytes()
    assert len(online.ranges()) == 2
    if not no_ranges:
        first, second = (int(value[len('bytes='):-1]) for value in online.ranges())
        assert (first, second) == (20 << 20, 50 << 20)  # it keeps whole chunks of 10 MiB


def test_a_file_with_a_wrong_hash_is_refused_and_forgotten(for_timm, online, tmp_path):
    online.add('me/insects', contents(for_timm))
    online.faults.corrupt = True
    with pytest.raises(UserError, match=r'model\.safetensors is damaged'):
        hub.pull('me/insects', tmp_path / 'copy')
    assert not (tmp_path / 'copy').exists()
    online.faults.corrupt = False
    assert set(contents(hub.pull('me/insects', tmp_path / 'copy'))) == FILES


def test_a_repository_that_has_moved_is_found(for_timm, online):
    online.add('me/insects', contents(for_timm))
    online.moved['me/beetles'] = 'me/insects'
    assert set(contents(hub._download('me/beetles'))) == FILES


def test_a_repository_of_pickles_is_not_read(for_timm, online):
    online.add('me/pickles', {'config.json': (for_timm / 'config.json').read_bytes(), 'pytorch_model.bin': b'pickle'})
    with pytest.raises(UserError, match=r'no model\.safetensors'):
        hub.from_pretrained('me/pickles')
    assert not any('pytorch_model' in path for _, _, path, _ in online.log)


@pytest.mark.parametrize(('name', 'token', 'message'), [
    ('me/missing', TOKEN, 'no such repository'),
    ('me/secret', None, 'private'),
    ('me/open', 'hf_wrong', r'refuses \(401\)'),
    ('me/open@v9', TOKEN, 'no such branch'),
    ('me/open', TOKEN, r'no model\.safetensors'),
    ('not a name', TOKEN, 'not a name'),
])
def test_what_is_not_to_be_had_is_told_in_a_line(online, monkeypatch, capsys, name, token, message):
    online.repositories['me/secret'] = Repository(private=True)
    online.add('me/open', {'config.json': b'{}'})
    monkeypatch.setenv('HF_TOKEN', token) if token else monkeypatch.delenv('HF_TOKEN')
    repo, _, revision = name.partition('@')
    assert hub.main(['pull', repo, *(['--revision', revision] if revision else [])]) == 2
    assert re.search(message, error := capsys.readouterr().err) and error.count('\n') == 1


@pytest.mark.parametrize(('path', 'status', 'message'), [
    ('/api/repos/create', 403, r'refuses \(403\)'), ('/commit/', 500, 'answers 500'), ('/api/repos', 401, 'HF_TOKEN')])
def test_a_push_that_is_refused_is_told_in_a_line(published, online, path, status, message):
    online.faults.statuses[path] = status
    with pytest.raises(UserError, match=message) as caught:
        hub.push(published, 'me/insects')
    assert '\n' not in str(caught.value)
    assert set(online.repositories.get('me/insects', Repository()).branches) <= {'main'}


def test_a_server_that_is_gone(for_timm, online, tmp_path):
    online.add('me/insects', contents(for_timm))
    hub.pull('me/insects', tmp_path / 'before')
    online.stop()
    assert set(contents(hub.pull('me/insects', tmp_path / 'after'))) == FILES  # from the cache
    for action in (lambda: hub.pull('me/others', tmp_path / 'others'), lambda: hub.push(for_timm, 'me/insects'),
                   lambda: hub.create('hf-hub:me/others'), lambda: hub.prepare('me/insects')):
        with pytest.raises(UserError, match='cannot be reached') as caught:
            action()
        assert '\n' not in str(caught.value) and 'HF_ENDPOINT' in str(caught.value)


def test_only_the_files_of_an_export_are_sent(for_timm, online, tmp_path):
    folder = shutil.copytree(for_timm, tmp_path / 'folder')
    (folder / 'last.pth.tar').write_bytes(b'a pickle')
    hub.push(folder, 'me/insects')
    assert set(online.files('me/insects')) == FILES | {'.gitattributes'}
    with pytest.raises(UserError, match='no exported model'):
        hub.push(tmp_path, 'me/insects')


# -------------------------------------------------------------------------------------------------------- loading


def test_weights_are_adapted_to_another_head_and_stem(published, state_dict):
    model = hub.from_pretrained(published, num_classes=7, in_chans=1)
    assert model.classif.out_features == 7 and model.conv2d_1a.conv.in_channels == 1
    expected = state_dict['conv2d_1a.conv.weight'].sum(1, keepdim=True)
    assert torch.allclose(model.conv2d_1a.conv.weight, expected, atol=1e-6)


def test_a_checkpoint_brings_its_preprocessing_and_its_labels(run, state_dict):
    model = hub.create(run / 'last.pth.tar')
    cfg = model.pretrained_cfg
    assert cfg['label_names'] == CLASSES and cfg['input_size'] == (3, 96, 96) and 'state_dict' not in cfg
    assert cfg['mean'] == [0.4, 0.5, 0.6] and cfg['crop_pct'] == 0.9
    assert torch.equal(model.classif.weight, state_dict['classif.weight'])
    assert hub.create(run / 'last.pth.tar', num_classes=2).num_classes == 2


def test_published_weights_of_timms_are_read_without_a_pickle(online, reference_state_dict, tmp_path, monkeypatch):
    serialization.save_weights(reference_state_dict, tmp_path / 'model.safetensors')
    files = {'model.safetensors': (tmp_path / 'model.safetensors').read_bytes(), 'pytorch_model.bin': b'a pickle'}
    online.add('timm/inception_resnet_v2.tf_in1k', files)
    online.add('timm/inception_resnet_v2.tf_ens_adv_in1k', {'pytorch_model.bin': b'a pickle'})
    model = hub.create(True)
    assert torch.equal(model.classif.bias, reference_state_dict['classif.bias'])
    with pytest.raises(UserError, match=r'no model\.safetensors'):
        hub.create('tf_ens_adv_in1k')
    with pytest.raises(huggingface_hub.errors.EntryNotFoundError):
        timm.create_model(f'{OURS}.tf_ens_adv_in1k', pretrained=True)
    assert not any('pytorch_model' in path for _, _, path, _ in online.log)


def test_another_network_is_refused(tmp_path, published):
    folder = shutil.copytree(published, tmp_path / 'other')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'architecture': 'resnet18'}))
    with pytest.raises(UserError, match='is a resnet18'):
        hub.from_pretrained(folder)
    with pytest.raises(UserError, match='no exported model'):
        hub.from_pretrained(tmp_path)


# -------------------------------------------------------------------------------------------------------- training


def test_train_publishes_its_best_weights(server, tmp_path):
    random = np.random.default_rng(0)
    for name in ('train/left', 'train/right', 'val/left', 'val/right'):
        (tmp_path / 'data' / name).mkdir(parents=True)
        for index in range(2):
            picture = random.integers(0, 255, (80, 80, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / 'data' / name / f'{index}.png')
    train = [sys.executable, str(ROOT / 'train_scripts' / 'train.py'), '--data-dir', str(tmp_path / 'data'), '-b', '4',
             '--num-classes', '2', '--img-size', '75', '--epochs', '1', '--warmup-epochs', '0', '-j', '0', '--device',
             'cpu', '--output', str(tmp_path), '--experiment', 'run', '--push-to-hub', 'me/sides', '--model-ema']
    refused = subprocess.run(train, env=environment(server, tmp_path / 'home', HF_TOKEN='hf_wrong'),
                             capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and 'refuses (401)' in refused.stderr.splitlines()[-1]
    assert not list((tmp_path / 'run').glob('*.pth.tar'))  # it is known before the training
    env = environment(server, tmp_path / 'home')
    done = subprocess.run(train, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = server.files('me/sides')
    assert set(files) == FILES | {'.gitattributes'}
    assert json.loads(files['config.json'])['label_names'] == ['left', 'right']
    report = json.loads((tmp_path / 'run' / 'report.json').read_text())
    card = ModelCard(files['README.md'].decode())
    assert card.data.eval_results[0].metric_value == round(report['top1'], 4)
    assert str(tmp_path) not in card.text
    average = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=True)['state_dict_ema']
    written = load_file(tmp_path / 'run' / 'sides' / 'model.safetensors')
    assert torch.equal(written['classif.weight'], average['classif.weight'])

"""The way to the hub and back, against a real server (server.py)."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import relative_error
from tests.hub.server import TOKEN, HubServer, Repository
from timm_npu_irv2 import hub
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.hub.__main__ import main
from timm_npu_irv2.hub.client import download
from train_scripts import train

from .conftest import CLASSES, FILES, ROOT, command, contents, environment, logits, python

pytestmark = pytest.mark.filterwarnings('ignore')


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
from timm_npu_irv2.hub.__main__ import main
print(timm.create_model('hf-hub:me/insects', pretrained=True).pretrained_cfg['label_names'])
sys.exit(main(['pull', 'me/other']))
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
    folder = download('me/insects')
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


def cached(online: HubServer, for_timm: Path) -> Path:
    """Return the weights of a repository in the cache: a link to a blob."""
    online.add('me/insects', contents(for_timm))
    path = download('me/insects') / 'model.safetensors'
    assert path.is_symlink()
    return path


def test_a_link_in_the_cache_to_another_file_leaves_that_file_where_it_is(for_timm, online, tmp_path):
    """Somebody has put a link to own weights in the place of those of the repository."""
    path, own = cached(online, for_timm), tmp_path / 'own.safetensors'
    own.write_bytes(b'precious')
    path.unlink()
    path.symlink_to(own)
    with pytest.raises(UserError, match=r'is a link to another file, .*own\.safetensors: remove the link'):
        download('me/insects')
    assert own.read_bytes() == b'precious' and path.is_symlink()


def test_a_damaged_file_that_cannot_be_removed_is_named(for_timm, online, monkeypatch):
    path = cached(online, for_timm)
    path.resolve().write_bytes(path.read_bytes()[:-1] + b'x')

    def refuse(self, missing_ok=False):
        raise OSError(errno.EROFS, 'Read-only file system')

    monkeypatch.setattr(Path, 'unlink', refuse)
    with pytest.raises(UserError, match=r'is damaged.* It cannot be removed from the cache \(Read-only file system\)'):
        download('me/insects')


def test_a_damaged_name_in_the_cache_is_told_with_the_place_of_the_cache(for_timm, online):
    folder = cached(online, for_timm).parents[2]
    online.stop()
    (folder / 'refs' / 'main').write_bytes(bytes([0xff]) * 40)
    with pytest.raises(UserError, match=rf'^me/insects: [^\n]*: check the cache {folder.parent}, or choose another'):
        download('me/insects')


def test_a_pipe_in_the_cache_is_not_waited_for(for_timm, online):
    blob = cached(online, for_timm).resolve()
    blob.unlink()
    os.mkfifo(blob)
    with pytest.raises(UserError, match='me/insects'):
        download('me/insects')


def test_a_repository_that_has_moved_is_found(for_timm, online):
    online.add('me/insects', contents(for_timm))
    online.moved['me/beetles'] = 'me/insects'
    assert set(contents(download('me/beetles'))) == FILES


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
    assert main(['pull', repo, *(['--revision', revision] if revision else [])]) == 2
    assert re.search(message, error := capsys.readouterr().err) and error.count('\n') == 1


@pytest.mark.parametrize(('path', 'status', 'message'), [
    ('/api/repos/create', 403, r'refuses \(403\)'), ('/commit/', 500, 'answered 500'), ('/api/repos', 401, 'HF_TOKEN')])
def test_a_push_that_is_refused_is_told_in_a_line(published, online, path, status, message):
    online.faults.statuses[path] = status
    with pytest.raises(UserError, match=message) as caught:
        hub.push(published, 'me/insects')
    assert '\n' not in str(caught.value)
    assert set(online.repositories.get('me/insects', Repository()).branches) <= {'main'}


def test_ctrl_c_is_no_traceback(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_npu_irv2.hub.__main__.pull', interrupted)
    assert main(['pull', 'me/insects']) == 130


def test_a_server_that_is_gone(for_timm, online, tmp_path):
    online.add('me/insects', contents(for_timm))
    hub.pull('me/insects', tmp_path / 'before')
    online.stop()
    assert set(contents(hub.pull('me/insects', tmp_path / 'after'))) == FILES  # from the cache
    for action in (lambda: hub.pull('me/others', tmp_path / 'others'), lambda: hub.push(for_timm, 'me/insects'),
                   lambda: hub.create('hf-hub:me/others'), lambda: hub.prepare('me/insects'),
                   lambda: hub.check_published('inception_resnet_v2_npu'),
                   lambda: train.main(['--model', 'hf-hub:me/others', '--data-dir', str(tmp_path), '--device', 'cpu']),
                   lambda: train.main(['--pretrained', '--data-dir', str(tmp_path), '--device', 'cpu'])):
        with pytest.raises(UserError, match='cannot be reached') as caught:
            action()
        assert '\n' not in str(caught.value) and 'HF_ENDPOINT' in str(caught.value)


def test_only_the_files_of_an_export_are_sent(for_timm, online, tmp_path):
    folder = shutil.copytree(for_timm, tmp_path / 'folder')
    (folder / 'last.pth.tar').write_bytes(b'a pickle')
    hub.push(folder, 'me/insects')
    assert set(online.files('me/insects')) == FILES | {'.gitattributes'}
    with pytest.raises(UserError, match='not an exported model'):
        hub.push(tmp_path, 'me/insects')


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

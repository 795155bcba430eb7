"""A file from somebody else cannot act: nothing is fetched, written or run that the user did not ask for."""

import http.server
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from timm_npu_irv2 import hub, rules, schema
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.hub.__main__ import main
from train_scripts import inference, onnx_export, train

from ..kills import write_images
from .conftest import ARGS, CLASSES, contents, save_checkpoint

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture
def stranger():
    """A server that must receive no request; its log has the paths of those that it got."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.send_header('Content-Length', '4')
            self.end_headers()
            self.wfile.write(b'evil')

        do_HEAD = do_GET  # noqa: N815 - the name is http.server's

        def log_message(self, *_: object) -> None:
            """Keep the console clean."""

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
    server.url, server.requests = f'http://127.0.0.1:{server.server_port}', requests
    yield server
    server.shutdown()
    server.server_close()


def downloading(stranger, folder: Path) -> dict:
    """Arguments with which timm downloads a file of the stranger's into a folder of the stranger's choice."""
    return {'pretrained': True, 'cache_dir': str(folder),
            'pretrained_cfg_overlay': {'url': f'{stranger.url}/sitecustomize.py', 'hf_hub_id': None}}


READERS = {
    'export': lambda path: hub.export(path, path.parent / 'out'),
    'torch.hub': hub.create,
    'inference.py': lambda path: inference.main(
        [str(path.parent / 'image.png'), '--checkpoint', str(path), '--device', 'cpu']),
    'onnx_export.py': lambda path: onnx_export.main([str(path.parent / 'out.onnx'), '--checkpoint', str(path)]),
}


@pytest.mark.parametrize('reader', READERS)
def test_a_checkpoint_cannot_have_a_file_downloaded(state_dict, stranger, tmp_path, reader):
    planted = tmp_path / 'planted'
    args = {**ARGS, 'model_kwargs': downloading(stranger, planted)}
    path = save_checkpoint(tmp_path / 'a.pth.tar', state_dict, 5, args=args)
    before = {each.name for each in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"a\.pth\.tar is refused: it sets the model argument 'pretrained'") as caught:
        READERS[reader](path)
    assert '\n' not in str(caught.value)
    assert stranger.requests == [] and {each.name for each in tmp_path.iterdir()} == before


def test_the_command_refuses_such_a_checkpoint_in_a_line(state_dict, stranger, tmp_path, capsys):
    args = {**ARGS, 'model_kwargs': downloading(stranger, tmp_path)}
    path = save_checkpoint(tmp_path / 'a.pth.tar', state_dict, 5, args=args)
    assert main(['export', str(path), str(tmp_path / 'out')]) == 2
    assert capsys.readouterr().err.count('\n') == 1 and stranger.requests == []


@pytest.mark.parametrize('arguments', [
    {'pretrained': True}, {'pretrained_cfg': {'url': 'http://127.0.0.1:1/x'}}, {'checkpoint_path': 'other.pth'},
    {'cache_dir': '/tmp'}, {'features_only': True}, {'scriptable': True}, {'device': 'meta'}, {'dtype': 'float16'},
    {'pretrained_model_args': {}}, {'pretrained_filter_fn': 'x'}, {'norm_layer': ['relu']}, {'num_classes': -1},
    {'drop_rate': 2}, {'global_pool': 'everything'}, {'act_layer': 'os.system("id")'}, {'norm_eps': '1'},
    {'model_name': 'resnet18'}, {'in_chans': 10**6}, {'output_stride': 8},
])
def test_a_checkpoint_sets_only_arguments_that_describe_the_layers(state_dict, tmp_path, arguments):
    path = save_checkpoint(tmp_path / 'a.pth.tar', state_dict, 5, args={**ARGS, 'model_kwargs': arguments})
    if set(arguments) <= {'num_classes', 'in_chans'}:  # the weights say how many there are
        assert hub.create(path).num_classes == 4
        return
    with pytest.raises(UserError, match=rf'a\.pth\.tar is refused: .*{next(iter(arguments))}') as caught:
        hub.create(path)
    assert '\n' not in str(caught.value)


def test_arguments_of_the_layers_are_kept(state_dict, tmp_path):
    kwargs = {'drop_rate': 0.3, 'norm_eps': 0.002, 'global_pool': 'max', 'act_layer': 'silu'}
    path = save_checkpoint(tmp_path / 'a.pth.tar', state_dict, 5, args={**ARGS, 'model_kwargs': kwargs})
    model = hub.create(path)
    assert model.head_drop.p == 0.3 and model.global_pool.pool_type == 'max'
    assert any(isinstance(module, torch.nn.SiLU) for module in model.modules())
    hub.export(path, tmp_path / 'out')
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['model_args']['act_layer'] == 'silu'


CONFIGS = {
    'model_args': lambda url: {'model_args': {'pretrained_cfg_overlay': {'url': url}, 'cache_dir': '.'}},
    'cfg in model_args': lambda url: {'model_args': {'pretrained_cfg': {'url': url}, 'pretrained': True}},
    'url': lambda url: {'pretrained_cfg': {'url': url}},
    'file': lambda url: {'pretrained_cfg': {'file': '/etc/passwd'}},
    'weights': lambda url: {'pretrained_cfg': {'state_dict': {'classif.bias': [0, 0]}}},
    'another repository': lambda url: {'pretrained_cfg': {'hf_hub_id': 'me/other'}},
    'a pickle': lambda url: {'pretrained_cfg': {'hf_hub_filename': 'pytorch_model.bin'}},
    'outside': lambda url: {'pretrained_cfg': {'hf_hub_filename': '../model.safetensors'}},
    'custom': lambda url: {'pretrained_cfg': {'custom_load': 'hf'}},
    'classes': lambda url: {'num_classes': 10**6, 'model_args': {}},
    'huge': lambda url: {'num_classes': 10**19},
    'negative': lambda url: {'pretrained_cfg': {'input_size': [3, -96, 96]}},
    'text': lambda url: {'pretrained_cfg': {'mean': 'grey'}},
    'labels': lambda url: {'label_names': [1, 2, 3, 4]},
    'architecture': lambda url: {'architecture': ['a']},
}


@pytest.mark.parametrize('kind', ['model_args', 'url', 'another repository'])
def test_a_repository_cannot_act(published, online, stranger, tmp_path, monkeypatch, kind):
    files = contents(published)
    config = json.loads(files['config.json'])
    for key, value in CONFIGS[kind](f'{stranger.url}/x').items():
        config[key] = {**config.get(key, {}), **value}
    online.add('me/evil', {**files, 'config.json': json.dumps(config).encode()})
    monkeypatch.chdir(tmp_path)
    for reader in (lambda: hub.from_pretrained('me/evil'), lambda: hub.pull('me/evil'),
                   lambda: hub.create_model('hf-hub:me/evil', pretrained=True),
                   lambda: hub.check_published('hf-hub:me/evil')):
        with pytest.raises(UserError, match=r'refused') as caught:
            reader()
        assert '\n' not in str(caught.value)
    assert stranger.requests == [] and [each.name for each in tmp_path.iterdir()] == ['cache']
    assert not any('me/other' in path for _, _, path, _ in online.log)


@pytest.mark.parametrize('kind', CONFIGS)
def test_a_folder_cannot_act(published, stranger, tmp_path, kind):
    folder = shutil.copytree(published, tmp_path / 'evil')
    config = json.loads((folder / 'config.json').read_text())
    for key, value in CONFIGS[kind](f'{stranger.url}/x').items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    (folder / 'config.json').write_text(json.dumps(config))
    for action in (hub.from_pretrained, lambda path: hub.create_model(f'local-dir:{path}', pretrained=True),
                   lambda path: hub.check_published(f'local-dir:{path}')):
        with pytest.raises(UserError, match='refused'):
            action(folder)
    assert stranger.requests == []


def test_a_folder_to_train_from_cannot_act(published, stranger, tmp_path):
    folder = shutil.copytree(published, tmp_path / 'evil')
    config = json.loads((folder / 'config.json').read_text())
    config['model_args'] = {'pretrained_cfg_overlay': {'url': f'{stranger.url}/x'}, 'cache_dir': str(tmp_path)}
    (folder / 'config.json').write_text(json.dumps(config))
    found = subprocess.run(
        [sys.executable, train.__file__, '--device', 'cpu', '--epochs', '1', '--model', f'local-dir:{folder}',
         '--data-dir', str(write_images(tmp_path / 'data')), '--output', str(tmp_path / 'output')],
        text=True, capture_output=True, check=False)
    assert found.returncode == 2 and 'config.json is refused' in found.stderr and 'Traceback' not in found.stderr
    assert stranger.requests == []


def test_a_repository_of_another_architecture_cannot_act(published, online, stranger):
    config = {'architecture': 'resnet18', 'num_classes': 4, 'pretrained_cfg': {},
              'model_args': {'pretrained_cfg': {'url': f'{stranger.url}/x'}}}
    online.add('me/resnet', {**contents(published), 'config.json': json.dumps(config).encode()})
    with pytest.raises(UserError, match="it sets the model argument 'pretrained_cfg', which a file may not"):
        hub.create_model('hf-hub:me/resnet', pretrained=True)
    assert stranger.requests == []


def test_a_repository_may_name_itself(published, online):
    files = contents(published)
    config = json.loads(files['config.json'])
    config['pretrained_cfg']['hf_hub_id'] = 'me/insects'
    online.add('me/insects', {**files, 'config.json': json.dumps(config).encode()})
    assert hub.from_pretrained('hf-hub:me/insects').pretrained_cfg['label_names'] == CLASSES


@pytest.mark.parametrize('size', [(10**6, 10**6), (2**40,)])
def test_a_tensor_that_unfolds_is_refused(state_dict, tmp_path, size):
    """One number, repeated: a file of a few bytes that would fill the memory when it is copied."""
    bomb = {**state_dict, 'classif.weight': torch.zeros(1).expand(size)}
    torch.save({'state_dict': bomb}, tmp_path / 'a.pth')
    with pytest.raises(UserError, match=r'a\.pth is refused: its tensors unfold to more than'):
        hub.create(tmp_path / 'a.pth')


def test_containers_that_unfold_are_refused(state_dict, tmp_path):
    """Each list has the one before it twice: the file grows by a few bytes, what is in it doubles."""
    nested: list = []
    for _ in range(35):
        nested = [nested, nested]
    path = save_checkpoint(tmp_path / 'a.pth.tar', state_dict, 5, args={**ARGS, 'model_kwargs': {'x': nested}})
    with pytest.raises(UserError, match=r'a\.pth\.tar is refused: it nests more than'):
        hub.create(path)


def test_an_argument_that_describes_no_layer_is_refused_before_the_network_sees_it():
    with pytest.raises(rules.Mismatch, match="sets the model argument 'path'; a file may set only num_classes"):
        schema.check_model_arguments({'path': '/etc/passwd'}, 'inception_resnet_v2_npu')

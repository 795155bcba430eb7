"""torch.hub: the entries of hubconf.py, from a clone that is not installed."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch

from tests.conftest import REFERENCE, fill, relative_error
from tests.stock_timm import run_without_plugin

ROOT = Path(__file__).resolve().parent.parent
CODE = '''
import importlib.util, json, sys, torch

images, checkpoint, answers, folder = sys.argv[1:]
torch.hub.set_dir(folder)  # where torch.hub keeps its clones: ours is there as if it had come from GitHub
github = {'github': 'owner/repository:main', 'skip_validation': True, 'trust_repo': True}
told = {'entries': torch.hub.list(**github)}
for entry in told['entries']:
    told[entry] = torch.hub.help(model=entry, **github)
with torch.inference_mode():
    images = torch.load(images)
    model = torch.hub.load('.', 'inception_resnet_v2_npu', source='local', pretrained=checkpoint).eval()
    told['logits'] = model(images).tolist()
    told['cfg'] = model.pretrained_cfg['num_classes']
    features = torch.hub.load('.', 'inception_resnet_v2_npu_features', source='local', pretrained=checkpoint,
                              out_indices=(1, 4)).eval()
    told['features'] = [list(feature.shape) for feature in features(images)]
    told['last'] = features(images)[-1].mean((2, 3)).tolist()
random = torch.hub.load('.', 'inception_resnet_v2_npu', source='local', num_classes=7, in_chans=1)
told['random'] = list(random(torch.zeros(2, 1, 75, 75)).shape)
try:
    torch.hub.load('.', 'inception_resnet_v2_npu', source='local', pretrained='tf_in2k')
except Exception as error:
    told['error'] = f'{type(error).__name__}: {error}'
json.dump(told, open(answers, 'w'))
'''

pytestmark = pytest.mark.filterwarnings('ignore')


def test_the_entries_work_in_a_clone_with_nothing_but_the_dependencies(tmp_path):
    clone = tmp_path / 'hub' / 'owner_repository_main'
    shutil.copytree(ROOT / 'timm_npu_irv2', clone / 'timm_npu_irv2', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'hubconf.py', clone)
    torch.manual_seed(0)
    reference = fill(timm.create_model(REFERENCE, num_classes=4)).eval()
    images = torch.randn(2, 3, 96, 96)
    torch.save(images, tmp_path / 'images.pt')
    torch.save({'state_dict': reference.state_dict()}, tmp_path / 'model.pth')
    (tmp_path / 'packages').mkdir()
    paths = [tmp_path / name for name in ('images.pt', 'model.pth', 'answers.json', 'hub')]
    done = run_without_plugin(CODE, *paths,
                              folder=tmp_path / 'packages', cwd=clone)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / 'answers.json').read_text())
    assert told['entries'] == ['inception_resnet_v2_npu', 'inception_resnet_v2_npu_features']
    assert 'cadene_in1k' in told['inception_resnet_v2_npu'] and 'hf-hub:' in told['inception_resnet_v2_npu']
    assert 'out_indices' in told['inception_resnet_v2_npu_features']
    with torch.inference_mode():
        assert relative_error(torch.tensor(told['logits']), reference(images)) < 1e-5
        last = reference.forward_features(images).mean((2, 3))
        assert relative_error(torch.tensor(told['last']), last) < 1e-5
    assert told['features'] == [[2, 192, 20, 20], [2, 1536, 1, 1]] and told['cfg'] == 4
    assert told['random'] == [2, 7]
    assert told['error'].startswith('UserError: ') and 'tf_ens_adv_in1k' in told['error'] and '\n' not in told['error']

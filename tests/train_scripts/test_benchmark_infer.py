"""benchmark.py infer: everyone takes a turn on the same network, and the figures end in a table, a JSON and a chart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from timm_npu_irv2.benchmarks import inference
from timm_npu_irv2.deploy import onnx

SCRIPT = Path(__file__).parents[2] / 'train_scripts' / 'benchmark.py'


def test_a_run_gives_a_table_a_json_and_a_chart(tmp_path):
    pytest.importorskip('matplotlib')
    pytest.importorskip('onnxruntime')
    command = [sys.executable, SCRIPT, 'infer', '--device', 'cpu', '--img-size', '75', '-b', '2', '--rounds', '2',
               '--latencies', '2', '--warmup', '0', '--only', 'ours', 'ours-onnxruntime', 'ours-unfolded', 'timm',
               'timm-channels-last', '--predictor', '--json', tmp_path / 'infer.json',
               '--chart', tmp_path / 'infer.png']
    environment = {**os.environ, 'TIMM_NPU_IRV2_CACHE': str(tmp_path / 'cache')}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / 'infer.json').read_text())
    assert list(result['rows']) == ['ours', 'ours-onnxruntime', 'ours-unfolded', 'timm', 'timm-channels-last']
    assert all(value > 0 for row in result['rows'].values() for value in row)
    assert [len(rates) for rates in result['images_per_second'].values()] == [2] * 5
    assert 'of the best peer, timm-channels-last' in done.stdout
    assert done.stdout.count('of the rate of whole batches') == 2
    (record,) = (tmp_path / 'cache' / 'engines').iterdir()
    report = json.loads(record.read_text())
    assert {'torch', 'onnxruntime'} == report['figures'].keys()
    assert f"engine='auto' is {report['engine']} from now on" in done.stdout
    assert (tmp_path / 'infer.png').stat().st_size > 1000


def test_all_compute_the_same(tmp_path):
    """A peer with other weights, or a wrong normalisation, would be measured all the same."""
    pytest.importorskip('onnxruntime')
    names = ['ours', 'ours-traced', 'ours-onnxruntime', 'ours-unfolded', 'timm', 'timm-channels-last', 'onnxruntime']
    inference.prepare(tmp_path, names, 75)
    model = timm.create_model('inception_resnet_v2')
    model.load_state_dict(torch.load(tmp_path / 'timm.pth', weights_only=True))
    images = torch.randn(2, 3, 75, 75)
    with torch.inference_mode():
        expected = model.eval()(images)
        for name in names:
            output = inference.create(name, tmp_path, torch.device('cpu'), 'float32')(images)
            output = torch.as_tensor(output[0] if isinstance(output, list) else output)
            assert (output - expected).norm() / expected.norm() < 1e-5, name


def test_what_is_not_installed_or_cannot_is_left_out(monkeypatch):
    assert not inference._available('onnxruntime', torch.device('cpu'), 'bfloat16')
    assert not inference._available('openvino', torch.device('cuda'), 'float32')
    assert not inference._available('ours-openvino', torch.device('cuda'), 'float32')
    assert not inference._available('ours', torch.device('cpu'), 'int8')
    monkeypatch.setattr(inference.importlib.util, 'find_spec', lambda name: None)
    assert not inference._available('onnxruntime', torch.device('cpu'), 'float32')
    with pytest.raises(onnx.UserError, match=r'timm-npu-irv2\[export\]'):
        onnx.optional('no_such_package')

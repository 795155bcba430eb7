"""Results of tune: found for exactly their workload, refused if damaged, and applied where the user has not decided."""

import importlib.util
import json
import logging
import os
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch

from timm_npu_irv2 import UserError
from timm_npu_irv2 import device as devices
from timm_npu_irv2.benchmarks.tune_plan import plan
from timm_npu_irv2.cli.tuned import choose_settings, settings_in, use_tuned
from timm_npu_irv2.deploy.engines import fastest_engine
from timm_npu_irv2.ops import use_variants, variants
from timm_npu_irv2.tuning import (
    Workload,
    apply_settings,
    describe_outdated,
    find_tuned,
    is_complete,
    load_tuned,
    preserve_settings,
    save_tuned,
)
from train_scripts import validate

from .pictures import write_pictures

SCRIPTS = Path(__file__).parents[1] / 'train_scripts'
CPU = torch.device('cpu')
WORKLOAD = {'task': 'train', 'batch_size': 2, 'img_size': 75, 'precision': 'float32'}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_NPU_IRV2_CACHE', str(tmp_path))
    monkeypatch.delenv('TIMM_NPU_IRV2_VARIANTS', raising=False)
    layout = devices.memory_format(CPU)
    with use_variants():
        yield
    devices.use_memory_format(CPU, layout)


def save(chosen, **changes):
    return save_tuned(Workload.on(CPU, **{**WORKLOAD, **changes}), {'chosen': chosen})


def options(**given) -> Namespace:
    return Namespace(**{
        'tuned': 'auto', 'model': 'inception_resnet_v2_npu', 'opt': 'sgd', 'opt_kwargs': {}, 'recompute': None,
        'grad_checkpointing': False, 'torchcompile': None, 'torchscript': False, 'deterministic': False, **given})


def test_a_result_is_found_for_exactly_its_workload():
    save({'pointwise': 'product'})
    assert find_tuned(CPU, **WORKLOAD).chosen == {'pointwise': 'product'}
    for change in {'batch_size': 4}, {'img_size': 76}, {'precision': 'O1 bfloat16'}, {'task': 'eval'}:
        assert find_tuned(CPU, **{**WORKLOAD, **change}) is None


def test_a_cache_folder_that_cannot_be_looked_into_has_no_results(monkeypatch, tmp_path):
    """As that of another user's HOME in a container, where Path.is_file raises."""
    monkeypatch.setenv('TIMM_NPU_IRV2_CACHE', str(tmp_path / ('x' * 300)))  # an error for root, too
    assert find_tuned(CPU, **WORKLOAD) is None and fastest_engine('float32') is None
    with pytest.raises(UserError, match=r'^cannot write '):
        save({})


def test_another_version_or_number_of_threads_is_another_workload(monkeypatch):
    save({})
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads + 1)
    assert find_tuned(CPU, **WORKLOAD) is None
    monkeypatch.undo()


@pytest.mark.parametrize('change, message', [
    ({'chosen': {'pointwise': 'sum'}}, r"chosen.pointwise is 'sum', expected one of"),
    ({'chosen': {'command': 'rm'}}, r"chosen has the unknown entry 'command'"),
    ({'chosen': {'jit_compile': 1}}, 'chosen.jit_compile is 1'),
    ({'chosen': {'engine': 'auto'}}, "chosen.engine is 'auto', expected one of"),
    ({'format': 2}, 'format is 2'),
    ({'workload': {'task': 'train'}}, 'is missing'),
])
def test_a_file_that_is_no_result_is_one_line(tmp_path, change, message):
    path = save({'pointwise': 'product'})
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message) as caught:
        load_tuned(path)
    assert '\n' not in str(caught.value)
    for content in '{', '[' * 100_000, '\0':
        path.write_text(content)
        with pytest.raises(UserError, match=r'cannot be read as JSON.*Run `benchmark\.py tune` again'):
            load_tuned(path)


def test_a_pipe_among_the_results_is_not_waited_for():
    folder = save({}, batch_size=3).parent
    os.mkfifo(folder / 'train-pipe.json')
    with pytest.raises(UserError, match='a pipe or a device'):
        load_tuned(folder / 'train-pipe.json')
    assert describe_outdated(CPU, **WORKLOAD) == ''


@pytest.mark.parametrize('device, own', [
    ('cpu', ['memory_format=contiguous']),
    ('cuda', ['memory_format=contiguous', 'cudnn_benchmark=off', 'allow_tf32=off'])])
def test_tune_tries_what_exists_on_a_device(device, own, monkeypatch):
    installed = {'onnxruntime': object()}
    monkeypatch.setattr(importlib.util, 'find_spec', installed.get)
    forms = ['pointwise=large', 'pointwise=product', 'siblings=separate']
    after = ['residual=addition', 'fused_optimizer=on', 'torchcompile=inductor', 'recompute=cheap']
    names = [each.name for each in plan('train', torch.device(device), 'float32')]
    assert names == forms + own + after
    names = [each.name for each in plan('train', torch.device(device), 'O2 float16')]
    assert names == forms + own + [each.replace('optimizer=on', 'optimizer=off') for each in after]
    engines = ['engine=torch', *(['engine=onnxruntime'] if device == 'cpu' else [])]
    names = [each.name for each in plan('eval', torch.device(device), 'float32')]
    assert names == engines + forms + own + ['torchcompile=inductor']


def test_a_result_is_complete_unless_its_search_was_interrupted_or_the_file_is_damaged(tmp_path):
    path = save({'pointwise': 'product'})
    assert is_complete(path) and not is_complete(tmp_path / 'missing.json')
    path.write_text(json.dumps({**json.loads(path.read_text()), 'interrupted': True}))
    assert not is_complete(path) and find_tuned(CPU, **WORKLOAD).chosen == {'pointwise': 'product'}
    path.write_text('{')
    assert not is_complete(path)


def test_settings_become_options_and_forms_and_one_line_of_the_log(caplog):
    path = save({'pointwise': 'product', 'memory_format': 'contiguous', 'fused_optimizer': True, 'recompute': 'cheap'})
    args = options()
    with caplog.at_level(logging.INFO):
        found = use_tuned(args, CPU, **WORKLOAD)
    assert variants().pointwise == 'product' and devices.memory_format(CPU) == torch.contiguous_format
    assert found.opt_kwargs == {'fused': True} and found.recompute == 'cheap'
    assert args.opt_kwargs == {} and args.recompute is None
    (line,) = caplog.messages
    assert 'pointwise=product' in line and str(path) in line


def test_what_the_user_has_set_takes_precedence(monkeypatch):
    save({'pointwise': 'product', 'fused_optimizer': True, 'recompute': 'cheap', 'torchcompile': 'inductor'})
    monkeypatch.setenv('TIMM_NPU_IRV2_VARIANTS', 'pointwise=convolution')
    args = options(opt_kwargs={'fused': False}, grad_checkpointing=True, torchscript=True)
    assert use_tuned(args, CPU, **WORKLOAD) == args and variants().pointwise is None
    for off in options(tuned='off'), options(model='resnet50'), options(deterministic=True):
        assert use_tuned(off, CPU, **WORKLOAD) == off


def test_a_result_leaves_deterministic_algorithms_deterministic(monkeypatch):
    for variable in 'HCCL_DETERMINISTIC', 'CUBLAS_WORKSPACE_CONFIG':
        monkeypatch.setenv(variable, os.environ.get(variable, ''))
    before = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
    try:
        devices.configure(torch.device('cuda'), deterministic=True)
        apply_settings({'allow_tf32': False}, torch.device('cuda'))
        assert not torch.backends.cudnn.benchmark and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32 = before


def test_a_file_for_another_device_or_task_is_one_line():
    path = save({}, task='eval')
    with pytest.raises(UserError, match='it is for eval on cpu, not for train on cpu'):
        use_tuned(options(tuned=str(path)), CPU, **WORKLOAD)


@pytest.mark.parametrize('change, words', [
    ({'versions': {**Workload.on(CPU, **WORKLOAD).versions, 'torch': '1.0'}}, 'torch 1.0, not '),
    ({'name': 'Ascend910B3'}, 'device Ascend910B3, not '),
])
def test_a_result_of_another_device_or_version_is_one_line_or_refused(caplog, change, words):
    path = save({'pointwise': 'product'})
    report = json.loads(path.read_text())
    path.write_text(json.dumps({**report, 'workload': {**report['workload'], **change}}))
    other = path.rename(path.with_name('train-other.json'))
    assert words in describe_outdated(CPU, **WORKLOAD)
    with caplog.at_level(logging.INFO):
        assert use_tuned(options(), CPU, **WORKLOAD) == options()
    (line,) = caplog.messages
    assert f'{other} is not used, since it was measured on {words}' in line
    with pytest.raises(UserError, match=r'Run .benchmark\.py tune. again') as caught:
        use_tuned(options(tuned=str(other)), CPU, **WORKLOAD)
    assert words in str(caught.value)
    assert use_tuned(options(tuned='off'), CPU, **WORKLOAD) == options(tuned='off') and len(caplog.messages) == 1


def test_a_result_for_other_batches_is_used_where_it_is_named():
    path = save({'pointwise': 'product'}, batch_size=16)
    use_tuned(options(tuned=str(path)), CPU, **WORKLOAD)
    assert variants().pointwise == 'product'


def test_settings_end_with_their_block_also_after_an_error():
    layout = devices.memory_format(CPU)
    with pytest.raises(ZeroDivisionError), preserve_settings(CPU):
        apply_settings({'pointwise': 'product', 'memory_format': 'contiguous'}, CPU)
        assert variants().pointwise == 'product' and devices.memory_format(CPU) == torch.contiguous_format
        raise ZeroDivisionError
    assert variants().pointwise is None and devices.memory_format(CPU) == layout


def test_a_run_that_goes_on_keeps_its_settings_unless_told_otherwise(caplog):
    save({'pointwise': 'large'})
    before = {'pointwise': 'product', 'recompute': 'cheap'}
    with caplog.at_level(logging.INFO):
        kept = choose_settings(options(grad_checkpointing=True), CPU, **WORKLOAD, before=before)
    assert kept == {'pointwise': 'product'} and 'pointwise=product, as before (from the checkpoint' in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):  # it began before the result was there
        assert choose_settings(options(), CPU, **WORKLOAD, before={}) == {}
    assert 'the default ones, as before' in caplog.text
    assert choose_settings(options(tuned='off'), CPU, **WORKLOAD, before=before) == {}
    path = save({'pointwise': 'large'})
    assert choose_settings(options(tuned=str(path)), CPU, **WORKLOAD, before=before) == {'pointwise': 'large'}


@pytest.mark.parametrize('entry, expected', [
    ({'device': 'cpu', 'settings': {'pointwise': 'product'}}, {'pointwise': 'product'}),
    ({'device': 'npu', 'settings': {'pointwise': 'product'}}, None),
    ({'device': 'cpu', 'settings': {'pointwise': 'sum'}}, None),
    ({'device': 'cpu', 'settings': {'command': 'rm'}}, None),
    (3, None),
])
def test_the_settings_of_a_checkpoint_are_checked(tmp_path, entry, expected):
    torch.save({'tuned': entry, 'state_dict': {'weight': torch.zeros(1)}}, tmp_path / 'checkpoint.pth.tar')
    assert settings_in(tmp_path / 'checkpoint.pth.tar', CPU) == expected
    assert settings_in(None, CPU) is None


def test_variables_that_torch_npu_reads_at_its_start_are_named(caplog, monkeypatch):
    monkeypatch.delenv('TORCH_NPU_LAZY_FUSION', raising=False)
    save({'lazy_fusion': True})
    with caplog.at_level(logging.INFO):
        use_tuned(options(), CPU, **WORKLOAD)
    assert 'Start with TORCH_NPU_LAZY_FUSION=True for all of them: torch_npu reads' in caplog.messages[0]


def test_validate_leaves_no_setting_to_the_next_network(capsys, tmp_path):
    images = write_pictures(tmp_path / 'images', train=1, val=1)
    settings = {'pointwise': 'product', 'memory_format': 'contiguous'}
    save_tuned(Workload.on(CPU, task='eval', batch_size=3, img_size=75, precision='float32'), {'chosen': settings})
    network = timm.create_model('inception_resnet_v2_npu', num_classes=3)
    torch.save({'state_dict': network.state_dict()}, tmp_path / 'weights.pth')
    words = ['--data-dir', images, '--checkpoint', tmp_path / 'weights.pth', '--img-size', 75, '-b', 3, '-j', 0]
    layout = devices.memory_format(CPU)
    assert validate.main([*map(str, words), '--device', 'cpu', '--num-classes', '3']) == 0
    assert 'Tuned settings: pointwise=product, memory_format=contiguous (from ' in capsys.readouterr().err
    assert variants().pointwise is None and devices.memory_format(CPU) == layout

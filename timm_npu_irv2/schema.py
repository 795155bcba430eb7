"""What a file may contain: types, names and ranges of all that is read from a checkpoint, a config.json or a list.

Such a file may come from anybody. It is checked once, when it is read, and a file that is not as described here is
refused in one line. Unknown entries of a checkpoint are ignored; unknown arguments of a model are refused, since what
they do is decided by whoever takes them.
"""

import inspect
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .rules import (
    MOST,
    Mismatch,
    Rule,
    absent,
    either,
    expect,
    known_entries,
    many,
    mapping,
    number,
    one_of,
    optional,
    plain,
    record,
    show,
    tensor,
    text,
)

__all__ = ['ENGINES', 'MOST_CLASSES', 'check_checkpoint', 'check_config', 'check_engine_config',
           'check_inference_config', 'check_model_arguments', 'check_report', 'check_shards', 'check_tuned',
           'restored_optimizer']

ENGINES = 'torch', 'openvino', 'onnxruntime', 'om'
MOST_EPOCHS, MOST_CLASSES, MOST_CHANNELS, LARGEST_IMAGE = 10**6, 10**6, 1024, 2**14

# Models and their preprocessing

_integer = number(0, MOST, integer=True)
_name = text(100, r'[A-Za-z0-9_.]*')
_side = number(1, LARGEST_IMAGE, integer=True)
_size = many(_side, 3, 3)
_names = either(many(text(1000)), mapping(text(1000), key=either(text(1000), _integer)))
_POOLS = ('', *(fast + name for fast in ('', 'fast') for name in ('avg', 'max', 'avgmax', 'catavgmax')), 'fast')

PREPROCESSING: dict[str, Rule] = {
    'img_size': optional(_side),
    'input_size': optional(_size),
    'mean': optional(many(number(-1e6, 1e6), 1, MOST_CHANNELS)),
    'std': optional(many(number(1e-6, 1e6), 1, MOST_CHANNELS)),
    'crop_pct': optional(number(1e-3, 100)),
    'crop_mode': optional(one_of('center', 'squash', 'border', 'random', '')),
    'crop_border_pixels': optional(number(0, LARGEST_IMAGE, integer=True)),
    'input_img_mode': optional(text(20, r'[A-Za-z]*')),
    'interpolation': optional(one_of('bilinear', 'bicubic', 'nearest', 'lanczos', 'box', 'hamming', 'random', '')),
}

# Arguments of Inception-ResNet-v2, this package's and timm's: they describe its layers, and nothing else.
ARCHITECTURE: dict[str, Rule] = {
    'num_classes': optional(number(0, MOST_CLASSES, integer=True)),
    'in_chans': optional(number(1, MOST_CHANNELS, integer=True)),
    'drop_rate': optional(number(0, 1)),
    'output_stride': optional(one_of(32)),
    'global_pool': optional(one_of(*_POOLS)),
    'norm_layer': optional(_name),
    'norm_eps': optional(number(0, 1)),
    'act_layer': optional(_name),
}

_PRETRAINED_CFG: dict[str, Rule] = {
    **PREPROCESSING,
    'url': absent('weights come from this folder alone'),
    'file': absent('weights come from this folder alone'),
    'state_dict': absent('weights come from this folder alone'),
    'custom_load': absent('only weights in the form of safetensors are read'),
    'hf_hub_filename': optional(text(100, r'[\w.\-]+\.safetensors|')),
    'test_input_size': optional(_size),
    'min_input_size': optional(_size),
    'test_crop_pct': optional(number(1e-3, 100)),
    'fixed_input_size': optional(one_of(True, False)),
    'num_classes': optional(number(0, MOST_CLASSES, integer=True)),
    'label_offset': optional(number(0, 1000, integer=True)),
    'label_names': optional(_names),
    'label_descriptions': optional(either(mapping(text()), many(text()))),
    'pool_size': optional(many(_side, 2, 2)),
    'test_pool_size': optional(many(_side, 2, 2)),
    'first_conv': optional(either(_name, many(_name, most=10))),
    'classifier': optional(either(_name, many(_name, most=10))),
    **dict.fromkeys(('tag', 'architecture', 'license', 'description', 'origin_url', 'paper_name'), optional(text())),
}


def check_model_arguments(arguments: Mapping[str, Any], architecture: str) -> None:
    """Raise :class:`Mismatch` unless a file may set these arguments of a model: they describe its layers.

    Args:
        arguments: Arguments of ``timm.create_model`` that come from a file.
        architecture: The name of the model. Of another one than Inception-ResNet-v2 only its own layers know which
            arguments there are; what timm's factory takes is refused.
    """
    plain(arguments, 'model_args')
    if architecture.partition('.')[0] in ('inception_resnet_v2', 'inception_resnet_v2_npu'):
        allowed = ', '.join(ARCHITECTURE)
        for name in arguments:
            if name not in ARCHITECTURE:
                raise Mismatch(f'it sets the model argument {show(name)}; a file may set only {allowed}')
        record({}, ARCHITECTURE)(arguments, 'model_args')
    for name in arguments:
        if name in _factory_arguments():
            raise Mismatch(f'it sets the model argument {show(name)}, which a file may not')


def _factory_arguments() -> set[str]:
    """Return what timm takes to find, load and wrap a model; the layers do not see it."""
    from timm.models import build_model_with_cfg, create_model  # noqa: PLC0415 - this module imports nothing of timm's

    factories = (inspect.signature(each).parameters.values() for each in (create_model, build_model_with_cfg))
    named = {each.name for own in factories for each in own if each.kind is not each.VAR_KEYWORD}
    return named | {'pruned', 'features_only', 'feature_cls', 'out_indices', 'device', 'dtype'}


def check_config(config: dict[str, Any], repository: str | None = None) -> None:
    """Raise :class:`Mismatch` unless this may be the config.json of a published model.

    Args:
        config: The contents of the file, in timm's format or the older one without ``pretrained_cfg``.
        repository: The repository that the file comes from, which it may name.
    """
    record({'architecture': _name}, {
        'input_img_mode': PREPROCESSING['input_img_mode'],
        'num_classes': optional(number(0, MOST_CLASSES, integer=True)), 'global_pool': optional(text(100)),
        'label_names': optional(_names), 'labels': optional(_names),
        'label_descriptions': optional(either(mapping(text()), many(text()))),
        'model_args': mapping(plain), 'pretrained_cfg': record({}),
    })(config, '')
    inner = config.get('pretrained_cfg', config)
    record({}, _PRETRAINED_CFG)(inner, 'pretrained_cfg' if inner is not config else '')
    if inner.get('hf_hub_id') not in (None, '', repository):
        raise Mismatch(f'it names another repository, {show(inner["hf_hub_id"])}')
    check_model_arguments(config.get('model_args', {}), config['architecture'])


def check_inference_config(config: dict[str, Any]) -> None:
    """Raise :class:`Mismatch` unless this may be the config.json of a network for inference (``deploy.save``)."""
    record({
        'dtype': one_of('float32', 'float16', 'bfloat16', 'float64'),
        'arguments': record({
            'num_classes': number(0, MOST_CLASSES, integer=True),
            'in_chans': number(1, MOST_CHANNELS, integer=True),
            'global_pool': one_of(*_POOLS),
        }),
    }, {'pretrained_cfg': optional(record({}, _PRETRAINED_CFG))})(config, '')
    arguments, cfg = config['arguments'], config.get('pretrained_cfg') or {}
    if unknown := arguments.keys() - {'num_classes', 'in_chans', 'global_pool'}:
        raise Mismatch(f'arguments has the unknown entry {show(min(unknown))}')
    names = cfg.get('label_names')
    if names is not None and len(names) != arguments['num_classes']:
        raise Mismatch(f'it has {len(names)} label names for {arguments["num_classes"]} classes')
    if cfg.get('input_size') and cfg['input_size'][0] != arguments['in_chans']:
        raise Mismatch(f'its images have {cfg["input_size"][0]} channels, its network {arguments["in_chans"]}')
    for name in 'mean', 'std':
        if cfg.get(name) and len(cfg[name]) not in (1, arguments['in_chans']):
            raise Mismatch(f'its {name} has {len(cfg[name])} values for {arguments["in_chans"]} channels')


def check_engine_config(config: dict[str, Any]) -> None:
    """Raise :class:`Mismatch` unless this may be the config.json of a network that an engine runs (``deploy.save``)."""
    record({
        'engine': text(100),
        'dtype': one_of('float32', 'float16', 'bfloat16', 'int8'),
        'sha256': text(64, r'[0-9a-f]{64}'),
        'pretrained_cfg': record({name: many(number()) for name in ('mean', 'std')}),
    })(config, '')
    check_inference_config({**config, 'dtype': 'float32'})


# Checkpoints

_seconds = number(0, 1e12)
_state = mapping(tensor(), most=10**5)

def _plain_with_tensors(value: Any, where: str) -> None:
    """Accept plain values, tensors, and lists and dicts of them."""
    if isinstance(value, list | tuple):
        many(_plain_with_tensors)(value, where)
    elif isinstance(value, dict):
        mapping(_plain_with_tensors, key=either(text(1000), _integer))(value, where)
    elif not isinstance(value, Tensor):
        plain(value, where)


_OPTIMIZER = record({
    'state': mapping(mapping(_plain_with_tensors, most=100), key=either(text(1000), _integer)),
    'param_groups': many(record({'params': many(either(text(1000), _integer))},
                                {'lr': either(number(0, 1e6), tensor())}), 1, 10**5),
})
_FINGERPRINT = record({
    'classes': optional(many(text(1000))), 'count': optional(_integer), 'names': optional(text(1000))})
_PYTHON_RANDOM = many(number(0, 2**32 - 1, integer=True), 625, 625)
_PROCESS = record({
    'random': record({
        'torch': tensor(torch.uint8),
        'device': optional(tensor(torch.uint8)),
        'numpy': many(lambda value, where: None, 5, 5),
        'python': many(lambda value, where: None, 3, 3),
    }),
    'meter': record({'loss': number(finite=False), 'hits': _integer, 'count': _integer}),
}, {'buffers': mapping(_state, most=2), 'hidden': mapping(mapping(_plain_with_tensors))})
_share = number(1, 2**31, integer=True)
LAYOUT = record(
    {'processes': _share, 'batch_size': _share, 'grad_accum_steps': _share},
    {'epoch_samples': optional(_integer), 'lanes': optional(_share)})
_TRAINING = record({
    'position': record(
        {'epoch': number(0, MOST_EPOCHS, integer=True), 'batch': _integer, 'updates': _integer}, {'samples': _integer}),
    'num_classes': optional(number(0, MOST_CLASSES, integer=True)),
    'processes': many(_PROCESS, 1, 10**5),
    'throughput': many(_seconds, 2, 2),
    'scheduler': optional(mapping(plain)),
}, {
    'class_to_idx': optional(mapping(_integer)), 'pipeline': optional(record({}, PREPROCESSING)),
    'skipped': many(_integer, 2, 2), 'format': _integer, 'layout': LAYOUT,
    'data': mapping(_FINGERPRINT)})
_CHECKPOINT_NAME = text(1000, r'(?:.*/)?checkpoint-\d+\.pth\.tar')  # files of these names are removed in time
_SAVER = record({}, {
    'checkpoint_files': many(many(optional(either(_CHECKPOINT_NAME, number(finite=False))), 2, 2)),
    'dropped': many(_CHECKPOINT_NAME),
    'best_epoch': optional(number(0, MOST_EPOCHS, integer=True)),
    'best_metric': optional(number(finite=False)),
    'epoch': number(0, MOST_EPOCHS, integer=True),
    'resumptions': _integer,
})
_GRAD_SCALER = record({
    'scale': number(1e-30, 1e30), 'growth_factor': number(1, 1e6), 'backoff_factor': number(1e-6, 1),
    'growth_interval': number(1, MOST, integer=True), '_growth_tracker': _integer,
})


def _loss_scale(value: Any, where: str) -> None:
    """Accept the state of torch's GradScaler or of apex; of another kind of loss scale nothing is read."""
    mapping(plain)(value, where)
    if 'scale' in value:
        _GRAD_SCALER(value, where)
    if 'loss_scaler0' in value:
        record({'loss_scale': number(1e-30, 1e30), 'unskipped': _integer})(value['loss_scaler0'], where)


_CHECKPOINT = record({'state_dict': _state}, {
    'state_dict_ema': _state,
    'task_state': mapping(mapping(tensor())),
    'task_state_ema': mapping(mapping(tensor())),
    'epoch': number(0, MOST_EPOCHS, integer=True),
    'version': number(0, 100, integer=True),
    'arch': optional(text(1000)),
    'args': record({}, {
        **PREPROCESSING, 'gp': optional(text(100)), 'model_kwargs': optional(mapping(plain)),
        'model': optional(text(1000)), 'val_split': optional(text(1000)), 'num_classes': optional(_integer),
    }),
    'optimizer': optional(_OPTIMIZER),
    'amp_scaler': optional(_loss_scale),
    'seconds': _seconds,
    'bad_images': mapping(text(), key=text()),  # by their paths
    'saver': _SAVER,
})


def check_checkpoint(content: dict[str, Any]) -> None:
    """Raise :class:`Mismatch` unless a checkpoint, under the names of ``serialization``, is one that can be used."""
    _CHECKPOINT(content, '')
    if 'tuned' in content:
        _check_tuned_entry(content['tuned'], 'tuned')
    plain(content.get('args') or {}, 'args')
    if 'training' not in content:  # another program's
        return
    record({'arch': text(1000), 'epoch': _integer, 'training': _TRAINING})(content, '')
    if content['training'].get('format', 1) >= 2:
        record({'args': record({})})(content, '')  # the options, with which a resumed run compares its own
    if unknown := content['training']['position'].keys() - {'epoch', 'batch', 'updates', 'samples'}:
        raise Mismatch(f'training.position has the unknown entry {show(min(unknown, key=str))}')
    for index, process in enumerate(content['training']['processes']):
        where, (_, keys, position, _, gauss) = f'training.processes[{index}].random', process['random']['numpy']
        tensor(torch.int64, (624,))(keys, f'{where}.numpy[1]')
        number(0, 624, integer=True)(position, f'{where}.numpy[2]')  # numpy itself reads beyond the end otherwise
        number()(gauss, f'{where}.numpy[4]')
        _PYTHON_RANDOM(process['random']['python'][1], f'{where}.python[1]')


def check_report(report: dict[str, Any]) -> None:
    """Raise :class:`Mismatch` unless this may be a report.json, or the JSON of validate.py."""
    percent = optional(number(0, 100))
    record({}, {
        'top1': percent, 'top5': percent, 'loss': optional(number(finite=False)), 'seconds': optional(_seconds),
        'epochs': optional(_integer), 'best_epoch': optional(_integer), 'world_size': optional(_integer),
        'precision': optional(text(1000)), 'versions': optional(mapping(text(1000))),
        'device': optional(record({'type': text(1000), 'name': text(1000)})),
        'last_epoch': optional(record({}, {
            'epoch': optional(_integer), 'eval_top1': percent, 'eval_top5': percent,
            'eval_loss': optional(number(finite=False))})),
    })(report, '')


_SETTINGS: dict[str, Rule] = {
    'pointwise': one_of('convolution', 'large', 'product'),
    'siblings': one_of('merged', 'separate'),
    'residual': one_of('folded', 'addition'),
    'kernels': one_of('aten', 'triton'),
    'memory_format': one_of('contiguous', 'channels_last'),
    'fused_optimizer': one_of(True, False),
    'recompute': one_of('cheap', 'all'),
    'torchcompile': one_of('inductor'),
    'engine': one_of(*ENGINES),
    'task_queue': one_of(0, 1, 2),
    **dict.fromkeys(('allow_internal_format', 'jit_compile', 'allow_hf32', 'allow_tf32', 'cudnn_benchmark',
                     'lazy_fusion'), one_of(True, False)),
}

_WORKLOAD: dict[str, Rule] = {
    'task': one_of('train', 'eval'), 'device': text(100), 'name': text(1000), 'precision': text(100),
    'threads': number(0, 10**5, integer=True), 'batch_size': number(1, 10**6, integer=True),
    'img_size': _side, 'versions': mapping(text(1000)),
}


def check_tuned(report: dict[str, Any]) -> None:
    """Raise :class:`Mismatch` unless this may be a result of ``benchmark.py tune``."""
    record({
        'format': one_of(1),
        'workload': record(_WORKLOAD),
        'chosen': record({}, _SETTINGS),
    })(report, '')
    for where, known in (('chosen', _SETTINGS), ('workload', _WORKLOAD)):
        if unknown := report[where].keys() - known.keys():
            raise Mismatch(f'{where} has the unknown entry {show(min(unknown, key=str))}')


def _check_tuned_entry(entry: Any, where: str) -> None:
    """Raise :class:`Mismatch` unless this may be a checkpoint's entry about the settings of its run."""
    record({'device': text(100), 'settings': record({}, _SETTINGS)})(entry, where)
    if unknown := entry['settings'].keys() - _SETTINGS.keys():
        raise Mismatch(f'{where}.settings has the unknown entry {show(min(unknown, key=str))}')


_SHARDS: dict[str, Rule] = {
    # Within the folder of the list: a name that is a path, a URL or a pipe would open what the list's author chooses.
    'filenames': many(text(1000, r'(?!(?:.*/)?\.\.(?:/|$))[^/:\x00-\x1f][^:\x00-\x1f]*'), 1),
    'shard_lengths': many(number(0, 2**40, integer=True), 1),
}


def check_shards(info: dict[str, Any]) -> None:
    """Raise :class:`Mismatch` unless this may be the _info.json of WebDataset shards."""
    split = record(_SHARDS, {
        'alt_label': optional(text(1000)), 'sha256': optional(many(text(64, r'[0-9a-f]{64}')))})
    record({}, {'splits': mapping(split), 'class_to_idx': mapping(number(0, MOST_CLASSES, integer=True))})(info, '')
    for name, content in info.get('splits', {}).items():
        for entry in ('shard_lengths', 'sha256'):
            if len(content.get(entry) or content['filenames']) != len(content['filenames']):
                raise Mismatch(f'splits.{name} has {len(content[entry])} {entry} for {len(content["filenames"])} files')


def restored_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what ``optimizer.load_state_dict`` may take of a checkpoint's entry.

    Options of its groups that the file lacks are the optimizer's own. Of those that the optimizer lacks, numbers are
    kept: timm's LAMB and Adan count their steps in the group, from the first step on. Others are left out.

    Raises:
        Mismatch: An option is of another type, or a tensor does not fit its parameter.
    """
    groups, shapes = [], dict[Any, torch.Size]()
    present = optimizer.state_dict()['param_groups']
    every = zip(state['param_groups'], present, optimizer.param_groups, strict=True)
    for index, (found, own, held) in enumerate(every):
        where, options = f'optimizer.param_groups[{index}]', {k: v for k, v in own.items() if k != 'params'}
        counted = {name: value for name, value in found.items() if name not in own and _is_number(value)}
        groups.append({**options, **counted, **known_entries(found, options, where), 'params': found['params']})
        if len(held['params']) == len(own['params']):  # else the optimizer holds them in one buffer
            shapes |= dict(zip(found['params'], (each.shape for each in held['params']), strict=True))
    tensors = {name for entries in state['state'].values() for name, value in entries.items() if torch.is_tensor(value)}
    for found in state['param_groups']:
        _check_complete([key for key in found['params'] if key in state['state']], state['state'])
    for key, entries in state['state'].items():
        for name, value in entries.items():
            expect(value is None or torch.is_tensor(value) == (name in tensors), value,
                   f'optimizer.state[{show(key)}].{name}', 'what it is for the other parameters')
            if isinstance(value, Tensor) and key in shapes:
                expect(_fits(value.shape, shapes[key]), value, f'optimizer.state[{show(key)}].{name}',
                       f'a shape for a parameter of {tuple(shapes[key])}')
    return {**state, 'param_groups': groups}


def _check_complete(keys: list[Any], state: Mapping[Any, Mapping[str, Any]]) -> None:
    """Raise :class:`Mismatch` if a parameter lacks entries that others of its group have.

    Optimizers keep one of a few sets of entries for a parameter, Adafactor for instance full or factored moments; none
    of these sets is a part of another.
    """
    kinds = {frozenset(state[key]) for key in keys}
    for key in keys:
        for kind in kinds:
            if state[key].keys() < kind:
                missing = ', '.join(map(show, sorted(kind - state[key].keys(), key=str)))
                raise Mismatch(f'optimizer.state[{show(key)}] lacks {missing}, which other parameters have')


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and 0 <= value.item() <= MOST
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST


def _fits(shape: torch.Size, parameter: torch.Size) -> bool:
    """Return True if a parameter's state may have this shape.

    It is the parameter's own, a single number, or that with axes left out or of length 1 (means over them, as
    Adafactor keeps).
    """
    fewer = len(shape) < len(parameter) and not Counter(shape) - Counter(parameter)
    reduced = len(shape) == len(parameter) and all(
        own in (1, full) for own, full in zip(shape, parameter, strict=True))
    return shape.numel() == 1 or fewer or reduced

"""What a file may contain: types, names and ranges of everything that is read from a checkpoint or a config.json.

Such a file may come from anybody. It is checked once, when it is read, and a file that is not as described here is
refused in one line. Unknown entries of a checkpoint are ignored; unknown arguments of a model are refused, since what
they do is decided by whoever takes them.

A rule is a function of a value and of the name of its place. It raises :class:`Mismatch`, or returns nothing.
"""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

__all__ = ['check_checkpoint', 'check_config', 'check_inference_config', 'check_like', 'check_model_arguments',
           'check_report', 'check_size', 'naming']

Rule = Callable[[Any, str], None]

MOST_EPOCHS, MOST = 10**6, 2**53  # the latter is the largest range in which float64 counts exactly
MOST_CLASSES, MOST_CHANNELS, LARGEST_IMAGE = 10**6, 1024, 2**14
LONGEST_TEXT = 10_000
MOST_ENTRIES, DEEPEST = 2 * 10**6, 40  # nested containers can be small and yet unfold to any size


class Mismatch(ValueError):
    """A value that is not as a file may have it."""


@contextlib.contextmanager
def naming(path: Any) -> Iterator[None]:
    """Turn a :class:`Mismatch` into a UserError that names the file."""
    try:
        yield
    except Mismatch as error:
        raise UserError(f'{path} is refused: {error}.') from error


def _expect(condition: bool, value: Any, where: str, expected: str) -> None:
    if not condition:
        raise Mismatch(f'{where} is {_show(value)}, expected {expected}')


def _show(value: Any) -> str:
    """Return a short description of a value; a long number or a container is not written out."""
    if isinstance(value, bool | float) or (isinstance(value, int) and value.bit_length() < 80) or value is None:
        return repr(value)
    if isinstance(value, str):
        return repr(value[:40]) + ('…' if len(value) > 40 else '')
    if isinstance(value, Tensor):
        return f'a tensor of {value.dtype} with shape {tuple(value.shape)}'
    if isinstance(value, int):
        return f'a number of {value.bit_length()} bits'
    return f'of type {type(value).__name__}' + (f' with {len(value)} entries' if hasattr(value, '__len__') else '')


# Rules


def number(low: float = -MOST, high: float = MOST, integer: bool = False, finite: bool = True) -> Rule:
    """Return the rule for a number from ``low`` to ``high``."""
    kind = 'an integer' if integer else 'a number'

    def rule(value: Any, where: str) -> None:
        known = isinstance(value, int if integer else int | float) and not isinstance(value, bool)
        fits = known and (low <= value <= high or (not finite and isinstance(value, float)))
        _expect(fits, value, where, f'{kind} from {low:.16g} to {high:.16g}')

    return rule


def text(longest: int = LONGEST_TEXT, pattern: str = '') -> Rule:
    """Return the rule for a string, which may have to match ``pattern`` as a whole."""
    expected = f'a text of the form {pattern}' if pattern else f'a text of at most {longest} characters'
    pattern = pattern or r'(?s:.*)'

    def rule(value: Any, where: str) -> None:
        fits = isinstance(value, str) and len(value) <= longest and re.fullmatch(pattern, value) is not None
        _expect(fits, value, where, expected)

    return rule


def one_of(*choices: Any) -> Rule:
    """Return the rule for one of a few values."""
    return lambda value, where: _expect(
        any(type(value) is type(choice) and value == choice for choice in choices), value, where,
        f'one of {", ".join(map(repr, choices))}')


def optional(rule: Rule) -> Rule:
    """Return the rule for a value that may be None."""
    return lambda value, where: None if value is None else rule(value, where)


def either(*rules: Rule) -> Rule:
    """Return the rule for a value that one of ``rules`` accepts; the last one makes the message."""

    def rule(value: Any, where: str) -> None:
        for each in rules[:-1]:
            with contextlib.suppress(Mismatch):
                return each(value, where)
        return rules[-1](value, where)

    return rule


def many(each: Rule, least: int = 0, most: int = MOST_CLASSES) -> Rule:
    """Return the rule for a list or tuple of ``least`` to ``most`` values."""

    def rule(value: Any, where: str) -> None:
        count = f'{least} values' if least == most else f'{least} to {most} values'
        _expect(isinstance(value, list | tuple) and least <= len(value) <= most, value, where, f'a list of {count}')
        for index, item in enumerate(value):
            each(item, f'{where}[{index}]')

    return rule


def mapping(each: Rule, key: Rule | None = None, most: int = MOST_CLASSES) -> Rule:
    """Return the rule for a dict of values of one kind, with texts for keys if nothing else is said."""
    key = key or text(1000)

    def rule(value: Any, where: str) -> None:
        _expect(isinstance(value, dict) and len(value) <= most, value, where, f'a dict of at most {most} entries')
        for name, item in value.items():
            key(name, f'a name in {where}')
            each(item, f'{where}[{_show(name)}]')

    return rule


def record(required: Mapping[str, Rule], others: Mapping[str, Rule] | None = None) -> Rule:
    """Return the rule for a dict with ``required`` entries and perhaps ``others``; further entries are ignored."""

    def rule(value: Any, where: str) -> None:
        _expect(isinstance(value, dict), value, where or 'the file', 'a dict')
        for name in required:
            if name not in value:
                raise Mismatch(f'{_place(where, name)} is missing')
        for name, each in {**required, **(others or {})}.items():
            if name in value:
                each(value[name], _place(where, name))

    return rule


def _place(where: str, name: str) -> str:
    return f'{where}.{name}' if where else name


def tensor(dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None) -> Rule:
    """Return the rule for a tensor."""
    expected = f'a tensor of {dtype or "any type"}' + (f' with shape {shape}' if shape is not None else '')
    return lambda value, where: _expect(
        isinstance(value, Tensor) and dtype in (None, value.dtype) and shape in (None, tuple(value.shape)),
        value, where, expected)


def plain(value: Any, where: str) -> None:
    """Accept None, numbers, texts, and lists and dicts of them."""
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            plain(item, f'{where}[{index}]')
    elif isinstance(value, dict):
        for name, item in value.items():
            _expect(isinstance(name, str | int), name, f'a name in {where}', 'a text or an integer')
            plain(item, f'{where}[{_show(name)}]')
    else:
        fits = value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63)
        _expect(fits or (isinstance(value, str) and len(value) <= LONGEST_TEXT), value, where, 'a plain value')


def absent(reason: str) -> Rule:
    """Return the rule for an entry that must be empty."""

    def rule(value: Any, where: str) -> None:
        if value:
            raise Mismatch(f'{where} is {_show(value)}, but {reason}')

    return rule


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
                raise Mismatch(f'it sets the model argument {_show(name)}; a file may set only {allowed}')
        record({}, ARCHITECTURE)(arguments, 'model_args')
    for name in arguments:
        if name in _factory_arguments():
            raise Mismatch(f'it sets the model argument {_show(name)}, which a file may not')


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
        'num_classes': optional(number(0, MOST_CLASSES, integer=True)), 'global_pool': optional(text(100)),
        'label_names': optional(_names), 'labels': optional(_names),
        'label_descriptions': optional(either(mapping(text()), many(text()))),
        'model_args': mapping(plain), 'pretrained_cfg': record({}),
    })(config, '')
    inner = config.get('pretrained_cfg', config)
    record({}, _PRETRAINED_CFG)(inner, 'pretrained_cfg' if inner is not config else '')
    if inner.get('hf_hub_id') not in (None, '', repository):
        raise Mismatch(f'it names another repository, {_show(inner["hf_hub_id"])}')
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
        raise Mismatch(f'arguments has the unknown entry {_show(min(unknown))}')
    names = cfg.get('label_names')
    if names is not None and len(names) != arguments['num_classes']:
        raise Mismatch(f'it has {len(names)} label names for {arguments["num_classes"]} classes')
    if cfg.get('input_size') and cfg['input_size'][0] != arguments['in_chans']:
        raise Mismatch(f'its images have {cfg["input_size"][0]} channels, its network {arguments["in_chans"]}')
    for name in 'mean', 'std':
        if cfg.get(name) and len(cfg[name]) not in (1, arguments['in_chans']):
            raise Mismatch(f'its {name} has {len(cfg[name])} values for {arguments["in_chans"]} channels')


# Checkpoints

_seconds = number(0, 1e12)
_state = mapping(tensor(), most=10**5)
_OPTIMIZER = record({
    'state': mapping(mapping(either(tensor(), plain), most=100), key=either(text(1000), _integer)),
    'param_groups': many(record({'params': many(either(text(1000), _integer))},
                                {'lr': either(number(0, 1e6), tensor())}), 1, 10**5),
})
_PYTHON_RANDOM = many(either(number(0, 2**32 - 1, integer=True)), 625, 625)
_PROCESS = record({
    'random': record({
        'torch': tensor(torch.uint8),
        'device': optional(tensor(torch.uint8)),
        'numpy': many(lambda value, where: None, 5, 5),
        'python': many(lambda value, where: None, 3, 3),
    }),
    'meter': record({'loss': number(finite=False), 'hits': _integer, 'count': _integer}),
}, {'buffers': mapping(_state, most=2)})
_TRAINING = record({
    'position': record({'epoch': number(0, MOST_EPOCHS, integer=True), 'batch': _integer, 'updates': _integer}),
    'num_classes': optional(number(0, MOST_CLASSES, integer=True)),
    'processes': many(_PROCESS, 1, 10**5),
    'throughput': many(_seconds, 2, 2),
    'scheduler': optional(mapping(plain)),
}, {'class_to_idx': optional(mapping(_integer)), 'skipped': many(_integer, 2, 2)})
_CHECKPOINT_NAME = text(1000, r'(?:.*/)?checkpoint-\d+\.pth\.tar')  # files of these names are removed in time
_SAVER = record({}, {
    'checkpoint_files': many(many(optional(either(_CHECKPOINT_NAME, number(finite=False))), 2, 2)),
    'dropped': many(_CHECKPOINT_NAME),
    'best_epoch': optional(number(0, MOST_EPOCHS, integer=True)),
    'best_metric': optional(number(finite=False)),
    'epoch': number(0, MOST_EPOCHS, integer=True),
})
_CHECKPOINT = record({'state_dict': _state}, {
    'state_dict_ema': _state,
    'task_state': mapping(mapping(tensor())),
    'task_state_ema': mapping(mapping(tensor())),
    'epoch': optional(number(0, MOST_EPOCHS, integer=True)),
    'version': number(0, 100, integer=True),
    'arch': optional(text(1000)),
    'args': record({}, {
        **PREPROCESSING, 'gp': optional(text(100)), 'model_kwargs': optional(mapping(plain)),
        'model': optional(text(1000)), 'val_split': optional(text(1000)), 'num_classes': optional(_integer),
    }),
    'optimizer': optional(_OPTIMIZER),
    'amp_scaler': optional(mapping(plain)),
    'seconds': _seconds,
    'bad_images': mapping(text()),
    'saver': _SAVER,
})


def check_checkpoint(content: dict[str, Any]) -> None:
    """Raise :class:`Mismatch` unless a checkpoint, under the names of ``serialization``, is one that can be used."""
    _CHECKPOINT(content, '')
    plain(content.get('args') or {}, 'args')
    if 'training' not in content:  # another program's
        return
    record({'arch': text(1000), 'epoch': _integer, 'training': _TRAINING})(content, '')
    for index, process in enumerate(content['training']['processes']):
        where, (_, keys, position, _, gauss) = f'training.processes[{index}].random', process['random']['numpy']
        tensor(torch.int64, (624,))(keys, f'{where}.numpy[1]')
        number(0, 624, integer=True)(position, f'{where}.numpy[2]')  # numpy itself reads beyond the end otherwise
        number()(gauss, f'{where}.numpy[4]')
        _PYTHON_RANDOM(process['random']['python'][1], f'{where}.python[1]')


def check_size(content: Any, most_bytes: int) -> None:
    """Raise :class:`Mismatch` if what was read from a file unfolds to more than a file of its size can hold.

    Args:
        content: Containers, plain values and tensors.
        most_bytes: The most that all tensors together may have.
    """
    waiting, entries, unfolded, stored, storages = [(content, 0)], 0, 0, 0, set()
    while waiting:
        value, depth = waiting.pop()
        entries += 1
        if entries > MOST_ENTRIES or depth > DEEPEST:
            raise Mismatch(f'it nests more than {DEEPEST} deep, or has more than {MOST_ENTRIES} entries')
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.device.type != 'cpu' or value.is_quantized:
                raise Mismatch(f'it holds a tensor that is not an ordinary one ({value.layout}, {value.device})')
            storage = value.untyped_storage()
            stored += 0 if storage.data_ptr() in storages else storage.nbytes()
            storages.add(storage.data_ptr())
            unfolded += value.numel() * value.element_size()
            if max(stored, unfolded) > most_bytes:
                raise Mismatch(f'its tensors unfold to more than {most_bytes} bytes')
        else:
            waiting += ((item, depth + 1) for item in _items(value))


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    return value if isinstance(value, list | tuple | set | frozenset) else ()


def check_like(value: Any, reference: Any, where: str) -> None:
    """Raise :class:`Mismatch` unless ``value`` has the structure of ``reference``: names, types, and shapes of tensors.

    Numbers may differ in kind, and where the reference is None anything plain will do.
    """
    if isinstance(reference, dict):
        _expect(isinstance(value, dict) and value.keys() == reference.keys(), value, where,
                f'a dict with {", ".join(map(str, reference)) or "no entries"}')
        for name, item in reference.items():
            check_like(value[name], item, _place(where, str(name)))
    elif isinstance(reference, list | tuple):
        many(lambda *_: None, len(reference), len(reference))(value, where)
        for index, item in enumerate(reference):
            check_like(value[index], item, f'{where}[{index}]')
    elif isinstance(reference, Tensor):
        tensor(reference.dtype, tuple(reference.shape))(value, where)
    elif reference is None or value is None:
        plain(value, where)
    elif isinstance(reference, int | float) and not isinstance(reference, bool):
        number(finite=False)(value, where)
    else:
        _expect(type(value) is type(reference), value, where, f'a {type(reference).__name__}')


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

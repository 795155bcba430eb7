"""State dicts of Inception-ResNet-v2 in several dialects, recognised by their keys and translated bit for bit.

* ``npu``: this package; siblings and norms merged (``repeat.0.siblings.conv.weight``, ``repeat.0.bn.weight``)
* ``npu_separate``: this package with norms that cannot be merged (``repeat.0.bn.1.weight``)
* ``timm``: timm's ``inception_resnet_v2``; ``repeat.0.branch1.0.conv.weight``, classifier ``classif``
* ``cadene``: Cadene's pretrained-models.pytorch and Ascend's model zoo; timm's names, classifier ``last_linear``

Checkpoints of the model zoo wrap the last one in a ``state_dict`` key and a ``module.`` prefix, which
:func:`.serialization.load_weights` removes.
Translation moves and renames tensors; it computes nothing. The number of logits does not change: Cadene's and the
zoo's networks have 1001, of which index 0 is a background class; timm's ``label_offset`` drops it when it loads
pretrained weights.

    timm-npu-irv2 weights IN OUT --to timm|cadene|npu
"""

import functools
import re
import runpy
from collections.abc import Mapping
from typing import Dict, List, Tuple

import torch
from torch import Tensor

from .errors import UnknownDialect, UserError

__all__ = ['DIALECTS', 'convert', 'detect_dialect', 'merged_layers']

DIALECTS = ('npu', 'timm', 'cadene')

StateDict = Dict[str, Tensor]

Sources = Tuple[Tuple[str, int], ...]

# The merged layers of this network: {pattern of blocks: {merged layer: ((layer of timm's network, channels), …)}}.
_MERGED: Dict[str, Dict[str, Sources]] = {
    r'mixed_5b': {
        'siblings.conv': (('branch0.conv', 96), ('branch3.1.conv', 64), ('branch1.0.conv', 48), ('branch2.0.conv', 64)),
        'siblings.bn': (('branch1.0.bn', 48), ('branch2.0.bn', 64)),
        'bn': (('branch0.bn', 96), ('branch1.1.bn', 64), ('branch2.2.bn', 96), ('branch3.1.bn', 64)),
    },
    r'repeat\.\d+': {
        'siblings.conv': (('branch0.conv', 32), ('branch1.0.conv', 32), ('branch2.0.conv', 32)),
        'siblings.bn': (('branch1.0.bn', 32), ('branch2.0.bn', 32)),
        'bn': (('branch0.bn', 32), ('branch1.1.bn', 32), ('branch2.2.bn', 64)),
    },
    r'repeat_1\.\d+': {
        'siblings.conv': (('branch0.conv', 192), ('branch1.0.conv', 128)),
        'siblings.bn': (('branch1.0.bn', 128),),
        'bn': (('branch0.bn', 192), ('branch1.2.bn', 192)),
    },
    r'mixed_7a': {
        'siblings.conv': (('branch0.0.conv', 256), ('branch1.0.conv', 256), ('branch2.0.conv', 256)),
        'siblings.bn': (('branch0.0.bn', 256), ('branch1.0.bn', 256), ('branch2.0.bn', 256)),
        'bn': (('branch0.1.bn', 384), ('branch1.1.bn', 288), ('branch2.2.bn', 320)),
    },
    r'repeat_2\.\d+|block8': {
        'siblings.conv': (('branch0.conv', 192), ('branch1.0.conv', 192)),
        'siblings.bn': (('branch1.0.bn', 192),),
        'bn': (('branch0.bn', 192), ('branch1.2.bn', 256)),
    },
}
_CLASSIFIER = {'npu': 'classif', 'npu_separate': 'classif', 'timm': 'classif', 'cadene': 'last_linear'}


@functools.cache
def merged_layers(block: str) -> Dict[str, Sources]:
    """Return {merged layer: ((layer of timm's network, output channels), …)} for a block such as 'repeat.0'."""
    return next((merged for pattern, merged in _MERGED.items() if re.fullmatch(pattern, block)), {})


def _split_key(key: str) -> Tuple[str, str]:
    """Split a key into (block, rest); the block is '' outside the blocks with merged layers."""
    match = re.match(r'(mixed_5b|mixed_7a|block8|repeat(?:_[12])?\.\d+)\.(.+)', key)
    return (match[1], match[2]) if match else ('', key)


def _merged_place(block: str, rest: str) -> Tuple[str, int]:
    """Return the merged layer that holds a layer of timm's, and its index there; ('', -1) if it is not merged."""
    layer = rest.rpartition('.')[0]
    for merged, sources in merged_layers(block).items():
        for index, (source, _) in enumerate(sources):
            if layer == source:
                return merged, index
    return '', -1


def _unmerged_place(block: str, rest: str) -> Tuple[str, int]:
    """Return the merged layer of a key of this package, and the index of its part (-1 for the whole layer)."""
    layer = rest.rpartition('.')[0]
    merged = merged_layers(block)
    if layer in merged:
        return layer, -1
    separate, _, index = layer.rpartition('.')
    return (separate, int(index)) if separate in merged and index.isdecimal() else ('', -1)


def detect_dialect(state_dict: Mapping[str, Tensor]) -> str:
    """Return the dialect of a state dict, or of a part of one that has any merged layer.

    Raises:
        UnknownDialect: The keys are not those of Inception-ResNet-v2. The message names keys expected and found.
    """
    split_keys = [_split_key(key) for key in state_dict]
    own = [_unmerged_place(block, rest) for block, rest in split_keys]
    if any(merged for merged, _ in own):
        return 'npu_separate' if any(index >= 0 for _, index in own) else 'npu'
    if any(_merged_place(block, rest)[0] for block, rest in split_keys):
        return 'cadene' if any(key.startswith('last_linear.') for key in state_dict) else 'timm'
    found = ', '.join(list(state_dict)[:3]) or 'no keys'
    raise UnknownDialect(
        'these are not weights of Inception-ResNet-v2: expected keys like repeat.0.siblings.conv.weight (npu), '
        f'repeat.0.branch0.conv.weight (timm, with classif.weight; Cadene, with last_linear.weight); found {found}.'
    )


def convert(state_dict: Mapping[str, Tensor], to: str) -> StateDict:
    """Translate a state dict of any dialect. Merged and split tensors are copies, all others the given ones.

    Args:
        state_dict: Weights in any dialect.
        to: 'npu', 'timm', 'cadene' (or 'npu_separate').

    Raises:
        UnknownDialect: See :func:`detect_dialect`.
        UserError: ``to`` is not a dialect, or the channels of a merged tensor do not add up.
    """
    if to not in _CLASSIFIER:
        raise UserError(f"unknown dialect '{to}': use one of {', '.join(DIALECTS)}.")
    dialect = detect_dialect(state_dict)
    if dialect == to:
        return dict(state_dict)
    timm_names = _to_timm(state_dict, dialect)
    return _merge(timm_names, to) if to.startswith('npu') else _rename_classifier(timm_names, 'timm', to)


def _rename_classifier(state_dict: Mapping[str, Tensor], source: str, target: str) -> StateDict:
    old, new = _CLASSIFIER[source] + '.', _CLASSIFIER[target] + '.'
    return {new + key[len(old):] if key.startswith(old) else key: value for key, value in state_dict.items()}


def _to_timm(state_dict: Mapping[str, Tensor], dialect: str) -> StateDict:
    if dialect in ('timm', 'cadene'):
        return _rename_classifier(state_dict, dialect, 'timm')
    out: StateDict = {}
    for key, value in state_dict.items():
        block, rest = _split_key(key)
        merged, index = _unmerged_place(block, rest)
        name = rest.rpartition('.')[2]
        if not merged:
            out[key] = value
        elif index >= 0:
            out[f'{block}.{merged_layers(block)[merged][index][0]}.{name}'] = value
        else:
            sources = merged_layers(block)[merged]
            for (source, _), part in zip(sources, _split_tensor(key, value, sources), strict=True):
                out[f'{block}.{source}.{name}'] = part
    return out


def _split_tensor(key: str, value: Tensor, sources: Sources) -> List[Tensor]:
    """Split a merged tensor into its parts; a scalar (the count of batches) is copied to each."""
    channels = [count for _, count in sources]
    if value.ndim == 0:
        return [value.clone() for _ in channels]
    if value.shape[0] != sum(channels):
        raise UserError(f'{key} has {value.shape[0]} channels where {sum(channels)} are expected: the file is damaged.')
    return [part.clone() for part in value.split(channels)]


def _merge(timm_names: Mapping[str, Tensor], to: str) -> StateDict:
    """Merge the layers of timm's network; for npu_separate merge the convolutions and rename the norms."""
    out: StateDict = {}
    parts: Dict[str, Dict[int, Tensor]] = {}
    for key, value in timm_names.items():
        block, rest = _split_key(key)
        merged, index = _merged_place(block, rest)
        name = rest.rpartition('.')[2]
        if not merged:
            out[key] = value
        elif to == 'npu_separate' and merged.endswith('bn'):
            out[f'{block}.{merged}.{index}.{name}'] = value
        else:
            target, count = f'{block}.{merged}.{name}', len(merged_layers(block)[merged])
            parts.setdefault(target, {})[index] = value
            if len(parts[target]) == count:
                out[target] = _join_tensors([parts[target][i] for i in range(count)])
    incomplete = sorted(key for key in parts if key not in out)
    if incomplete:
        raise UserError(f'the layers that make up {incomplete[0]} are not all there: the file is damaged.')
    return out


def _join_tensors(parts: List[Tensor]) -> Tensor:
    # Merged norms have seen the same batches, so their counts agree in every file that training wrote.
    return torch.stack(parts).amax(0) if parts[0].ndim == 0 else torch.cat(parts)


if __name__ == '__main__':  # the command has another module, since this one may not import it
    runpy.run_module('timm_npu_irv2.cli.weights', run_name='__main__')

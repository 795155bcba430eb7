"""State dicts of Inception-ResNet-v2 in every dialect, told apart by their keys and translated bit for bit.

===============  =======================================================================================================
``npu``          this package: siblings and norms merged (``repeat.0.siblings.conv.weight``, ``repeat.0.bn.weight``)
``npu_separate`` this package with norms that can't be merged (``repeat.0.bn.1.weight``)
``timm``         timm's ``inception_resnet_v2``: ``repeat.0.branch1.0.conv.weight``, classifier ``classif``
``cadene``       Cadene's pretrained-models.pytorch and Ascend's model zoo: timm's names, classifier ``last_linear``
===============  =======================================================================================================

The zoo's checkpoints wrap the last one in a ``state_dict`` key and a ``module.`` prefix;
:func:`.serialization.load_weights` unwraps.
Translation moves and renames tensors and computes nothing. The number of logits stays what it is: Cadene's and the
zoo's have 1001, index 0 being a background class, which timm's ``label_offset`` drops for pretrained weights.

    python -m timm_npu_irv2.weights IN OUT --to timm|cadene|npu
"""

import argparse
import functools
import re
import sys
from collections.abc import Mapping
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .errors import UnknownDialect, UserError
from .serialization import load_weights, save_weights

__all__ = ['DIALECTS', 'convert', 'detect_dialect']

DIALECTS = ('npu', 'timm', 'cadene')

StateDict = Dict[str, Tensor]

# What is merged in which blocks: {block: {merged layer: [(layer in timm's network, output channels), …]}}.
_MERGED: Dict[str, Dict[str, Tuple[Tuple[str, int], ...]]] = {
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

Sources = Tuple[Tuple[str, int], ...]


@functools.cache
def _merged_in(block: str) -> Dict[str, Sources]:
    """The merged layers of a block; none for what is no block with any."""
    return next((merged for pattern, merged in _MERGED.items() if re.fullmatch(pattern, block)), {})


def _split_key(key: str) -> Tuple[str, str]:
    """A key as (block, the rest); '' for the block outside of those with merged layers."""
    match = re.match(r'(mixed_5b|mixed_7a|block8|repeat(?:_[12])?\.\d+)\.(.+)', key)
    return (match[1], match[2]) if match else ('', key)


def _merged_place(block: str, rest: str) -> Tuple[str, int]:
    """Where a layer of timm's goes: the merged layer and the part of it; ('', -1) if it stays alone."""
    layer = rest.rpartition('.')[0]
    for merged, sources in _merged_in(block).items():
        for index, (source, _) in enumerate(sources):
            if layer == source:
                return merged, index
    return '', -1


def _unmerged_place(block: str, rest: str) -> Tuple[str, int]:
    """Which merged layer a key of this package's belongs to, and the part of it if it holds one part only, else -1."""
    layer = rest.rpartition('.')[0]
    merged_in = _merged_in(block)
    if layer in merged_in:
        return layer, -1
    separate, _, index = layer.rpartition('.')
    return (separate, int(index)) if separate in merged_in and index.isdecimal() else ('', -1)


def detect_dialect(state_dict: Mapping[str, Tensor]) -> str:
    """The dialect of a state dict, by its keys; a part of one will do, as long as it tells.

    Raises:
        UnknownDialect: The keys are not Inception-ResNet-v2's. The message names keys expected and found.
    """
    split_keys = [_split_key(key) for key in state_dict]
    own = [_unmerged_place(block, rest) for block, rest in split_keys]
    if any(merged for merged, _ in own):
        return 'npu_separate' if any(index >= 0 for _, index in own) else 'npu'
    if any(_merged_place(block, rest)[0] for block, rest in split_keys):
        return 'cadene' if any(key.startswith('last_linear.') for key in state_dict) else 'timm'
    found = ', '.join(list(state_dict)[:3]) or 'no key at all'
    raise UnknownDialect(
        'these are not weights of Inception-ResNet-v2: expected keys like repeat.0.siblings.conv.weight (npu), '
        f'repeat.0.branch0.conv.weight (timm, with classif.weight; Cadene, with last_linear.weight); found {found}.'
    )


def convert(state_dict: Mapping[str, Tensor], to: str) -> StateDict:
    """Translate a state dict of any dialect; merged tensors are new, all others are the given ones.

    Args:
        state_dict: Weights in any dialect.
        to: 'npu', 'timm', 'cadene' (or 'npu_separate').

    Raises:
        UnknownDialect: See :func:`detect_dialect`.
        UserError: A dialect that does not exist, or a merged tensor whose channels do not add up.
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
            out[f'{block}.{_merged_in(block)[merged][index][0]}.{name}'] = value
        else:
            sources = _merged_in(block)[merged]
            for (source, _), part in zip(sources, _split_tensor(key, value, sources), strict=True):
                out[f'{block}.{source}.{name}'] = part
    return out


def _split_tensor(key: str, value: Tensor, sources: Sources) -> List[Tensor]:
    """The parts of a merged tensor; a scalar (the count of batches) is the same for all."""
    channels = [count for _, count in sources]
    if value.ndim == 0:
        return [value.clone() for _ in channels]
    if value.shape[0] != sum(channels):
        raise UserError(f'{key} has {value.shape[0]} channels where {sum(channels)} are expected: the file is damaged.')
    return [part.clone() for part in value.split(channels)]


def _merge(timm_names: Mapping[str, Tensor], to: str) -> StateDict:
    """timm's layers merged; for npu_separate only the convolutions, and the norms renamed."""
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
            target, count = f'{block}.{merged}.{name}', len(_merged_in(block)[merged])
            parts.setdefault(target, {})[index] = value
            if len(parts[target]) == count:
                out[target] = _join_tensors([parts[target][i] for i in range(count)])
    incomplete = sorted(key for key in parts if key not in out)
    if incomplete:
        raise UserError(f'the layers that make up {incomplete[0]} are not all there: the file is damaged.')
    return out


def _join_tensors(parts: List[Tensor]) -> Tensor:
    # They see the same batches, so their counts agree in every file that training wrote.
    return torch.stack(parts).amax(0) if parts[0].ndim == 0 else torch.cat(parts)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m timm_npu_irv2.weights',
        description='Translate weights of Inception-ResNet-v2 between dialects.',
    )
    parser.add_argument('input', metavar='IN', help='a .safetensors or .pth file in any dialect')
    parser.add_argument('output', metavar='OUT', help='the file to write: .safetensors, or .pth')
    parser.add_argument('--to', required=True, choices=DIALECTS, help='the dialect to write')
    parser.add_argument('--use-ema', action='store_true', help='take the averaged weights where the file has both')
    args = parser.parse_args(argv)
    try:
        source = load_weights(args.input, use_ema=args.use_ema)
        dialect = detect_dialect(source)
        save_weights(convert(source, to=args.to), args.output)
    except UserError as error:
        print(f'{parser.prog}: error: {error}', file=sys.stderr)
        return 2
    print(f'{args.input} ({dialect}) -> {args.output} ({args.to}), {len(source)} tensors read')
    return 0


if __name__ == '__main__':
    sys.exit(main())

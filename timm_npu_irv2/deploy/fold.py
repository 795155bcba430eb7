r"""From a trained network to one that only infers: the arithmetic that can be done once is done here.

* BatchNorm: $\gamma (W x - \mu) / \sqrt{v + \epsilon} + \beta = W' x + b'$.
* The scale of a residual block goes into its last convolution: $s\,(W z + b) = (sW)\,z + sb$.
* Of uint8 images $u$: $W\,(u / 255 - m) / d + b = W'' u + b''$, exact since the first convolution has no padding.

It is computed in float64, so that the result differs from the trained network's by the rounding of float32 alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from timm.utils import unwrap_model
from torch import Tensor, nn

from .. import device as devices
from .. import weights
from ..errors import UnknownDialect, UserError
from ..layers import ScaledReLU
from .network import InferenceNetwork

__all__ = ['to_inference']

StateDict = dict[str, Tensor]

# What is kept of a pretrained_cfg: how an image becomes an input, and what the classes are called.
KEPT = ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std', 'label_names', 'label_descriptions')

# Residual blocks and their scales; https://arxiv.org/abs/1602.07261, section 3.3, and the values of TF-slim's network.
SCALES = {
    **{f'repeat.{i}': 0.17 for i in range(10)},
    **{f'repeat_1.{i}': 0.10 for i in range(20)},
    **{f'repeat_2.{i}': 0.20 for i in range(9)},
    'block8': 1.0,
}
# Convolutions of timm's that become one: {block: their names}.
SIBLINGS = {
    'mixed_5b': ('branch0', 'branch1.0', 'branch2.0'),
    'mixed_7a': ('branch0.0', 'branch1.0', 'branch2.0'),
    **{block: ('branch0', 'branch1.0', *(['branch2.0'] if block.startswith('repeat.') else [])) for block in SCALES},
}


def to_inference(
        model: nn.Module,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
) -> InferenceNetwork:
    """The fastest equal of ``model`` that can only infer.

    Args:
        model: This package's network or timm's ``inception_resnet_v2``, with BatchNorm and ReLU, trained. It stays as
            it is.
        device: Where to infer; None for where the model is. Layout and kernels are chosen for it.
        dtype: Of weights and output; None for float32, 'fast' for what the device computes fastest in.
        mean, std: The normalisation of uint8 images; None for what the model's ``pretrained_cfg`` says.

    Raises:
        UserError: The network is another one, or has norms or activations that can't be folded.
    """
    model = unwrap_model(model)
    norm_eps = _check(model)
    in_chans = model.conv2d_1a.conv.in_channels
    cfg = preprocessing(model, mean, std)
    normalization = (torch.tensor(cfg[name], dtype=torch.float64) for name in ('mean', 'std'))
    folded = fold(weights.convert(model.state_dict(), to='timm'), norm_eps, *normalization)
    device = torch.device(device) if device is not None else model.conv2d_1a.conv.weight.device
    network = InferenceNetwork(
        num_classes=model.num_classes, in_chans=in_chans, global_pool=_pool_type(model.global_pool), device='meta')
    dtype = devices.fast_dtype(device) if dtype == 'fast' else dtype or torch.float32
    network.load_state_dict({key: value.to(device, dtype) for key, value in folded.items()}, assign=True)
    network.pretrained_cfg = cfg
    return network.freeze()


def preprocessing(
        model: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
) -> dict[str, Any]:
    """What the network that infers keeps of a model's ``pretrained_cfg``, with a mean and a std for each channel.

    Raises:
        UserError: There are as many means or deviations as neither one nor the channels.
    """
    given = dict(getattr(model, 'pretrained_cfg', None) or {})
    in_chans = model.conv2d_1a.conv.in_channels
    cfg = {key: given[key] for key in KEPT if given.get(key) is not None}
    cfg['input_size'] = (in_chans, *cfg.get('input_size', (3, 299, 299))[1:])
    for name, chosen in (('mean', mean), ('std', std)):
        values = tuple(chosen or cfg.get(name) or (0.5,))
        cfg[name] = values[:1] * in_chans if len(set(values)) == 1 else values
        if len(cfg[name]) != in_chans:
            raise UserError(f'{name} has {len(values)} values, the images have {in_chans} channels: give {in_chans}.')
    return cfg


def fold(state_dict: StateDict, eps: float, mean: Tensor, std: Tensor) -> StateDict:
    """timm's weights as :class:`InferenceNetwork`'s, float64; ``mean`` and ``std`` (in_chans,) are for uint8 images."""
    convolutions = [key.removesuffix('.weight') for key, value in state_dict.items() if value.ndim == 4]
    folded = {name.removesuffix('.conv'): _fold_norm(state_dict, name, eps) for name in convolutions}
    for block, scale in SCALES.items():
        folded[f'{block}.conv2d'] = tuple(scale * tensor for tensor in folded[f'{block}.conv2d'])
    for block, names in SIBLINGS.items():
        parts = [folded.pop(f'{block}.{name}') for name in names]
        folded[f'{block}.siblings'] = tuple(map(torch.cat, zip(*parts, strict=True)))
    folded['conv2d_1a_uint8'] = _fold_normalization(*folded['conv2d_1a'], mean, std)
    out = {f'{name}.{kind}': tensor
           for name, tensors in folded.items() for kind, tensor in zip(('weight', 'bias'), tensors, strict=True)}
    return out | {key: value.double() for key, value in state_dict.items() if key.startswith('classif.')}


def _fold_norm(state_dict: StateDict, name: str, eps: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution and the norm after it; the last ones of residual blocks have a bias instead."""
    weight = state_dict[f'{name}.weight'].double()
    if f'{name}.bias' in state_dict:
        return weight, state_dict[f'{name}.bias'].double()
    norm = name.removesuffix('conv') + 'bn'
    gamma, beta, mean, var = (state_dict[f'{norm}.{kind}'].double()
                              for kind in ('weight', 'bias', 'running_mean', 'running_var'))
    factor = gamma / (var + eps).sqrt()
    return weight * factor.view(-1, 1, 1, 1), beta - mean * factor


def _fold_normalization(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight / std.to(weight.device).view(1, -1, 1, 1)
    return weight / 255, bias - (weight.sum((2, 3)) * mean.to(weight.device)).sum(1)


def _check(model: nn.Module) -> float:
    """The epsilon of the model's norms. Raises UserError unless all of it can be folded."""
    try:
        weights.detect_dialect(model.state_dict())
    except UnknownDialect as error:
        raise UserError(f'{type(model).__name__} is not Inception-ResNet-v2: only that can be folded.') from error
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    foldable = all(isinstance(norm, BatchNormAct2d) and norm.track_running_stats
                   and isinstance(norm.act, (nn.ReLU, ScaledReLU)) for norm in norms)
    if not norms or not foldable or len({norm.eps for norm in norms}) > 1:
        raise UserError('only a network with BatchNorm and ReLU (norm_layer and act_layer as they come) can be folded.')
    return norms[0].eps


def _pool_type(pool: nn.Module) -> str:
    return getattr(pool, 'pool_type', '') or ''

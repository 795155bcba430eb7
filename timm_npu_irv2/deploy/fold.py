r"""Conversion of a trained network to one that only infers: arithmetic on constants is done here, once.

* BatchNorm: $\gamma (W x - \mu) / \sqrt{v + \epsilon} + \beta = W' x + b'$.
* The scale of a residual block goes into its last convolution: $s\,(W z + b) = (sW)\,z + sb$.
* Of uint8 images $u$: $W\,(u / 255 - m) / d + b = W'' u + b''$, exact since the first convolution has no padding.

All of it is computed in float64, so the result differs from the trained network only by the rounding of float32.
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
from ..model import residual_scales
from .network import InferenceNetwork

__all__ = ['to_inference']

StateDict = dict[str, Tensor]

# The entries of a pretrained_cfg that are kept: how an image becomes an input, and the names of the classes.
KEPT = ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std', 'input_img_mode', 'label_names',
        'label_descriptions')

POOLED = 'branch3.1'  # the sibling that stays apart: no ReLU may come before the pooling that follows it


def to_inference(
        model: Any,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
) -> InferenceNetwork:
    """Convert ``model`` to a network that computes the same and can only infer.

    Args:
        model: Trained network of this package or timm's ``inception_resnet_v2``, with BatchNorm and ReLU. It is not
            changed.
        device: Device of the result, which decides layout and kernels; None for the model's.
        dtype: Dtype of weights and output; None for float32, 'fast' for the one in which the device is fastest.
        mean: Mean of the normalisation of uint8 images; None for that of the model's ``pretrained_cfg``.
        std: Standard deviation, likewise.

    Raises:
        UserError: ``model`` is another network, or has norms or activations that cannot be folded.
    """
    model = unwrap_model(model)
    norm_eps = _check(model)
    weight: Tensor = model.conv2d_1a.conv.weight
    cfg = preprocessing(model, mean, std)
    normalization = [torch.tensor(cfg[name], dtype=torch.float64) for name in ('mean', 'std')]
    place = torch.device(device) if device is not None else weight.device
    kind = _resolve_dtype(dtype, place)
    network = InferenceNetwork(num_classes=model.num_classes, in_chans=weight.shape[1],
                               global_pool=getattr(model.global_pool, 'pool_type', '') or '', device='meta')
    with torch.inference_mode(False), torch.no_grad():  # tensors whose changes `FusedConvolution` can notice
        try:
            folded = fold(weights.convert(model.state_dict(), to='timm'), norm_eps, *normalization)
        except KeyError as error:
            raise UserError(f'the network has no layer {error}: only a whole one can be folded.') from error
        network.load_state_dict({key: value.to(place, kind) for key, value in folded.items()}, assign=True)
    network.pretrained_cfg = cfg
    return network.freeze()


def _resolve_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if dtype == 'fast':
        return devices.fast_dtype(device)
    if dtype is None:
        return torch.float32
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"dtype must be a torch.dtype, None or 'fast', not {dtype!r}.")
    return dtype


def preprocessing(
        model: Any,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Return the part of a model's ``pretrained_cfg`` that inference needs, with a mean and a std for each channel.

    Raises:
        UserError: The number of means or standard deviations is neither 1 nor that of the channels.
    """
    given = dict(getattr(model, 'pretrained_cfg', None) or {})
    in_chans: int = model.conv2d_1a.conv.in_channels
    cfg = {key: given[key] for key in KEPT if given.get(key) is not None}
    cfg['input_size'] = (in_chans, *cfg.get('input_size', (3, 299, 299))[1:])
    for name, chosen in (('mean', mean), ('std', std)):
        values = tuple(chosen or cfg.get(name) or (0.5,))
        cfg[name] = values[:1] * in_chans if len(set(values)) == 1 else values
        if len(cfg[name]) != in_chans:
            raise UserError(f'{name} has {len(values)} values, the images have {in_chans} channels: give {in_chans}.')
    return cfg


def fold(state_dict: StateDict, eps: float, mean: Tensor, std: Tensor) -> StateDict:
    """Convert timm's weights to those of :class:`InferenceNetwork`, in float64.

    Args:
        state_dict: Weights in timm's dialect.
        eps: Epsilon of the norms.
        mean: Mean (in_chans,) of the normalisation of uint8 images.
        std: Standard deviation (in_chans,).
    """
    convolutions = [key.removesuffix('.weight') for key, value in state_dict.items() if value.ndim == 4]
    folded = {name.removesuffix('.conv'): _fold_norm(state_dict, name, eps) for name in convolutions}
    for block, scale in residual_scales().items():
        weight, bias = folded[f'{block}.conv2d']
        folded[f'{block}.conv2d'] = scale * weight, scale * bias
    for block in ('mixed_5b', *residual_scales(), 'mixed_7a'):
        siblings = [name.removesuffix('.conv') for name, _ in weights.merged_layers(block)['siblings.conv']]
        parts = [folded.pop(f'{block}.{name}') for name in siblings if name != POOLED]
        folded[f'{block}.siblings'] = torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])
    folded['conv2d_1a_uint8'] = _fold_normalization(*folded['conv2d_1a'], mean, std)
    out = {f'{name}.{kind}': tensor
           for name, tensors in folded.items() for kind, tensor in zip(('weight', 'bias'), tensors, strict=True)}
    return out | {key: value.double() for key, value in state_dict.items() if key.startswith('classif.')}


def _fold_norm(state_dict: StateDict, name: str, eps: float) -> tuple[Tensor, Tensor]:
    """Fold a convolution and the norm after it into weight and bias; the last ones of blocks have a bias, no norm."""
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
    """Return the epsilon of the model's norms. Raise UserError unless all of them can be folded."""
    try:
        weights.detect_dialect(model.state_dict())
    except UnknownDialect as error:
        raise UserError(f'{type(model).__name__} is not Inception-ResNet-v2: only that can be folded.') from error
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    foldable = all(isinstance(norm, BatchNormAct2d) and norm.track_running_stats and isinstance(norm.act, nn.ReLU)
                   for norm in norms)
    if not norms or not foldable or len({norm.eps for norm in norms}) > 1:
        raise UserError(
            'only a network with BatchNorm and ReLU (the defaults of norm_layer and act_layer) can be folded.')
    return norms[0].eps

"""The layers in which this network differs from timm's: merged siblings and norms, scaled ends of residual branches,
and a BatchNorm that counts on the host."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d as TimmBatchNormAct2d
from timm.layers import ConvNormAct, get_norm_act_layer
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .ops import batch_norm_relu, scaled_relu

__all__ = ['BatchNormAct2d', 'BlockSequence', 'LayerFactory', 'PiecewiseNorm', 'ScaledBiasConv2d', 'Siblings',
           'conv_pool', 'recomputed']


@register_notrace_module
class BatchNormAct2d(TimmBatchNormAct2d):
    """timm's BatchNorm + activation (without its dropout), with the number of batches counted on the host.

    PyTorch keeps ``num_batches_tracked`` as a tensor beside the weights and adds 1 to it on the device: one more kernel
    launch a layer and step, for a number that nobody reads as long as ``momentum`` is set. Here it is a CPU tensor that
    is no buffer, so ``.to(device)``, DDP and SyncBatchNorm leave it alone, and ``new_batches``, a number that is added
    to it when somebody looks; it is still saved and loaded under its name.
    """

    __jit_unused_properties__ = ('num_batches_tracked',)

    def __init__(self, num_features: int, **kwargs) -> None:
        super().__init__(num_features, **kwargs)
        del self._buffers['num_batches_tracked']
        self.batches = torch.zeros((), dtype=torch.long, device='cpu')
        self.new_batches: List[int] = [0]  # a list, for it is ten times faster to write to than an attribute

    def _all_batches(self) -> Tensor:
        self.batches.add_(self.new_batches[0])
        self.new_batches[0] = 0
        return self.batches

    @property
    def num_batches_tracked(self) -> Optional[Tensor]:
        """The number of batches seen in training, a scalar beside the running statistics (a copy: see the class)."""
        if 'batches' not in self.__dict__:  # while the base class builds itself
            raise AttributeError('num_batches_tracked')
        return self._all_batches().to(self.running_mean.device) if self.track_running_stats else None

    def reset_running_stats(self) -> None:
        """Forget the statistics and the count."""
        super().reset_running_stats()
        if 'batches' in self.__dict__:
            self.batches.zero_()
            self.new_batches[0] = 0

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.track_running_stats:
            # The tensor itself, as for any buffer: an average of weights (EMA) writes through the state dict.
            destination[prefix + 'num_batches_tracked'] = self._all_batches()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # `state_dict` is the caller's copy for this module. Files from before PyTorch 0.4.1 have no count.
        count = state_dict.pop(prefix + 'num_batches_tracked', None)
        if count is not None and not count.is_meta:
            self.batches.copy_(count)
            self.new_batches[0] = 0
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate ``x`` (N, num_features, H, W)."""
        if torch.jit.is_scripting():
            return self.act(self.normalize(x))
        act = self.act
        if type(act) is not ScaledReLU and type(act) is not nn.ReLU:
            return act(self.normalize(x))
        training, momentum = self._next_batch()
        scale = act.scale if type(act) is ScaledReLU else 1.0
        return batch_norm_relu(
            x, self.weight, self.bias, self.running_mean, self.running_var, training, momentum, self.eps, scale,
        )

    def normalize(self, x: Tensor) -> Tensor:
        """Normalise ``x`` without the activation."""
        training, momentum = self._next_batch()
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, momentum, self.eps,
        )

    def _next_batch(self) -> Tuple[bool, float]:
        """Count a batch; whether its own statistics are used, and how far the running ones move towards them."""
        momentum = self.momentum
        factor = 0.0 if momentum is None else momentum
        # momentum 0 freezes the statistics (see `frozen_statistics`): such a pass counts for nothing.
        if self.training and self.track_running_stats and (momentum is None or momentum != 0.0):
            self.new_batches[0] += 1
            if momentum is None:  # cumulative average
                factor = 1.0 / (float(self.batches) + self.new_batches[0])
        return self.training or not self.track_running_stats, factor


class ScaledReLU(nn.Module):
    """The activation scale * relu(x) (:func:`~.ops.scaled_relu`)."""

    def __init__(self, scale: float, inplace: bool = False) -> None:
        super().__init__()
        self.scale = scale
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``x``, in place if the module was made so."""
        return scaled_relu(x, self.scale, self.inplace)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f'scale={self.scale}'


class ScaledBiasConv2d(nn.Conv2d):
    r"""The convolution $W x + s\,b$ at the end of a residual branch, whose input has been multiplied by $s$ already."""

    def __init__(self, *args, bias_scale: float, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.bias_scale = bias_scale

    def forward(self, x: Tensor, scaled_bias: Optional[Tensor] = None) -> Tensor:
        """Apply to ``x`` (N, in_channels, H, W); ``scaled_bias`` is s·b, if it has been computed already."""
        if scaled_bias is None:
            bias = self.bias
            assert bias is not None  # for TorchScript
            scaled_bias = bias * self.bias_scale
        return F.conv2d(x, self.weight, scaled_bias, self.stride, self.padding, self.dilation, self.groups)


class _ScaledBiases(torch.autograd.Function):
    """s·b for many small b, in one operator forward and one backward."""

    @staticmethod
    def forward(ctx, scale: float, *biases: Tensor) -> Tuple[Tensor, ...]:
        ctx.scale = scale
        return tuple(torch._foreach_mul(biases, scale))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tuple[Optional[Tensor], ...]:
        return None, *torch._foreach_mul(grads, ctx.scale)


class PiecewiseNorm(nn.ModuleList):
    """Norms over consecutive channels, for kinds that look across channels (GroupNorm, LayerNorm …)."""

    def __init__(self, channels: Sequence[int], norms: Iterable[nn.Module]) -> None:
        super().__init__(norms)
        self.channels: List[int] = list(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, sum(channels), H, W) -> the same shape."""
        pieces = x.split(self.channels, 1)
        out: List[Tensor] = []
        for index, norm in enumerate(self):
            out.append(norm(pieces[index]))
        return torch.cat(out, 1)


def split(x: Tensor, channels: List[int]) -> List[Tensor]:
    """``x.split(channels, 1)``, without an operator in the gradient where there is one piece only."""
    if len(channels) == 1:
        return [x]
    pieces = x.split(channels, 1)
    return [pieces[i] for i in range(len(channels))]  # FX cannot iterate


class Siblings(nn.Module):
    """1×1 convolutions that share their input, as one: the input is read once, there is one launch for two or three.

    Args:
        layers: Makes the norm.
        in_channels: Of the input.
        direct: Output channels of the convolutions whose norm comes later, after a concatenation.
        passed_on: Output channels of those that are normalised here, for the branches' next convolutions.
    """

    def __init__(
            self,
            layers: 'LayerFactory',
            in_channels: int,
            direct: Sequence[int],
            passed_on: Sequence[int],
            **dd,
    ) -> None:
        super().__init__()
        self.passed_on: List[int] = list(passed_on)
        self.pieces: List[int] = [*direct, sum(passed_on)]
        self.conv = nn.Conv2d(in_channels, sum(direct) + sum(passed_on), kernel_size=1, bias=False, **dd)
        self.bn = layers.norm(passed_on, **dd)

    def forward(self, x: Tensor) -> List[Tensor]:
        """(N, in_channels, H, W) -> one (N, C, H, W) for each of ``direct``, then for each of ``passed_on``."""
        x = self.conv(x)
        pieces = split(x, self.pieces)
        return pieces[:-1] + split(self.bn(pieces[-1]), self.passed_on)


class BlockSequence(nn.Sequential):
    """A run of residual blocks, of whose inner activations some or all can be recomputed in the backward."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.recompute = ''  # 'cheap', 'all' or nothing

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks in turn."""
        if torch.jit.is_scripting() or torch.compiler.is_compiling() or not isinstance(x, Tensor):  # FX's proxies
            for block in self:
                x = block(x)
            return x
        for block, bias in zip(self, scaled_biases(self), strict=True):
            if self.recompute == 'all':
                x = recomputed(block, x, bias)
            elif self.recompute == 'cheap':
                x = block.residual(x, recomputed(block.branches, x, bias, keep_convolutions=True))
            else:
                x = block(x, bias)
        return x


def scaled_biases(blocks: Sequence[nn.Module]) -> Sequence[Optional[Tensor]]:
    """The scaled bias of each block's last convolution, computed together; None where a block does it by itself."""
    convs = [block.conv2d for block in blocks]
    scales = {conv.bias_scale for conv in convs}
    if len(scales) != 1 or scales == {1.0}:
        return [None] * len(convs)
    return _ScaledBiases.apply(scales.pop(), *[conv.bias for conv in convs])


def recomputed(function: Callable[..., Tensor], *inputs: Optional[Tensor], keep_convolutions: bool = False) -> Tensor:
    """``function(*inputs)``, keeping only the inputs for the backward, which computes what is inside once more.

    Args:
        function: A module or its bound method.
        inputs: Its arguments.
        keep_convolutions: Keep the outputs of convolutions too: what is left to compute again (norms, activations,
            concatenations, pooling) is little work.
    """
    module = function if isinstance(function, nn.Module) else function.__self__
    contexts = functools.partial(_recompute_contexts, module, keep_convolutions)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _recompute_contexts(
        module: nn.Module,
        keep_convolutions: bool,
) -> Tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """What the first and the second pass run in."""
    if not keep_convolutions:
        return contextlib.nullcontext(), frozen_statistics(module)
    first, second = create_selective_checkpoint_contexts(_keep_convolutions)
    return first, _both(second, frozen_statistics(module))


@contextlib.contextmanager
def _both(*contexts: contextlib.AbstractContextManager) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _keep_convolutions(_context: Any, operator: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    # The convolution with a bias ends a residual branch: nobody needs its output in the backward.
    kept = operator == torch.ops.aten.convolution.default and args[2] is None
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Let the BatchNorms inside ``module`` use batch statistics without moving their running ones.

    The second forward of a checkpointed block sees the batch once more, which must not count twice.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    # PyTorch's own norms count whatever their momentum is.
    counted = [norm.num_batches_tracked for norm in norms if norm._buffers.get('num_batches_tracked') is not None]
    counts = [(count, count.clone()) for count in counted]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for count, before in counts:
            count.copy_(before)


def conv_pool(conv: ConvNormAct, pool: nn.MaxPool2d, x: Tensor) -> Tensor:
    """``pool(conv(x))``, but with the ReLU after the pooling, where the tensor is a quarter of the size.

    A maximum and a ReLU commute exactly, and so do their gradients. Whoever listens to ``conv`` (hooks), or has
    given it another norm or activation, gets the layers one after the other.
    """
    norm = conv.bn
    if type(norm) is not BatchNormAct2d or not isinstance(norm.act, nn.ReLU) or conv._forward_hooks:
        return pool(conv(x))
    return norm.act(pool(norm.normalize(conv.conv(x))))


def _host_counting_batch_norm(num_features: int, **kwargs) -> BatchNormAct2d:
    # timm takes a function for a ready-made norm + activation layer, a class for a plain norm to be looked up by name.
    return BatchNormAct2d(num_features, **kwargs)


class LayerFactory:
    """Makes the layers of the blocks: timm's ConvNormAct and what this network has besides.

    Args:
        norm_layer: A norm that timm's ``ConvNormAct`` takes; 'batchnorm2d' becomes :class:`BatchNormAct2d`.
        norm_eps: The norm's epsilon.
        act_layer: An activation that timm's ``ConvNormAct`` takes.

    Attributes:
        scales_activation: Whether :meth:`norm` can multiply its output by a constant.
    """

    def __init__(
            self,
            norm_layer: str | type | Callable,
            norm_eps: float,
            act_layer: str | type | Callable,
    ) -> None:
        self._is_batch_norm = norm_layer in (nn.BatchNorm2d, TimmBatchNormAct2d) or (
            isinstance(norm_layer, str) and norm_layer.replace('_', '').lower() in ('batchnorm', 'batchnorm2d')
        )
        self._norm_layer = norm_layer
        self._eps = norm_eps
        self._act_layer = act_layer
        self.scales_activation = self._is_batch_norm and act_layer in ('relu', nn.ReLU)

    def _norm_act(self, act_layer: str | type | Callable) -> Callable[..., nn.Module]:
        if self._is_batch_norm:
            return functools.partial(_host_counting_batch_norm, act_layer=act_layer)
        return get_norm_act_layer(self._norm_layer, act_layer)

    def conv(self, in_channels: int, out_channels: int, normalized: bool = True, **kwargs) -> ConvNormAct:
        """timm's ConvNormAct without padding, or its convolution alone if the norm comes after a concatenation."""
        return ConvNormAct(
            in_channels, out_channels,
            apply_norm=normalized,
            norm_layer=self._norm_act(self._act_layer) if self._is_batch_norm else self._norm_layer,
            act_layer=self._act_layer,
            norm_kwargs=dict(eps=self._eps),
            act_kwargs=dict(inplace=True),
            **{'padding': 0, **kwargs},
        )

    def norm(self, channels: Sequence[int], scale: float = 1.0, **dd) -> nn.Module:
        """The norms and activations of layers whose outputs are concatenated, as one; exact, since BatchNorm, like an
        activation, works on each channel by itself. ``scale`` multiplies the activation's output."""
        act_layer = functools.partial(ScaledReLU, scale) if scale != 1.0 else self._act_layer
        make = functools.partial(self._norm_act(act_layer), eps=self._eps, act_kwargs=dict(inplace=True), **dd)
        return make(sum(channels)) if self._is_batch_norm else PiecewiseNorm(channels, map(make, channels))

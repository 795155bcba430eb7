"""The layers in which this network differs from timm's.

Merged siblings and norms, residual blocks that scale their small tensors instead of their large ones, and a BatchNorm
that counts its batches on the host. What bypasses a module is a shortcut; see ``shortcuts.py`` for when one is taken.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d as TimmBatchNormAct2d
from timm.layers import ConvNormAct, get_norm_act_layer
from timm.models import register_notrace_module
from torch import Tensor, nn

from .ops import batch_norm_relu, pointwise_convolution, pointwise_form, scaled_residual_relu, variants
from .recompute import recomputed
from .shortcuts import is_eager, is_unobserved

__all__ = ['BatchNormAct2d', 'BlockSequence', 'LayerFactory', 'PiecewiseNorm', 'PointwiseConvNormAct', 'ResidualBlock',
           'Siblings', 'concatenate', 'conv_pool']


class _Dictionary:
    """The dictionary of a module's buffers once more.

    Up to PyTorch 2.11 Dynamo takes ``__dict__['_buffers']`` for the property of that name, and a getter that looks
    there calls itself without an end. A plain dictionary torch.export would take for an attribute, and copy it.
    """

    def __init__(self, buffers: Dict[str, Optional[Tensor]]) -> None:
        self.buffers = buffers


@register_notrace_module
class BatchNormAct2d(TimmBatchNormAct2d):
    """timm's BatchNorm + activation, with the number of batches counted on the host.

    PyTorch adds 1 to ``num_batches_tracked`` on the device: one more kernel launch a layer and step, for a number that
    nobody reads as long as ``momentum`` is set. Here a step adds 1 to ``new_batches``, a number on the host, and the
    buffer receives it when somebody looks at the buffers: an attribute, a state dict, a copy to another device.
    """

    __jit_unused_properties__ = ('num_batches_tracked', '_buffers')
    __jit_ignored_attributes__ = ('_dictionary',)

    def __init__(self, num_features: int, **kwargs) -> None:
        super().__init__(num_features, **kwargs)
        self.new_batches: List[int] = [0]  # a list is ten times faster to write to than an attribute of a module
        self.counts_batches = True  # see recompute.py

    def _get_buffers(self) -> Dict[str, Optional[Tensor]]:
        buffers = self.__dict__['_dictionary'].buffers
        new_batches = self.__dict__.get('new_batches')
        if new_batches is not None and new_batches[0]:
            count = buffers.get('num_batches_tracked')
            if count is not None:
                with torch.no_grad():
                    count.add_(new_batches[0])
            new_batches[0] = 0
        return buffers

    def _set_buffers(self, buffers: Dict[str, Optional[Tensor]]) -> None:
        self.__dict__['_buffers'] = buffers
        self.__dict__['_dictionary'] = _Dictionary(buffers)

    def _get_count(self) -> Optional[Tensor]:
        if 'num_batches_tracked' not in self.__dict__.get('_buffers', ()):
            raise AttributeError('num_batches_tracked')  # while the base class builds itself
        return self._buffers['num_batches_tracked']

    # Everything that reads or changes buffers goes through these names, which PyTorch's classes define as attributes.
    _buffers = property(_get_buffers, _set_buffers)
    num_batches_tracked = property(_get_count)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate ``x`` (N, num_features, H, W)."""
        if torch.jit.is_scripting():
            return self.act(self.drop(self.normalize(x, on_host=False)))
        eager = is_eager(x)
        if eager and self.can_fuse():
            return self.normalize_and_activate(x)
        return self.act(self.drop(self.normalize(x, on_host=eager)))

    def can_fuse(self) -> bool:
        """Return True if the activation is a ReLU, and nobody can tell whether its module and ``drop`` are called."""
        modules, parameters = self._modules, self._parameters
        return (
            type(self) is BatchNormAct2d  # not parametrized
            and 'weight' in parameters and 'bias' in parameters  # not pruned
            and is_unobserved(modules['act'], nn.ReLU)
            and is_unobserved(modules['drop'], nn.Identity)
        )

    def normalize(self, x: Tensor, on_host: bool = True) -> Tensor:
        """Normalise ``x`` without the activation; in training count the batch, on the host or in the buffer."""
        training, momentum, mean, var = self._next_batch(self.running_mean, self.running_var, on_host)
        return F.batch_norm(x, mean, var, self.weight, self.bias, training, momentum, self.eps)

    def normalize_and_activate(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Compute scale * relu(normalize(x)) in one operator, without a call of the activation's module."""
        # An attribute of a module that is a tensor takes ten times as long to find as an entry of these.
        parameters, buffers = self.__dict__['_parameters'], self.__dict__['_buffers']
        training, momentum, mean, var = self._next_batch(buffers['running_mean'], buffers['running_var'], True)
        weight, bias = parameters['weight'], parameters['bias']
        return batch_norm_relu(x, weight, bias, mean, var, training, momentum, self.eps, scale)

    def _next_batch(
            self,
            mean: Optional[Tensor],
            var: Optional[Tensor],
            on_host: bool,
    ) -> Tuple[bool, float, Optional[Tensor], Optional[Tensor]]:
        """Count a batch, and return F.batch_norm's arguments training, momentum, running_mean and running_var."""
        momentum = self.momentum
        if not self.training:
            return mean is None and var is None, 0.0 if momentum is None else momentum, mean, var
        if not self.track_running_stats:
            return True, 0.0, None, None
        if self.counts_batches:
            if on_host:
                self.new_batches[0] += 1
            elif self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        if momentum is None:  # the running statistics are averages over all batches
            return True, 1.0 / float(self.num_batches_tracked), mean, var
        return True, momentum, mean, var


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


def split(x: Tensor, channels: List[int], dim: int = 1) -> List[Tensor]:
    """Split ``x`` along its channels (or ``dim``), without an operator in the gradient if there is one piece only."""
    if len(channels) == 1:
        return [x]
    pieces = x.split(channels, dim)
    return [pieces[i] for i in range(len(channels))]  # FX cannot iterate


def convolve_1x1(conv: nn.Module, x: Tensor, large: bool = False) -> Tensor:
    """Compute ``conv(x)`` for a 1×1 convolution in the chosen form (``large``: 'large' may mean this one)."""
    if is_eager(x) and _is_product(x, large) and is_unobserved(conv, nn.Conv2d):
        parameters: Any = conv._parameters
        if 'weight' in parameters and 'bias' in parameters and parameters['weight'].dtype == x.dtype:
            return pointwise_convolution(x, parameters['weight'], parameters['bias'])
    return conv(x)


def _is_product(x: Tensor, large: bool = False) -> bool:
    form = pointwise_form(x)
    return form == 'product' or (large and form == 'large' and x.shape[2:].numel() >= LARGE)


LARGE = 1024  # positions of an image


class PointwiseConvNormAct(ConvNormAct):
    """timm's ConvNormAct of a 1×1 convolution, which may be computed as a product of matrices."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise and activate ``x`` (N, C, H, W)."""
        if torch.jit.is_scripting():  # noqa: SIM108 - TorchScript leaves out the other branch of a statement only
            x = self.conv(x)
        else:
            x = convolve_1x1(self.conv, x, large=True)
        return self.bn(x)


def concatenate(branches: List[Tensor]) -> Tensor:
    """Concatenate branches (N, C, H, W) along their channels, for a norm."""
    if torch.jit.is_scripting():
        # TorchScript differentiates cat and batch_norm as one graph, which fails in inference_mode after training.
        return torch.hstack(branches)
    return torch.cat(branches, 1)


def _as_tuple(pieces: List[Tensor]) -> Any:
    return tuple(pieces)  # backward hooks look into tuples, not into lists


class Siblings(nn.Module):
    """1×1 convolutions that share their input, as one: the input is read once, there is one launch for two or three.

    Args:
        layers: Factory of the norm.
        in_channels: Channels of the input.
        direct: Output channels of the convolutions whose norm comes later, after a concatenation.
        passed_on: Output channels of those that are normalised here, for the next convolutions of the branches.
        large: They are outside the residual blocks: form 'large' (:mod:`.ops.variants`) may mean them.
    """

    def __init__(
            self,
            layers: 'LayerFactory',
            in_channels: int,
            direct: Sequence[int],
            passed_on: Sequence[int],
            large: bool = False,
            **dd,
    ) -> None:
        super().__init__()
        self.large = large
        self.passed_on: List[int] = list(passed_on)
        self.pieces: List[int] = [*direct, sum(passed_on)]
        self.conv = nn.Conv2d(in_channels, sum(direct) + sum(passed_on), kernel_size=1, bias=False, **dd)
        self.bn = layers.norm(passed_on, **dd)

    def forward(self, x: Tensor) -> List[Tensor]:
        """(N, in_channels, H, W) -> one (N, C, H, W) for each of ``direct``, then for each of ``passed_on``."""
        if torch.jit.is_scripting():  # noqa: SIM108 - TorchScript leaves out the other branch of a statement only
            pieces = split(self.conv(x), self.pieces)
        else:
            pieces = self.convolve(x)
        out = pieces[:-1] + split(self.bn(pieces[-1]), self.passed_on)
        if torch.jit.is_scripting():
            return out  # TorchScript has no tuples of any length
        return _as_tuple(out)

    @torch.jit.unused
    def convolve(self, x: Tensor) -> List[Tensor]:
        """Return the outputs of the convolutions, those of ``passed_on`` as one; separate ones are a shortcut."""
        conv: Any = self.conv
        if variants().siblings != 'separate' or not is_eager(x) or not is_unobserved(conv, nn.Conv2d):
            return split(convolve_1x1(conv, x, self.large), self.pieces)
        weights = split(conv._parameters['weight'], self.pieces, 0)
        if _is_product(x) and weights[0].dtype == x.dtype:
            return [pointwise_convolution(x, weight, None) for weight in weights]
        return [conv._conv_forward(x, weight, None) for weight in weights]


def add_scaled(x: Tensor, branch: Tensor, scale: float) -> Tensor:
    """Compute x + scale * branch; ``scale`` may have become a tensor or a parameter."""
    if torch.jit.is_scripting() or not isinstance(scale, Tensor):
        return torch.add(x, branch, alpha=scale)
    return x + branch * scale


class ResidualBlock(nn.Module):
    r"""A residual block: $\max(0, x + s\,(W z + b))$ with $z$ the concatenated branches, normalised and activated.

    ReLU is homogeneous, so the shortcut puts $s$ into the activation that makes $z$, where it costs nothing, and into
    $b$: neither the block's output, the largest tensor around, nor its gradient is multiplied by anything.

    Args:
        layers: Factory of the norm.
        channels: Channels of the input and the output.
        branch_channels: Output channels of each branch.
        scale: The factor $s$.
    """

    def __init__(
            self,
            layers: 'LayerFactory',
            channels: int,
            branch_channels: Tuple[int, ...],
            scale: float,
            **dd: Any,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.recompute = False  # norms, activations and concatenations, in the backward
        self.bn = layers.norm(branch_channels, **dd)
        self.conv2d = nn.Conv2d(sum(branch_channels), channels, kernel_size=1, **dd)
        self.act = nn.ReLU()

    def branches(self, x: Tensor) -> Tensor:
        """Return the concatenated branches, not yet normalised."""
        raise NotImplementedError

    def activate(self, x: Tensor) -> Tensor:
        """Apply the activation at the end of the block."""
        return self.act(x)

    def residual(self, x: Tensor) -> Tensor:
        """Return what the block adds to ``x``, not yet scaled."""
        return self.conv2d(self.bn(self.branches(x)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> the same shape."""
        if torch.jit.is_scripting():
            return self.activate(add_scaled(x, self.residual(x), self.scale))
        if is_eager(x) and self.can_shortcut():
            bias: Any = self.conv2d.bias
            return self.shortcut(x, bias * self.scale if _folds_scales() and self.scale != 1.0 else None)
        out = recomputed(self.residual, x, keep_convolutions=True) if self.recompute else self.residual(x)
        return self.activate(add_scaled(x, out, self.scale))

    def can_shortcut(self) -> bool:
        """Return True if nobody can tell whether the block's own layers are called, or :meth:`shortcut` is."""
        modules: Dict[str, Any] = self._modules
        norm, conv, end = modules['bn'], modules['conv2d'], self._end()
        return (
            is_unobserved(norm, BatchNormAct2d)
            and norm.can_fuse()
            and is_unobserved(conv, nn.Conv2d)
            and conv._parameters.get('bias') is not None
            and (end is None or is_unobserved(end, nn.ReLU))
            and type(self.scale) is float  # not a parameter
        )

    def shortcut(self, x: Tensor, scaled_bias: Optional[Tensor]) -> Tensor:
        """Compute the block without calling its own layers.

        Args:
            x: Input of the block.
            scaled_bias: s·b (channels,), to scale the small tensors; None to scale in the addition. That costs nothing
                forward, has the bits of the modules, and costs more in the backward only.
        """
        if self.recompute:
            out = recomputed(self.scaled_residual, x, scaled_bias, keep_convolutions=True)
        else:
            out = self.scaled_residual(x, scaled_bias)
        scale = self.scale if scaled_bias is None else 1.0
        return torch.add(x, out, alpha=scale) if self._end() is None else scaled_residual_relu(x, out, scale)

    def scaled_residual(self, x: Tensor, scaled_bias: Optional[Tensor]) -> Tensor:
        """Return what the block adds to ``x``, scaled if ``scaled_bias`` is given."""
        norm: Any = self.bn
        if scaled_bias is None:
            return self.conv2d(norm.normalize_and_activate(self.branches(x)))
        out = norm.normalize_and_activate(self.branches(x), self.scale)
        if self.conv2d.weight.dtype == out.dtype and _is_product(out):
            return pointwise_convolution(out, self.conv2d.weight, scaled_bias)
        return self.conv2d._conv_forward(out, self.conv2d.weight, scaled_bias)

    def _end(self) -> Optional[nn.Module]:
        modules = self._modules
        return modules['act'] if 'act' in modules else modules.get('relu')  # timm's names


class BlockSequence(nn.Sequential):
    """A run of residual blocks, which can be recomputed in the backward."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.recompute = False  # whole blocks, in the backward

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks in turn."""
        if torch.jit.is_scripting():
            for block in self:
                x = block(x)
            return x
        blocks: List[Any] = list(self._modules.values())
        biases = scaled_biases(blocks) if _folds_scales() and is_eager(x) else [None] * len(blocks)
        for block, bias in zip(blocks, biases, strict=True):
            function, inputs = (block, (x,)) if bias is None else (block.shortcut, (x, bias))
            x = recomputed(function, *inputs) if self.recompute else function(*inputs)
        return x


def _folds_scales() -> bool:
    return torch.is_grad_enabled() and variants().residual == 'folded'


def scaled_biases(blocks: Sequence[Any]) -> Sequence[Optional[Tensor]]:
    """Return s·b of each block, computed together; Nones where a block must be called as a module."""
    scales = {block.scale if _is_unobserved_block(block) else None for block in blocks}
    scale = scales.pop() if len(scales) == 1 else None
    if scale is None:
        return [None] * len(blocks)
    return _ScaledBiases.apply(scale, *[block._modules['conv2d']._parameters['bias'] for block in blocks])


def _is_unobserved_block(block: Any) -> bool:
    kind = type(block)
    return (isinstance(block, ResidualBlock) and kind.forward is ResidualBlock.forward
            and is_unobserved(block, kind) and block.can_shortcut())


class _ScaledBiases(torch.autograd.Function):
    """s·b for many small b, in one operator forward and one backward."""

    @staticmethod
    def forward(ctx, scale: float, *biases: Tensor) -> Tuple[Tensor, ...]:
        ctx.scale = scale
        return tuple(torch._foreach_mul(biases, scale))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tuple[Optional[Tensor], ...]:
        return None, *torch._foreach_mul(grads, ctx.scale)


def conv_pool(conv: Any, pool: nn.Module, x: Tensor) -> Tensor:
    """Compute ``pool(conv(x))``, with the ReLU after the pooling, where the tensor is a quarter of the size.

    A maximum and a ReLU commute exactly, and so do their gradients. This is a shortcut.
    """
    if not (is_eager(x) and is_unobserved(conv, ConvNormAct) and is_unobserved(pool, nn.MaxPool2d)):
        return pool(conv(x))
    norm: Any = conv._modules['bn']
    if not (is_unobserved(norm, BatchNormAct2d) and norm.can_fuse()):
        return pool(conv(x))
    return torch.relu_(pool(norm.normalize(conv._modules['conv'](x))))


def _host_counting_batch_norm(num_features: int, **kwargs) -> BatchNormAct2d:
    # timm takes a function for a ready-made norm + activation layer, a class for a plain norm to be looked up by name.
    return BatchNormAct2d(num_features, **kwargs)


class LayerFactory:
    """A factory of the blocks' layers: timm's ConvNormAct and what this network has besides.

    Args:
        norm_layer: A norm that timm's ``ConvNormAct`` takes; 'batchnorm2d' becomes :class:`BatchNormAct2d`.
        norm_eps: Epsilon of the norm.
        act_layer: An activation that timm's ``ConvNormAct`` takes.
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

    def conv(self, in_channels: int, out_channels: int, normalized: bool = True, **kwargs) -> ConvNormAct:
        """Create a ConvNormAct without padding, or its convolution alone if the norm comes after a concatenation."""
        host_counting = functools.partial(_host_counting_batch_norm, act_layer=self._act_layer)
        layer = PointwiseConvNormAct if kwargs['kernel_size'] == 1 else ConvNormAct
        return layer(
            in_channels, out_channels,
            apply_norm=normalized,
            norm_layer=host_counting if self._is_batch_norm else self._norm_layer,
            act_layer=self._act_layer,
            norm_kwargs=dict(eps=self._eps),
            act_kwargs=dict(inplace=True),
            **{'padding': 0, **kwargs},
        )

    def norm(self, channels: Sequence[int], **dd) -> nn.Module:
        """Create the norms and activations of layers whose outputs are concatenated.

        BatchNorm works on each channel by itself, as an activation does, so there it is one layer, and exact.
        """
        options = dict(eps=self._eps, act_kwargs=dict(inplace=True), **dd)
        if self._is_batch_norm:
            return BatchNormAct2d(sum(channels), act_layer=self._act_layer, **options)
        make = get_norm_act_layer(self._norm_layer, self._act_layer)
        return PiecewiseNorm(channels, [make(count, **options) for count in channels])

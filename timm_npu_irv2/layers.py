"""The two layers in which this network differs from timm's: BatchNorm that counts on the host, and merged siblings."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d as TimmBatchNormAct2d
from timm.layers import ConvNormAct
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ['BatchNormAct2d', 'BlockSequence', 'MergedSiblings', 'SeparateSiblings', 'conv_block_factory']


@register_notrace_module
class BatchNormAct2d(TimmBatchNormAct2d):
    """timm's BatchNorm + activation, with the number of batches counted on the host.

    PyTorch keeps ``num_batches_tracked`` as a tensor beside the weights and adds 1 to it on the device: one more kernel
    launch a layer and step, for a number that nobody reads as long as ``momentum`` is set. Here it is a CPU tensor that
    is no buffer, so ``.to(device)``, DDP and SyncBatchNorm leave it alone; it is still saved and loaded under its name.
    """

    __jit_unused_properties__ = ('num_batches_tracked',)

    def __init__(self, num_features: int, **kwargs) -> None:
        super().__init__(num_features, **kwargs)
        del self._buffers['num_batches_tracked']
        self.batches = torch.zeros((), dtype=torch.long, device='cpu')

    @property
    def num_batches_tracked(self) -> Optional[Tensor]:
        """The number of batches seen in training, a scalar beside the running statistics (a copy: see the class)."""
        if 'batches' not in self.__dict__:  # while the base class builds itself
            raise AttributeError('num_batches_tracked')
        return self.batches.to(self.running_mean.device) if self.track_running_stats else None

    def reset_running_stats(self) -> None:
        """Forget the statistics and the count."""
        super().reset_running_stats()
        if 'batches' in self.__dict__:
            self.batches.zero_()

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.track_running_stats:
            # The tensor itself, as for any buffer: an average of weights (EMA) writes through the state dict.
            destination[prefix + 'num_batches_tracked'] = self.batches

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # `state_dict` is the caller's copy for this module. Files from before PyTorch 0.4.1 have no count.
        count = state_dict.pop(prefix + 'num_batches_tracked', None)
        if count is not None and not count.is_meta:
            self.batches.copy_(count)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate ``x`` (N, num_features, H, W)."""
        use_batch_statistics = self.training or not self.track_running_stats
        average_factor = self.momentum if self.momentum is not None else 0.0
        # momentum 0 freezes the statistics (see `frozen_statistics`): such a pass counts for nothing.
        if self.training and self.track_running_stats and self.momentum != 0.0:
            self.batches.add_(1)
            if self.momentum is None:  # cumulative average
                average_factor = 1.0 / float(self.batches)
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            use_batch_statistics,
            average_factor,
            self.eps,
        )
        return self.act(self.drop(x))


class MergedSiblings(ConvNormAct):
    """Several 1×1 ConvNormActs that share their input, as one.

    Equal to the separate layers channel by channel, since neither a convolution nor a BatchNorm nor an activation mixes
    output channels; but the input is read once, and there is one launch where there were two or three.
    """

    def __init__(self, in_channels: int, branch_channels: Sequence[int], **kwargs) -> None:
        super().__init__(in_channels, sum(branch_channels), kernel_size=1, **kwargs)
        self.branch_channels: List[int] = list(branch_channels)

    def forward(self, x: Tensor) -> List[Tensor]:
        """(N, in_channels, H, W) -> one (N, branch_channels[i], H, W) a branch, views of one tensor."""
        return self.bn(self.conv(x)).split(self.branch_channels, 1)


class SeparateSiblings(nn.ModuleList):
    """The same as separate layers, for norms that look across channels (GroupNorm, LayerNorm …)."""

    def __init__(self, in_channels: int, branch_channels: Sequence[int], **kwargs) -> None:
        super().__init__([ConvNormAct(in_channels, channels, kernel_size=1, **kwargs) for channels in branch_channels])

    def forward(self, x: Tensor) -> List[Tensor]:
        """(N, in_channels, H, W) -> one (N, branch_channels[i], H, W) a branch."""
        out: List[Tensor] = []
        for branch in self:
            out.append(branch(x))
        return out


class BlockSequence(nn.Sequential):
    """A run of residual blocks, whose inner activations can be recomputed in the backward instead of being kept."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks in turn."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_blocks(self, x)
        for block in self:
            x = block(x)
        return x


def checkpoint_blocks(blocks: nn.Sequential, x: Tensor) -> Tensor:
    """Apply ``blocks`` in turn, keeping only their inputs; the backward computes what is inside again."""
    for block in blocks:
        contexts = functools.partial(_checkpoint_contexts, block)
        x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    return x


def _checkpoint_contexts(block: nn.Module) -> Tuple[contextlib.AbstractContextManager, ...]:
    return contextlib.nullcontext(), frozen_statistics(block)


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Let the BatchNorms inside ``module`` use batch statistics without moving their running ones.

    The second forward of a checkpointed block sees the batch once more, which must not count twice.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if isinstance(norm, nn.SyncBatchNorm):  # it counts whatever its momentum is
                norm.num_batches_tracked.sub_(1)


def _host_counting_batch_norm(num_features: int, **kwargs) -> BatchNormAct2d:
    # timm takes a function for a ready-made norm + activation layer, a class for a plain norm to be looked up by name.
    return BatchNormAct2d(num_features, **kwargs)


def conv_block_factory(
        norm_layer: str | type | Callable,
        norm_eps: float,
        act_layer: str | type | Callable,
) -> Tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
    """The constructors of a block's layers.

    Args:
        norm_layer: A norm that timm's ``ConvNormAct`` takes; 'batchnorm2d' becomes :class:`BatchNormAct2d`.
        norm_eps: The norm's epsilon.
        act_layer: An activation that timm's ``ConvNormAct`` takes.

    Returns:
        ``(conv_block, siblings)``: one ConvNormAct, and several that share their input.
    """
    is_batch_norm = norm_layer in (nn.BatchNorm2d, TimmBatchNormAct2d) or (
        isinstance(norm_layer, str) and norm_layer.replace('_', '').lower() in ('batchnorm', 'batchnorm2d')
    )
    if is_batch_norm:
        norm_layer = functools.partial(_host_counting_batch_norm, act_layer=act_layer)
    settings = dict(
        padding=0,
        norm_layer=norm_layer,
        act_layer=act_layer,
        norm_kwargs=dict(eps=norm_eps),
        act_kwargs=dict(inplace=True),
    )
    siblings = MergedSiblings if is_batch_norm else SeparateSiblings
    return functools.partial(ConvNormAct, **settings), functools.partial(siblings, **settings)

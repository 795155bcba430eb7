"""Activations that are computed again in the backward instead of being kept."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

__all__ = ['frozen_statistics', 'recomputed']


def recomputed(function: Any, *inputs: Optional[Tensor], keep_convolutions: bool = False) -> Tensor:
    """Compute ``function(*inputs)`` and keep only the inputs for the backward, which computes the rest once more.

    Args:
        function: A module or its bound method.
        inputs: Its arguments.
        keep_convolutions: Keep the outputs of convolutions too; what is left to compute again (norms, activations,
            concatenations, pooling) is little work.
    """
    module = function if isinstance(function, nn.Module) else function.__self__
    contexts = functools.partial(_recompute_contexts, module, keep_convolutions)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _recompute_contexts(
        module: nn.Module,
        keep_convolutions: bool,
) -> Tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Return the contexts of the first and the second pass."""
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
    norms: List[Any] = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    own = [norm for norm in norms if hasattr(norm, 'counts_batches')]
    counts = [norm.num_batches_tracked for norm in norms if not hasattr(norm, 'counts_batches')]
    counted = [(count, count.clone()) for count in counts if count is not None]
    for norm in norms:
        norm.momentum = 0.0
    for norm in own:
        norm.counts_batches = False
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for norm in own:
            norm.counts_batches = True
        for count, before in counted:
            count.copy_(before)

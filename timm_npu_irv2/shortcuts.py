"""The rule for shortcuts: one is taken only where nobody can tell it from the modules that it bypasses.

Other people's programs look at a network in many ways: hooks on a module, a layer replaced or wrapped, a method of its
class replaced, tracers (FX, TorchScript, torch.compile, export), transforms (torch.func, forward-mode derivatives),
tensor subclasses (DTensor, fake and quantized tensors), meta tensors. For each of these the network runs its modules
one by one, as timm's does. The checks take well under a microsecond, since they are made in every layer of every step.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

__all__ = ['is_eager', 'is_unobserved']

_call = nn.Module.__call__
# Global names are found faster than attributes of modules.
_is_compiling, _tracing_state = torch.compiler.is_compiling, torch._C._get_tracing_state
_are_transforms_active = torch._C._are_functorch_transforms_active


class _Forwards(dict[type[nn.Module], Any]):
    """``forward`` of classes as it was first seen; a lookup is faster than by ``setdefault``."""

    def __missing__(self, kind: type[nn.Module]) -> Any:
        self[kind] = kind.forward
        return self[kind]


_forwards = _Forwards({kind: kind.forward for kind in (nn.Conv2d, nn.Identity, nn.MaxPool2d, nn.ReLU)})


def is_eager(x: Tensor) -> bool:
    """Return True if operations on ``x`` are only computed: no tracer, transform, subclass or global hook sees them."""
    return (
        type(x) is Tensor  # neither a subclass nor FX's proxy
        and not x.is_meta
        and not _is_compiling()
        and _tracing_state() is None
        and not _are_transforms_active()
        and forward_ad._current_level < 0
        and nn.Module.__call__ is _call
        and not (nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks
                 or nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks)
    )


def is_unobserved(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Return True if ``module`` is exactly of one of ``kinds``, has no hooks, and its ``forward`` is its class's own.

    Parametrizations and wrappers such as FSDP's change the class; pruning registers a hook; accelerate replaces
    ``forward`` on the instance; ``module.compile()`` puts a compiled call there.
    """
    kind: Any = type(module)
    if kind not in kinds or kind.forward is not _forwards[kind]:
        return False
    state: Any = module.__dict__
    return not (
        state['_forward_hooks'] or state['_forward_pre_hooks'] or state['_backward_hooks']
        or state['_backward_pre_hooks'] or 'forward' in state or '_compiled_call_impl' in state
    )

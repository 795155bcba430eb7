"""Loss scales: factors of the loss that keep float16 gradients from underflow."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from timm.utils import dispatch_clip_grad
from torch import Tensor
from torch.optim import Optimizer

from .. import device as devices
from ..optim import gradient_holders

__all__ = ['DynamicScale', 'FoldedScale', 'NoScale', 'StaticScale', 'create_scaler']


class NoScale:
    """No scale, for float32 and bfloat16, and the interface of those that scale.

    Attributes:
        description: The end of a precision's description.
    """

    description = ''

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss to differentiate."""
        return loss

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, before they are clipped or used."""

    def clip(self, optimizer: Optimizer, parameters: Iterable[Tensor], limit: float, mode: str) -> None:
        """Clip the unscaled gradients."""
        dispatch_clip_grad(parameters, limit, mode=mode)

    def step(self, optimizer: Optimizer) -> bool:
        """Step the optimizer; False if the step was skipped for an overflow."""
        optimizer.step()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's GradScaler writes it; {} for a scale without a state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of :meth:`state_dict`, unless it is that of another kind of scale."""


class StaticScale(NoScale):
    """A constant scale, without an overflow check and so without a synchronisation, as in apex."""

    def __init__(self, value: float) -> None:
        self.value = float(value)
        self.description = f', loss scale {self.value:g}'

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times the constant."""
        return loss * self.value

    @torch.no_grad()
    def unscale(self, optimizer: Optimizer) -> None:
        """Divide all gradients by the constant, in one call."""
        gradients = _gradients(optimizer)
        if gradients:
            torch._foreach_mul_(gradients, 1 / self.value)


class FoldedScale(StaticScale):
    """A constant scale for SGD, which is linear in its gradients: the scale goes into its constants, at no cost.

    With g' = S·g and a momentum buffer S times as great, weight decay times S and learning rate divided by S give the
    weights of the unscaled step, bit for bit where S is a power of two.
    """

    def unscale(self, optimizer: Optimizer) -> None:
        """Leave the gradients as they are."""

    def clip(self, optimizer: Optimizer, parameters: Iterable[Tensor], limit: float, mode: str) -> None:
        """Clip the gradients as if they had been unscaled."""
        super().unscale(optimizer)
        super().clip(optimizer, parameters, limit, mode)
        torch._foreach_mul_(_gradients(optimizer), self.value)

    def step(self, optimizer: Optimizer) -> bool:
        """Step with the scale in the learning rate and the weight decay."""
        constants = [(group['lr'], group['weight_decay']) for group in optimizer.param_groups]
        try:
            for group, (lr, weight_decay) in zip(optimizer.param_groups, constants, strict=True):
                group['lr'], group['weight_decay'] = lr / self.value, weight_decay * self.value
            optimizer.step()
        finally:
            for group, (lr, weight_decay) in zip(optimizer.param_groups, constants, strict=True):
                group['lr'], group['weight_decay'] = lr, weight_decay
        return True


class DynamicScale(NoScale):
    """torch's GradScaler: halve the scale and skip the step after an overflow, double it after 2000 good steps."""

    description = ', dynamic loss scale'

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler: Any = scaler
        self._watched: _Watched | None = None

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times the present scale."""
        return self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale and look for an overflow among them."""
        self.scaler.unscale_(self._watch(optimizer))

    def step(self, optimizer: Optimizer) -> bool:
        """Step unless there was an overflow, then adapt the scale."""
        watched = self._watch(optimizer)
        watched.stepped = False
        self.scaler.step(watched)
        self.scaler.update()
        return watched.stepped

    def _watch(self, optimizer: Optimizer) -> '_Watched':
        if self._watched is None or self._watched.optimizer is not optimizer:
            self._watched = _Watched(optimizer)
        return self._watched

    def state_dict(self) -> dict[str, Any]:
        """Return GradScaler's state."""
        return self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load GradScaler's state; others have no 'scale'."""
        if 'scale' in state_dict:
            self.scaler.load_state_dict({'dynamic': True, **state_dict})


class _Watched:
    """An optimizer as GradScaler sees it, which records whether the step was taken.

    It also hides that a fused torch optimizer can be handed the overflow flag. GradScaler then calls ``step`` even
    after an overflow, and a fused SGD whose very first step is skipped that way goes on with momentum buffers that
    were never written (torch 2.14, ``torch.optim.sgd._fused_sgd``).
    """

    _step_supports_amp_scaling = False

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.stepped = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [{'params': gradient_holders(self.optimizer)}]

    def step(self) -> None:
        self.stepped = True
        self.optimizer.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for p in gradient_holders(optimizer) if p.grad is not None]


def create_scaler(
        device: torch.device,
        dtype: torch.dtype,
        loss_scale: float | Literal['dynamic'] | None,
) -> NoScale:
    """Create the loss scale for gradients of ``dtype``; by default dynamic for float16, none for bfloat16."""
    if loss_scale is None:
        loss_scale = 'dynamic' if dtype == torch.float16 else 1.0  # bfloat16 has float32's range
    if loss_scale == 'dynamic':
        return DynamicScale(devices.grad_scaler(device))
    return NoScale() if loss_scale == 1 else StaticScale(loss_scale)

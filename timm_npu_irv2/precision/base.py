"""The interface of a precision, as the training loop knows it."""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.optim import Optimizer

from .masters import Masters

__all__ = ['Precision', 'WithMasters', 'dtype_name']


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


class Precision:
    """What the training loop asks of a precision. The order: ``prepare``, DDP, then a ``step`` per batch.

    Attributes:
        description: For logs and reports.
        input_dtype: What images should be cast to before the forward.
        skipped_steps: Optimizer steps skipped for an overflow so far. Zero unless the loss scale is dynamic.
        skipped_in_a_row: How many of the latest steps were skipped one after another.
    """

    description: str
    input_dtype: torch.dtype = torch.float32
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Cast the model, set up master weights. Called once, before DDP wraps the model and before EMA copies it."""
        return model, optimizer

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        """Cast a model that only helps to train another (a teacher), so that it takes the same images."""
        return model

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of the forward and of the loss."""
        return contextlib.nullcontext()

    def step(
            self,
            loss: Tensor,
            optimizer: Optimizer,
            *,
            parameters: Iterable[nn.Parameter] | None = None,
            clip_grad: float | None = None,
            clip_mode: str = 'norm',
            create_graph: bool = False,
            need_update: bool = True,
    ) -> None:
        """The backward pass and, if ``need_update``, one optimizer step on clipped, unscaled gradients.

        ``optimizer.zero_grad()`` stays the caller's, before the first backward pass of a step.

        Args:
            loss: A scalar, computed under :meth:`autocast`.
            optimizer: The one that :meth:`prepare` returned.
            parameters: The model's parameters that are clipped; all that the optimizer has if None.
            clip_grad: The limit of the float32 gradients; None clips nothing.
            clip_mode: 'norm', 'value' or 'agc', as in ``timm.utils.dispatch_clip_grad``.
            create_graph: Keep the graph of the gradients, for second-order optimizers.
            need_update: False accumulates gradients for a later step.
        """
        raise NotImplementedError

    def model_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The model's state dict under its ordinary names, in float32 from the masters where there are any."""
        return unwrap_model(model).state_dict()

    def load_model_state_dict(self, model: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> Any:
        """Load what :meth:`model_state_dict` gave under whatever precision; returns ``load_state_dict``'s answer."""
        return unwrap_model(model).load_state_dict(state_dict, strict=strict)

    def float32_model(self, model: nn.Module) -> nn.Module:
        """The model with the weights that the optimizer updates: what an average of weights must copy and follow.

        ``ModelEmaV3(precision.float32_model(model))``, then ``ema.update(precision.float32_model(model))``. It shares
        its parameters and its BatchNorm modules with ``model``: read it, but train, evaluate and move ``model``.
        """
        return unwrap_model(model)

    def _count(self, skipped: bool) -> None:
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def state_dict(self) -> dict[str, Any]:
        """The loss scale's state, as torch's GradScaler writes it ({} if there is none)."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave. The state of another kind of loss scale is left alone."""


class WithMasters(Precision):
    """Weights are read from, loaded into and averaged over the float32 masters, wherever they come from."""

    _masters: Masters

    def model_state_dict(self, model: nn.Module) -> dict[str, Any]:
        return self._masters.state_dict(unwrap_model(model))

    def load_model_state_dict(self, model: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> Any:
        return self._masters.load_state_dict(unwrap_model(model), state_dict, strict)

    def float32_model(self, model: nn.Module) -> nn.Module:
        return self._masters.float32_model

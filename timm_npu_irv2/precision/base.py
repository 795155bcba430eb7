"""The interface of a precision, as the training loop knows it."""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ['Precision', 'dtype_name', 'parameters_of']


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as options spell it: 'float16' for ``torch.float16``."""
    return str(dtype).removeprefix('torch.')


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters of all groups of an optimizer."""
    return [p for group in optimizer.param_groups for p in group['params']]


class Precision:
    """The training loop's view of a precision: ``prepare``, then DDP, then a ``step`` for each batch.

    Attributes:
        description: A line for logs and reports.
        input_dtype: The dtype of images in the forward.
        skipped_steps: Optimizer steps skipped for an overflow so far. Zero unless the loss scale is dynamic.
        skipped_in_a_row: Latest steps that were skipped one after another.
    """

    description: str
    input_dtype: torch.dtype = torch.float32
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Cast the model and set up master weights. Call it once, before DDP wraps the model and EMA copies it."""
        return model, optimizer

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        """Cast a model that is not trained (a teacher), so that it takes the same images."""
        return model

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context of the forward and of the loss."""
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
        """Run the backward pass and, if ``need_update``, one optimizer step on clipped, unscaled gradients.

        The caller runs ``optimizer.zero_grad()`` before the first backward pass of a step.

        Args:
            loss: A scalar, computed under :meth:`autocast`.
            optimizer: The optimizer that :meth:`prepare` returned.
            parameters: Parameters of the model to clip; all of the optimizer's if None.
            clip_grad: Limit of the float32 gradients; no clipping if None.
            clip_mode: 'norm', 'value' or 'agc', as in ``timm.utils.dispatch_clip_grad``.
            create_graph: Keep the graph of the gradients, for second-order optimizers.
            need_update: False accumulates gradients for a later step.
        """
        raise NotImplementedError

    def model_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Return the model's state dict under its ordinary names, in float32 from the masters where there are any."""
        return unwrap_model(model).state_dict()

    def load_model_state_dict(self, model: nn.Module, state_dict: dict[str, Any]) -> Any:
        """Load a state dict of :meth:`model_state_dict`, of any precision, as ``Module.load_state_dict`` does."""
        return unwrap_model(model).load_state_dict(state_dict)

    def float32_model(self, model: nn.Module) -> nn.Module:
        """Return the model with the weights that the optimizer updates, for averages of weights to copy and follow.

        ``ModelEmaV3(precision.float32_model(model))``, then ``ema.update(precision.float32_model(model))``. It shares
        its parameters and its BatchNorm modules with ``model``: read it, but train, evaluate and move ``model``.
        """
        return unwrap_model(model)

    def count_step(self, skipped: bool) -> None:
        """Count an optimizer step that was due."""
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale's state, as torch's GradScaler writes it ({} if there is none)."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of :meth:`state_dict`. The state of another kind of loss scale changes nothing."""

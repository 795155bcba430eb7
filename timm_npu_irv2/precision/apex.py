"""Precision by apex, where it is installed."""

import inspect
from typing import Any, Literal

import torch
from timm.utils import dispatch_clip_grad
from torch import nn
from torch.optim import Optimizer

from .. import device as devices
from ..errors import UserError
from .base import parameters_of
from .masters import MasterPrecision, Masters, float32_twin

__all__ = ['Apex']


class Apex(MasterPrecision):
    """Apex's own amp: ``amp.initialize``, ``amp.scale_loss``, ``amp.state_dict``."""

    def __init__(self, opt_level: str, loss_scale: float | Literal['dynamic'] | None) -> None:
        self._amp = devices.apex_amp()
        self._arguments: dict[str, Any] = {'opt_level': opt_level}
        if opt_level != 'O0':
            self._arguments['loss_scale'] = 'dynamic' if loss_scale is None else loss_scale
            if 'combine_grad' in inspect.signature(self._amp.initialize).parameters:  # Ascend's
                self._arguments['combine_grad'] = True
        self.description = 'apex ' + ', '.join(f'{name} {value}' for name, value in self._arguments.items())

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Run ``amp.initialize`` and give its masters the bits that the half weights lost."""
        twin = float32_twin(model)  # before apex replaces the model's forward
        parameters = parameters_of(optimizer)
        try:
            model, optimizer = self._amp.initialize(model, optimizer, **self._arguments)
        except RuntimeError as error:
            raise UserError(f'--amp-impl apex: {error}'.partition('\n')[0]) from error
        optimizer.zero_grad()  # apex makes its masters in the first call
        pairs = zip(parameters, parameters_of(optimizer), strict=True)
        self.masters = Masters(twin, {p: master for p, master in pairs if p is not master})
        self._share_parameters(model, twin)
        return model, optimizer

    @torch.no_grad()
    def _share_parameters(self, model: nn.Module, twin: nn.Module) -> None:
        """Give the twin apex's masters, or the model's own parameters where they are float32.

        Apex makes its masters from the half weights, so they are copied from the twin first.
        """
        for module, copied in zip(model.modules(), twin.modules(), strict=True):
            for name, parameter in module.named_parameters(recurse=False):
                shared = self.masters.of(parameter)
                if shared.dtype == torch.float32:
                    shared.copy_(copied.get_parameter(name))
                    copied._parameters[name] = shared  # apex's masters are tensors, which register_parameter refuses

    def step(self, loss, optimizer, *, parameters=None, clip_grad=None, clip_mode='norm', create_graph=False,
             need_update=True) -> None:
        """Run the backward pass under ``amp.scale_loss``, and the step if one is due."""
        before = self._loss_scale()
        # Until the last backward pass of a step the gradients stay scaled in the model, where DDP sums them.
        with self._amp.scale_loss(loss, optimizer, delay_unscale=not need_update) as scaled:
            scaled.backward(create_graph=create_graph)
        if not need_update:
            return
        if clip_grad is not None:
            every = self._amp.master_params(optimizer)
            clipped = every if parameters is None else [self.masters.of(p) for p in parameters]
            dispatch_clip_grad(clipped, clip_grad, mode=clip_mode)
        optimizer.step()
        self.count_step(skipped=self._loss_scale() < before)

    def _loss_scale(self) -> float:
        """Return the scale, which apex lowers on the host when it has found an overflow."""
        return self._amp.state_dict()['loss_scaler0']['loss_scale']

    def state_dict(self) -> dict[str, Any]:
        """Return apex's state."""
        return dict(self._amp.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load apex's state; others have no 'loss_scaler0'."""
        if 'loss_scaler0' in state_dict:
            self._amp.load_state_dict(state_dict)

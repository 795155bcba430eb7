"""apex.amp for one optimizer: O0, O1 (autocast on the CPU) and O2 with masters made late, static and dynamic scale."""

import contextlib

import torch
from torch.nn.modules.batchnorm import _BatchNorm


class _State:
    scale = 1.0
    dynamic = False
    unskipped = 0


def initialize(model, optimizer, opt_level='O1', loss_scale='dynamic'):
    if opt_level not in ('O0', 'O1', 'O2'):
        raise RuntimeError(f'Unexpected optimization level {opt_level}.\nOptions are ...')
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise RuntimeError('Found param with dtype other than float32.\nWhen using amp.initialize, ...')
    _State.dynamic = opt_level != 'O0' and loss_scale == 'dynamic'
    _State.scale = 2.0 ** 16 if _State.dynamic else float(loss_scale) if opt_level != 'O0' else 1.0
    optimizer._halves, optimizer._masters, optimizer._lazy = [], [], opt_level == 'O2'
    if opt_level == 'O1':
        _wrap_forward(model, lambda forward, x: forward(x).float(), torch.autocast('cpu', torch.float16))
    elif opt_level == 'O2':
        for module in model.modules():
            if not isinstance(module, _BatchNorm):
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    tensor.data = tensor.data.half() if tensor.is_floating_point() else tensor.data
        _wrap_forward(model, lambda forward, x: forward(x.half()).float(), contextlib.nullcontext())
    plain_zero_grad = optimizer.zero_grad

    def zero_grad(set_to_none=True):
        _make_masters(optimizer)
        plain_zero_grad()
        for half in optimizer._halves:
            half.grad = None

    optimizer.zero_grad = zero_grad
    return model, optimizer


def _wrap_forward(model, call, context):
    forward = model.forward

    def patched(x):
        with context:
            return call(forward, x)

    model.forward = patched


def _make_masters(optimizer):
    if not optimizer._lazy:
        return
    optimizer._lazy = False
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group['params']):
            if parameter.dtype == torch.float16:
                master = parameter.detach().float().requires_grad_()  # as apex's: no Parameter
                optimizer._halves.append(parameter)
                optimizer._masters.append(master)
                group['params'][i] = master
    plain_step = optimizer.step

    def step(closure=None):
        plain_step()
        with torch.no_grad():
            for half, master in zip(optimizer._halves, optimizer._masters, strict=True):
                half.copy_(master)

    optimizer.step = step


def master_params(optimizer):
    for group in optimizer.param_groups:
        yield from group['params']


@contextlib.contextmanager
def scale_loss(loss, optimizer, delay_unscale=False):
    _make_masters(optimizer)
    yield loss.float() * _State.scale
    if delay_unscale:
        return
    for half, master in zip(optimizer._halves, optimizer._masters, strict=True):
        master.grad, half.grad = half.grad.float(), None
    gradients = [p.grad for p in master_params(optimizer)]
    for gradient in gradients:
        gradient.div_(_State.scale)
    if _State.dynamic:
        _update_scale(optimizer, overflow=not all(g.isfinite().all() for g in gradients))


def _update_scale(optimizer, overflow):
    _State.unskipped += 1
    if overflow:
        _State.scale, _State.unskipped = _State.scale / 2, 0
        step = optimizer.step

        def skip(closure=None):
            optimizer.step = step

        optimizer.step = skip
    elif _State.unskipped == 2000:
        _State.scale, _State.unskipped = _State.scale * 2, 0


def state_dict():
    return {'loss_scaler0': {'loss_scale': _State.scale, 'unskipped': _State.unskipped}}


def load_state_dict(state):
    _State.scale, _State.unskipped = state['loss_scaler0']['loss_scale'], state['loss_scaler0']['unskipped']

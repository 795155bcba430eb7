"""Every optimizer that --opt offers goes on from a checkpoint with every bit; an incomplete state is refused."""

import copy

import pytest
import timm.optim
import torch
from torch import nn

from timm_npu_irv2 import rules, schema
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.serialization import read_checkpoint, write_checkpoint
from timm_npu_irv2.training.hidden_state import HiddenState

NAMES = timm.optim.list_optimizers(exclude_filters=['bnb*', 'fused*'])  # bitsandbytes, apex
SHAPES = (16, 16, 3, 3), (16,), (6, 16), (6,)


def build(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Module()
    for index, shape in enumerate(SHAPES):
        model.register_parameter(f'p{index}', nn.Parameter(torch.randn(shape)))
    return model, timm.optim.create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.01)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    second = getattr(optimizer, 'is_second_order', False)
    loss = sum((parameter * torch.randn_like(parameter)).sum() + (parameter ** 4).sum()
               for parameter in model.parameters())
    optimizer.zero_grad()
    loss.backward(create_graph=second)
    optimizer.step()


def hidden_state_of(optimizer: torch.optim.Optimizer) -> HiddenState:
    return HiddenState({'optimizer': optimizer}, torch.device('cpu'))


@pytest.mark.parametrize('name', [*NAMES, 'lookahead_adamw', 'lookahead_lamb'])
@pytest.mark.filterwarnings('ignore')
def test_every_optimizer_goes_on_from_a_checkpoint(tmp_path, name):
    model, optimizer = build(name)
    hidden = hidden_state_of(optimizer)
    for seed in range(3):
        step(model, optimizer, seed)
    path = tmp_path / 'a.pth.tar'
    write_checkpoint({'state_dict': model.state_dict(), 'optimizer': optimizer.state_dict()}, path)
    other, resumed = build(name)
    content = read_checkpoint(path)
    other.load_state_dict(content['state_dict'])
    with rules.naming(path):
        resumed.load_state_dict(schema.restored_optimizer(content['optimizer'], resumed))
    hidden_state_of(resumed).load_state_dict(hidden.state_dict())
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, resumed, seed)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'lamb', 'adafactorbv', 'lion', 'muon', 'kron', 'lookahead_adam'])
def test_a_parameter_that_lacks_entries_is_refused_in_one_line(name):
    model, optimizer = build(name)
    step(model, optimizer, 0)
    for key, entry in [(key, entry) for key, entries in optimizer.state_dict()['state'].items() for entry in entries]:
        state = copy.deepcopy(optimizer.state_dict())
        alike = [other for group in state['param_groups'] if key in group['params'] for other in group['params']
                 if other != key and state['state'][other].keys() == state['state'][key].keys()]
        if not alike:
            continue
        del state['state'][key][entry]
        with pytest.raises(UserError, match=rf"a is refused: optimizer\.state\[.*lacks '{entry}'"), rules.naming('a'):
            schema.restored_optimizer(state, optimizer)

"""Hooks of every kind fire on every module as often as in timm's network, with the same values."""

import collections
import functools

import pytest
import torch
from torch import nn

from timm_npu_irv2.weights import merged_layers

from .pair import images, not_in_place, short_pair

KINDS = ('forward_pre', 'forward', 'full_backward_pre', 'full_backward', 'backward')
PARTS = ('conv2d_2b', 'maxpool_3a', 'repeat.0')  # where shortcuts begin

pytestmark = pytest.mark.filterwarnings('ignore:Using a non-full backward hook', 'ignore:Using non-full backward hooks')


@functools.cache
def pair(legacy: bool = False) -> tuple[nn.Module, nn.Module]:
    """timm's network and ours in double precision.

    A module that has had full backward hooks takes no legacy ones, so these get a pair of their own.
    """
    reference, ours = short_pair(torch.float64)
    return not_in_place(reference), not_in_place(ours)


def tensors(values) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values.detach().clone()]
    return [tensor for value in values or () for tensor in tensors(value)]


def record(model: nn.Module, kind: str, names: list[str]) -> dict[str, list]:
    """What hooks of a kind on some modules see in a forward and a backward pass: {name: values of each call}."""
    seen = collections.defaultdict(list)

    def hook(name, _module, *values):
        values = values[1:] if kind == 'backward' else values  # what a legacy hook sees of the input is arbitrary
        seen[name].append([tensors(value) for value in values])

    modules = dict(model.named_modules())
    handles = [getattr(modules[name], f'register_{kind}_hook')(functools.partial(hook, name)) for name in names]
    x = images(dtype=torch.float64).requires_grad_()
    try:
        out = model(x)
        if 'backward' in kind:
            out.square().sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@functools.cache
def expected(kind: str) -> dict[str, list]:
    """timm's network has no shortcuts, so its hooks may all listen at once."""
    model, _ = pair(kind == 'backward')
    return record(model, kind, [name for name, _ in model.named_modules()])


def block_of(name: str) -> tuple[str, str]:
    """(block with merged layers, rest)."""
    parts = name.split('.')
    for length in (1, 2):
        block = '.'.join(parts[:length])
        if merged_layers(block) and len(parts) > length:
            return block, '.'.join(parts[length:])
    return '', name


def is_merged(name: str) -> bool:
    """A module of timm's that is merged with others here, contains such a module, or belongs to one."""
    block, rest = block_of(name)
    sources = [source for sources in merged_layers(block).values() for source, _ in sources]
    return any(f'{source}.'.startswith(f'{rest}.') or f'{rest}.'.startswith(f'{source}.') for source in sources)


def common_names() -> list[str]:
    reference, ours = pair()
    theirs = dict(reference.named_modules())
    return [name for name, _ in ours.named_modules() if name in theirs and not is_merged(name)]


def assert_equal(actual, wanted, name):
    assert len(actual) == len(wanted), name
    for call, other in zip(actual, wanted, strict=True):
        for values, others in zip(call, other, strict=True):
            assert len(values) == len(others), name
            for value, reference in zip(values, others, strict=True):
                torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-9, msg=lambda m, n=name: f'{n}: {m}')


@pytest.mark.parametrize('kind', KINDS)
def test_hooks_on_all_modules_see_what_timms_see(kind):
    _, ours = pair(kind == 'backward')
    every = [name for name, _ in ours.named_modules()]
    seen, wanted = record(ours, kind, every), expected(kind)
    assert {name for name in every if len(seen[name]) != 1} == set()
    compared = common_names()
    assert len(compared) > 140
    for name in compared:
        assert_equal(seen[name], wanted[name], name)


def first(calls: list, index: int) -> torch.Tensor:
    """The first tensor of one of the values that a hook got in its only call."""
    (call,) = calls
    return call[index][0]


@pytest.mark.parametrize('kind, index', [('forward', 1), ('full_backward', 1), ('full_backward_pre', 0)])
def test_merged_layers_see_what_their_parts_see_together(kind, index):
    _, ours = pair()
    blocks = ['mixed_5b', 'repeat.0', 'repeat.1', 'repeat_1.0', 'mixed_7a', 'repeat_2.0', 'block8']
    merged = {f'{block}.{layer}': [f'{block}.{source}' for source, _ in sources]
              for block in blocks for layer, sources in merged_layers(block).items()}
    del merged['mixed_5b.siblings.conv']  # one of its parts convolves what is not pooled yet
    seen = record(ours, kind, list(merged))
    for name, sources in merged.items():
        together = torch.cat([first(expected(kind)[source], index) for source in sources], 1)
        torch.testing.assert_close(first(seen[name], index), together, rtol=1e-5, atol=1e-9)


def assert_alone(kind: str, names: list[str]) -> None:
    _, ours = pair(kind == 'backward')
    compared = set(common_names())
    for name in names:
        seen = record(ours, kind, [name])[name]
        assert len(seen) == 1, name
        if name in compared:
            assert_equal(seen, expected(kind)[name], name)


@pytest.mark.parametrize('kind', KINDS)
def test_a_hook_on_one_module_alone_sees_what_timms_sees(kind):
    # The modules around it may take their shortcuts.
    names = [name for name, _ in pair()[1].named_modules() if name.startswith(PARTS)]
    assert len(names) > 25
    assert_alone(kind, names)


@pytest.mark.long
@pytest.mark.parametrize('kind', KINDS)
def test_a_hook_on_any_module_alone_sees_what_timms_sees(kind):
    assert_alone(kind, [name for name, _ in pair()[1].named_modules()])


def test_global_hooks_see_every_module():
    _, ours = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        ours(torch.zeros(1, 3, 75, 75, dtype=torch.float64))
    finally:
        handle.remove()
    assert len(seen) == len(set(seen)) == len(list(ours.modules()))

"""Shared pieces of the tests."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from .ascend.environment import environment, running_on

# Programs under test leave ignored signals alone, and would inherit them where nohup has started pytest (SIGHUP), or a
# script in the background (SIGINT).
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
REFERENCE = 'inception_resnet_v2'
OURS = 'inception_resnet_v2_npu'

# Sums in float32 depend on the number of threads. Without this, results would depend on which other test files run.
torch.set_num_threads(1)


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random BatchNorm statistics and affine parameters, so that a mixed-up pair of layers can't go unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
    return model


def create_pair(dtype: torch.dtype = torch.float32, **kwargs) -> tuple[nn.Module, nn.Module]:
    """timm's network with random weights, and ours with the same ones."""
    torch.manual_seed(0)
    reference = fill(timm.create_model(REFERENCE, **kwargs)).to(dtype)
    ours = timm.create_model(OURS, **kwargs).to(dtype)
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(scope='session')
def reference_state_dict() -> dict[str, torch.Tensor]:
    """Weights of timm's network with 1000 classes, random everywhere."""
    torch.manual_seed(0)
    return fill(timm.create_model(REFERENCE)).state_dict()


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    """Take back the log of a script that ran in this process: it writes to a stream that ends with the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture(autouse=True)
def _restore_environment() -> Iterator[None]:
    """Take back variables that a script in this process has set: the next test's processes would inherit them."""
    before = dict(os.environ)
    yield
    for name in (before.keys() | os.environ.keys()) - {'PYTEST_CURRENT_TEST'}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that the system gives to nobody else during the block.

    A socket that is bound and does not listen holds it. Who sets SO_REUSEADDR, as torch's stores do, may listen there.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(('127.0.0.1', 0))
        yield holder.getsockname()[1]


@pytest.fixture
def free_port() -> Iterator[int]:
    with reserved_port() as port:
        yield port


@pytest.fixture
def start_on_standin(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """start_on_standin(command…, variables={}, switches…): a process on the stand-in, which ends with the test.

    Its journals are operators-<rank> and trace-<rank> in tmp_path.
    """
    started = []

    def start(*command: str, variables: dict[str, str] | None = None, **switches) -> subprocess.Popen:
        journals = dict(operator_log=tmp_path / 'operators-%r', trace=tmp_path / 'trace-%r')
        # It starts in tmp_path, from where `-m tests…` has to be found too.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
        base = {**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1', **(variables or {})}
        process = subprocess.Popen(
            command, env=environment(running_on(), base=base, **{**journals, **switches}), cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # it may have started others
        process.communicate()

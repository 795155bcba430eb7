"""The device seam: the only module that names a backend (npu, cuda, cpu; hccl, nccl, gloo; torch_npu; apex).

Everything else asks here: which device to run on, how tensors are laid out on it, which collectives join several of
them, which optimizers its vendor ships, and how to wait for it. Nothing below knows the model.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from .errors import DeviceUnavailable, UserError

__all__ = [
    'Backend',
    'apex_amp',
    'autocast',
    'backend',
    'configure',
    'default_device',
    'describe',
    'fast_dtype',
    'fused_optimizer_class',
    'grad_scaler',
    'half_dtype',
    'has_add_relu_kernel',
    'has_fused_convolution',
    'has_fused_sgd',
    'has_slow_slices',
    'is_out_of_memory',
    'load_backends',
    'memory_format',
    'peak_memory',
    'prefetch',
    'reset_peak_memory',
    'resolve_device',
    'synchronize',
    'versions',
]

T = TypeVar('T')
R = TypeVar('R')


@dataclass(frozen=True)
class Backend:
    """What the rest of the program must know about one kind of device.

    Attributes:
        type: The device type, as in ``torch.device(type)``.
        collectives: torch.distributed's backend for devices of this type.
        memory_format: The layout in which convolutions run fastest, for images and for weights.
        half: The 16-bit type of mixed precision.
        visible: The environment variable that selects the devices a process sees, if there is one.
    """

    type: str
    collectives: str
    memory_format: torch.memory_format
    half: torch.dtype
    visible: str | None


# torch_npu refuses channels_last tensors: convolutions choose their own layout on the NPU. A CPU has no float16
# convolutions worth using, but bfloat16 ones.
_BACKENDS = {
    'npu': Backend('npu', 'hccl', torch.contiguous_format, torch.float16, 'ASCEND_RT_VISIBLE_DEVICES'),
    'cuda': Backend('cuda', 'nccl', torch.channels_last, torch.float16, 'CUDA_VISIBLE_DEVICES'),
    'cpu': Backend('cpu', 'gloo', torch.channels_last, torch.bfloat16, None),
}

_npu_failure: str | None = None


def load_backends() -> None:
    """Import torch_npu where it is installed; a failure is kept for the message of ``resolve_device('npu')``.

    ``import torch`` does this by itself unless TORCH_DEVICE_BACKEND_AUTOLOAD=0.
    """
    global _npu_failure  # noqa: PLW0603 - one process, one torch_npu
    if hasattr(torch, 'npu') or importlib.util.find_spec('torch_npu') is None:
        return
    try:
        importlib.import_module('torch_npu')
    except Exception as error:  # torch_npu fails in many ways where CANN is missing or of another version
        _npu_failure = f'{type(error).__name__}: {error}'.splitlines()[0]
        warnings.warn(f'torch_npu is installed but does not load ({_npu_failure}); going on without it.', stacklevel=2)


def backend(device: torch.device | str) -> Backend:
    """The facts about ``device``'s type. Raises UserError for a type that the plugin does not run on."""
    device_type = torch.device(device).type
    if device_type not in _BACKENDS:
        raise UserError(f"device '{device_type}' is not supported: use one of {', '.join(_BACKENDS)}.")
    return _BACKENDS[device_type]


def _runtime(device_type: str) -> ModuleType | None:
    """torch.npu or torch.cuda; None for the CPU, which needs no runtime."""
    return getattr(torch, device_type, None) if device_type != 'cpu' else None


def device_count(device_type: str) -> int:
    """How many devices of a type this process can use (1 for the CPU: processes share it)."""
    if device_type == 'cpu':
        return 1
    runtime = _runtime(device_type)
    return runtime.device_count() if runtime is not None and runtime.is_available() else 0


def default_device() -> str:
    """'npu' if there is one, else 'cuda' if there is one, else 'cpu'."""
    return next(kind for kind in _BACKENDS if device_count(kind))


def resolve_device(name: str | None = None, local_rank: int | None = None) -> torch.device:
    """The device to run on, made current.

    Args:
        name: 'npu', 'cuda', 'cpu', with or without an index; None or '' takes the best that is there.
        local_rank: The index of this process on its machine, which becomes the device's index if ``name`` has none.

    Raises:
        DeviceUnavailable: The device does not exist here, in one line that says why and what to do.
    """
    load_backends()
    try:
        device = torch.device(name or default_device())
    except RuntimeError as error:
        if (kind := name.partition(':')[0]) in _BACKENDS:  # torch knows 'npu' only once torch_npu is loaded
            raise DeviceUnavailable(_why_unavailable(kind)) from error
        raise UserError(f"--device {name}: no such device; use one of {', '.join(_BACKENDS)}.") from error
    kind = backend(device).type
    if kind == 'cpu':
        return torch.device('cpu')
    count = device_count(kind)
    if count == 0:
        raise DeviceUnavailable(_why_unavailable(kind))
    index = device.index if device.index is not None else (local_rank or 0)
    if index >= count:
        raise DeviceUnavailable(
            f"{kind}:{index} does not exist: this process sees {count} {kind} device(s). "
            f"Start at most {count} processes here, or check {_BACKENDS[kind].visible}."
        )
    _runtime(kind).set_device(index)
    return torch.device(kind, index)


def _why_unavailable(kind: str) -> str:
    if kind == 'cuda':
        return 'no CUDA device is available here: use --device cpu, or install a CUDA build of torch and a driver.'
    if importlib.util.find_spec('torch_npu') is None:
        return ("no NPU is available here: torch_npu is not installed. `pip install 'timm-npu-irv2[npu]'`, "
                'or --device cpu.')
    if _npu_failure is not None:
        return f'no NPU is available here: torch_npu does not load ({_npu_failure}). Source CANN\'s set_env.sh first.'
    return 'no NPU is available here: torch_npu finds no device. Check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES.'


def configure(
        device: torch.device,
        allow_internal_format: bool | None = None,
        jit_compile: bool | None = None,
) -> None:
    """Set the backend's switches for the training of a convolutional network.

    Args:
        device: The device the process runs on.
        allow_internal_format: NPU: let convolutions keep tensors in private layouts (the 910A's fast path). None
            leaves torch_npu's choice.
        jit_compile: NPU: compile operators at run time for the shapes they meet instead of using the ready-made
            ones. None means False, the faster choice wherever the ready-made operators exist.
    """
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    elif device.type == 'npu':
        torch.npu.set_compile_mode(jit_compile=bool(jit_compile))
        if allow_internal_format is not None:
            torch.npu.config.allow_internal_format = allow_internal_format


def memory_format(device: torch.device | str) -> torch.memory_format:
    """The layout of images and convolution weights on ``device``."""
    return backend(device).memory_format


def half_dtype(device: torch.device | str) -> torch.dtype:
    """The 16-bit type that mixed precision uses on ``device`` unless the user names one."""
    return backend(device).half


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """The type in which ``device`` infers fastest: its 16-bit one, but float32 on a CPU without bfloat16 arithmetic."""
    if backend(device).type != 'cpu':
        return half_dtype(device)
    # Private names, but the only ones from torch 2.5 on; the last one is for Arm, and also true of any AVX-512 CPU.
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() or (
        not torch.cpu._is_avx2_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return half_dtype(device) if has_bfloat16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """``torch.autocast`` on ``device`` in ``dtype``; nothing at all for None or float32."""
    if dtype is None or dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.type, dtype=dtype)


def has_add_relu_kernel(x: torch.Tensor) -> bool:
    """Whether ATen's ``_add_relu`` is one kernel on ``x``'s device: the NPU's aclnnAddRelu.

    The CPU's turns NaN into 0, which would hide a diverged run; it is not used.
    """
    return x.device.type == 'npu'


def has_cheap_elu(x: torch.Tensor) -> bool:
    """Whether an ELU of ``x`` takes no longer than a ReLU: where memory, not arithmetic, is what it waits for."""
    return not isinstance(x, torch.Tensor) or x.device.type != 'cpu'  # FX's proxies are nowhere yet


def has_fused_convolution(x: torch.Tensor) -> bool:
    """Whether oneDNN's convolutions, with bias, addition and ReLU in one operator, work on ``x``: on the CPU."""
    if x.device.type != 'cpu' or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_fused_sgd(device: torch.device) -> bool:
    """Whether ``torch.optim.SGD(fused=True)`` works on ``device``: on the NPU it is aclnnFusedSgd."""
    key = {'npu': 'PrivateUse1', 'cuda': 'CUDA', 'cpu': 'CPU'}[device.type]
    return torch._C._dispatch_has_kernel_for_dispatch_key('aten::_fused_sgd_', key)


def has_slow_slices(x: torch.Tensor) -> bool:
    """Whether BatchNorm of ``x`` is slower than that of a copy without gaps, copying included.

    So it is for a slice of channels on the CPU, where ATen vectorizes only what has no gaps: with the copy it takes an
    eighth to two fifths of the time (``benchmark.py ops``).
    """
    if not isinstance(x, torch.Tensor) or x.device.type != 'cpu':  # FX's proxies are nowhere yet
        return False
    return not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done all that was asked of it. For clocks; never inside a training step."""
    runtime = _runtime(device.type)
    if runtime is not None:
        runtime.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Forget the greatest amount of memory that was in use."""
    runtime = _runtime(device.type)
    if runtime is not None:
        runtime.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """The greatest amount of the device's memory in use since :func:`reset_peak_memory`, in bytes; 0 on the CPU."""
    runtime = _runtime(device.type)
    synchronize(device)
    return runtime.max_memory_allocated(device) if runtime is not None else 0


def get_rng_state(device: torch.device) -> torch.Tensor | None:
    """The state of the device's random generator, a CPU tensor of bytes; None on the CPU (torch's own is it)."""
    runtime = _runtime(device.type)
    return runtime.get_rng_state(device) if runtime is not None else None


def set_rng_state(device: torch.device, state: torch.Tensor | None) -> None:
    """Set what :func:`get_rng_state` gave."""
    runtime = _runtime(device.type)
    if runtime is not None and state is not None:
        runtime.set_rng_state(state, device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory is exhausted."""
    known = isinstance(error, torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and 'out of memory' in str(error))


def apex_amp() -> ModuleType:
    """``apex.amp`` of Ascend's (or NVIDIA's) apex.

    Raises:
        UserError: apex is missing, or PyPI's unrelated package of that name is installed.
    """
    if importlib.util.find_spec('apex') is None:
        raise UserError(
            '--amp-impl apex needs apex, which is not on PyPI: build it from https://github.com/Ascend/apex, '
            'or use --amp-impl native, which does the same without it.'
        )
    try:
        return importlib.import_module('apex.amp')
    except ImportError as error:
        reason = str(error).partition('\n')[0]
        raise UserError(
            f"the installed package 'apex' has no mixed precision ({reason}). PyPI's apex is an unrelated web toolkit, "
            "NVIDIA's has dropped it: build https://github.com/Ascend/apex, or use --amp-impl native."
        ) from error


def fused_optimizer_class(
        name: str,
        device: torch.device | str,
        use_apex: bool = False,
) -> Callable[..., torch.optim.Optimizer] | None:
    """The fused optimizer ``name`` (e.g. 'NpuFusedSGD') of the vendor of ``device``, or None where there is none.

    Args:
        name: The class's name, the same in torch_npu and in Ascend's apex.
        device: Where the parameters are.
        use_apex: Take apex's, whose combined tensors apex's own loss scaling knows how to unscale.
    """
    package, module = ('apex', 'apex.optimizers') if use_apex else ('torch_npu', 'torch_npu.optim')
    if torch.device(device).type != 'npu' or importlib.util.find_spec(package) is None:
        return None
    return getattr(importlib.import_module(module), name, None)


def grad_scaler(device: torch.device) -> torch.amp.GradScaler:
    """A dynamic loss scaler that notices overflows on ``device``.

    It is torch's, which reads the device once a step. NPUs that saturate at the largest number instead of producing
    infinities (the 910A) need torch_npu's: it reads the chip's overflow flag and tells the other processes, for
    three readings more.
    """
    if device.type == 'npu' and not torch.npu.utils.is_support_inf_nan():
        return torch.npu.amp.GradScaler()
    return torch.amp.GradScaler(device.type)


def versions() -> dict[str, str]:
    """The versions of everything that decides a result, for reports: {package: version}."""
    found: dict[str, str] = {}
    for package in ('timm-npu-irv2', 'torch', 'torchvision', 'timm', 'torch_npu', 'apex', 'huggingface_hub'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    for name, value in (('cuda', torch.version.cuda), ('cann', os.environ.get('ASCEND_TOOLKIT_HOME'))):
        if value:
            found[name] = Path(value).name
    return found


def describe(device: torch.device) -> dict[str, Any]:
    """The device's type and name, for logs and reports."""
    runtime = _runtime(device.type)
    name = runtime.get_device_name(device) if runtime is not None else torch.backends.cpu.get_cpu_capability()
    return {'type': device.type, 'name': name}


def prefetch(items: Iterable[T], place: Callable[[T], R], device: torch.device) -> Iterator[R]:
    """``map(place, items)``; on an accelerator ``place`` works on a stream of its own, one item ahead of the consumer.

    So the transfer of the next batch overlaps the work on this one. A result must be used on the stream that is
    current when the iterator is advanced. The side stream waits for the consumer before each item, since the memory
    it allocates may be what the consumer's queued work still reads.
    """
    runtime = _runtime(device.type)
    if runtime is None:
        yield from map(place, items)
        return
    stream = runtime.Stream(device=device)
    ready: list[R] = []
    for item in items:
        stream.wait_stream(runtime.current_stream(device))
        with runtime.stream(stream):
            ready.append(place(item))
        if len(ready) == 2:
            yield ready.pop(0)
        runtime.current_stream(device).wait_stream(stream)
    yield from ready

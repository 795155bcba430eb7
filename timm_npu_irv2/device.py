"""The device seam: the only module that names a backend (npu, cuda, cpu; hccl, nccl, gloo; torch_npu; apex).

Other modules ask here which device to run on, how tensors are laid out on it, which collectives join several of
them, which kernels and optimizers its vendor ships, and how to wait for it. Nothing here knows the model.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from .chips import find_generation, load_facts
from .errors import DeviceUnavailable, UserError

__all__ = ['Backend', 'apex_amp', 'autocast', 'backend', 'backend_of', 'configure', 'default_device', 'describe',
           'device_count', 'fast_dtype', 'fused_optimizer_class', 'get_rng_state', 'grad_scaler', 'half_dtype',
           'is_out_of_memory', 'lack_of_fused_sgd', 'load_backends', 'memory_format', 'peak_memory', 'pointwise_form',
           'prefetch', 'preserve_switches', 'profiler', 'reset_peak_memory', 'resolve_device', 'set_rng_state',
           'survey', 'synchronize', 'use_memory_format', 'versions']

T = TypeVar('T')
R = TypeVar('R')


@dataclass(frozen=True)
class Backend:
    """The facts about one kind of device.

    Attributes:
        type: The device type, as in ``torch.device(type)``.
        collectives: torch.distributed's backend for devices of this type.
        memory_format: The layout in which convolutions run fastest, for images and for weights.
        half: The 16-bit type of mixed precision.
        visible: The environment variable that selects the devices a process sees, if there is one.
        cheap_elu: An ELU takes no longer than a ReLU, since both wait for memory. A CPU waits for its arithmetic.
        slow_slices: BatchNorm of a slice is faster with a copy first: a CPU vectorizes only what has no gaps.
        sums_products: A sum of products of matrices (torch.addbmm) is one call, elsewhere a loop.
        fused_convolutions: The library whose convolutions add the bias and a residual, and take the ReLU.
        records_kernels: :func:`record` works.
        tunable: Settings that ``benchmark.py tune`` tries only on devices of this type.
    """

    type: str
    collectives: str = 'gloo'
    memory_format: torch.memory_format = torch.contiguous_format
    half: torch.dtype = torch.float16
    visible: str | None = None
    cheap_elu: bool = True
    slow_slices: bool = False
    sums_products: bool = False
    fused_convolutions: str | None = None
    records_kernels: bool = False
    tunable: tuple[str, ...] = ('memory_format',)

    @property
    def fused_convolution_dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes for which ``fused_convolutions`` are available and worth using."""
        if self.fused_convolutions == 'cudnn':
            return (torch.float16, torch.bfloat16) if torch.backends.cudnn.enabled and _has_tensor_cores() else ()
        if self.type != 'cpu' or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
            return ()
        return (torch.float32, torch.bfloat16) if _onednn_has_bfloat16() else (torch.float32,)


@functools.cache
def _has_tensor_cores() -> bool:
    """Return True if the GPU multiplies matrices of either 16-bit type: one of Ampere's generation or a later one."""
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@functools.cache
def _onednn_has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


# torch_npu refuses channels_last tensors: convolutions choose their own layout on the NPU. A CPU has no float16
# convolutions worth using, but bfloat16 ones.
_BACKENDS = {
    'npu': Backend('npu', 'hccl', visible='ASCEND_RT_VISIBLE_DEVICES', sums_products=True, tunable=(
        'lazy_fusion', 'task_queue', 'jit_compile', 'allow_internal_format', 'allow_hf32')),
    'cuda': Backend('cuda', 'nccl', torch.channels_last, visible='CUDA_VISIBLE_DEVICES', tunable=(
        'memory_format', 'cudnn_benchmark', 'allow_tf32'), fused_convolutions='cudnn',
        records_kernels=True),
    'cpu': Backend('cpu', 'gloo', torch.channels_last, torch.bfloat16, cheap_elu=False, slow_slices=True,
                   fused_convolutions='onednn'),
}
_OTHER = Backend('other')

_npu_failure: str | None = None


def load_backends() -> None:
    """Import torch_npu where it is installed, and keep a failure for the message of ``resolve_device('npu')``.

    ``import torch`` does this by itself unless TORCH_DEVICE_BACKEND_AUTOLOAD=0.
    """
    global _npu_failure  # noqa: PLW0603 - one process, one torch_npu
    if hasattr(torch, 'npu') or importlib.util.find_spec('torch_npu') is None:
        return
    try:
        importlib.import_module('torch_npu')
    except Exception as error:  # torch_npu fails in many ways where CANN is missing or of another version
        _npu_failure = f'{type(error).__name__}: {error}'.splitlines()[0]
        warnings.warn(f'torch_npu is installed but does not load: {_npu_failure}. Continuing without.', stacklevel=2)


def backend(device: torch.device | str) -> Backend:
    """Return the facts about the type of ``device``.

    Raises:
        UserError: The plugin does not run on devices of this type.
    """
    device_type = torch.device(device).type
    if device_type not in _BACKENDS:
        raise UserError(f"device '{device_type}' is not supported: use one of {', '.join(_BACKENDS)}.")
    return _BACKENDS[device_type]


def backend_of(x: torch.Tensor) -> Backend:
    """Return the facts about a tensor's device, or the defaults for other devices and for FX's proxies."""
    return _BACKENDS.get(x.device.type, _OTHER) if isinstance(x, torch.Tensor) else _OTHER


def _runtime(device_type: str) -> Any:
    """Return torch.npu or torch.cuda where torch has it, else None: the CPU needs no runtime."""
    return getattr(torch, device_type, None) if device_type != 'cpu' else None


def device_count(device_type: str) -> int:
    """Return the number of devices of a type that this process can use; 1 for the CPU, which processes share."""
    if device_type == 'cpu':
        return 1
    runtime = _runtime(device_type)
    return runtime.device_count() if runtime is not None and runtime.is_available() else 0


def default_device() -> str:
    """Return 'npu' if there is one, else 'cuda' if there is one, else 'cpu'."""
    return next(kind for kind in _BACKENDS if device_count(kind))


def resolve_device(name: str | None = None, local_rank: int | None = None) -> torch.device:
    """Make a device current and return it.

    Args:
        name: 'npu', 'cuda' or 'cpu', with or without an index; None or '' for the first of them that exists here.
        local_rank: Index of this process on its machine, used as the device's index if ``name`` has none.

    Raises:
        DeviceUnavailable: The device does not exist here, in one line that says why and what to do.
    """
    load_backends()
    name = name or default_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        if (kind := name.partition(':')[0]) in _BACKENDS:  # torch knows 'npu' only once torch_npu is loaded
            raise DeviceUnavailable(_why_unavailable(kind)) from error
        raise UserError(f"--device {name}: no such device. Use one of {', '.join(_BACKENDS)}.") from error
    kind = backend(device).type
    if kind == 'cpu':
        return torch.device('cpu')
    if (count := device_count(kind)) == 0:
        raise DeviceUnavailable(_why_unavailable(kind))
    index = device.index if device.index is not None else (local_rank or 0)
    if index >= count:
        raise DeviceUnavailable(f'{kind}:{index} does not exist: this process sees {count} {kind} device(s). Start at '
                                f'most {count} processes here, or check {_BACKENDS[kind].visible}.')
    _runtime(kind).set_device(index)
    return torch.device(kind, index)


def _why_unavailable(kind: str) -> str:
    """Return the message for a machine without devices of a type."""
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
        allow_hf32: bool | None = None,
        deterministic: bool = False,
        allow_tf32: bool = True,
        cudnn_benchmark: bool = True,
) -> None:
    """Set the backend's switches for the training of a convolutional network.

    None leaves torch_npu's choice for the chip: internal formats and compilation at run time on the 910A, neither on
    A2 and A3; HF32 for convolutions, not for products of matrices.

    Args:
        device: The device that the process runs on.
        allow_internal_format: On an NPU, permission for convolutions to keep tensors in private layouts.
        jit_compile: On an NPU, compilation of operators at run time for the shapes they meet, instead of the
            precompiled ones.
        allow_hf32: On an NPU, permission for convolutions and products of float32 tensors to round them to HF32.
        deterministic: The same bits in every run, from operators and from the sums of HCCL.
        allow_tf32: On a GPU, permission for products of float32 matrices to round them to TF32.
        cudnn_benchmark: On a GPU, choice of each convolution's algorithm by measuring, unless ``deterministic``.
    """
    if deterministic:
        os.environ.setdefault('HCCL_DETERMINISTIC', 'true')
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
        torch.backends.cudnn.benchmark = cudnn_benchmark and not torch.are_deterministic_algorithms_enabled()
    elif device.type == 'npu':
        npu = _runtime('npu')
        if jit_compile is not None:
            npu.set_compile_mode(jit_compile=jit_compile)
        if allow_internal_format is not None:
            npu.config.allow_internal_format = allow_internal_format
        if allow_hf32 is not None:
            npu.conv.allow_hf32 = npu.matmul.allow_hf32 = allow_hf32


@contextlib.contextmanager
def preserve_switches(device: torch.device) -> Iterator[None]:
    """Restore at the end of the block the layout and the switches that :func:`configure` may have set in it."""
    options: Any = importlib.import_module('torch_npu._C') if device.type == 'npu' else None
    unset = {'jitCompile': 'disable', 'ALLOW_INTERNAL_FORMAT': 'enable', 'ALLOW_CONV_HF32': 'enable',
             'ALLOW_MATMUL_HF32': 'disable'} if options else {}  # torch_npu says '' for these
    before = {name: options._npu_getOption(name).decode() or value for name, value in unset.items()}
    layout, products, cudnn = memory_format(device), torch.backends.cuda.matmul, torch.backends.cudnn
    tf32, benchmark = products.allow_tf32, cudnn.benchmark
    try:
        yield
    finally:
        use_memory_format(device, layout)
        products.allow_tf32, cudnn.benchmark = tf32, benchmark
        if options:
            options._npu_setOption(before)


def record(work: Callable[[], torch.Tensor], device: torch.device) -> tuple[Callable[[], None], torch.Tensor]:
    """Record the kernels of ``work`` on a GPU as a CUDA graph.

    Args:
        work: Function that launches the same kernels on the same memory in each call.
        device: The GPU.

    Returns:
        A function that launches the kernels again, by a single call of the driver, and the tensor that receives the
        result each time.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # outside the graph: the choice of algorithms, and the memory they need
            work()
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = work()
    return graph.replay, out


def memory_format(device: torch.device | str) -> torch.memory_format:
    """Return the layout of images and convolution weights on ``device``."""
    return backend(device).memory_format


def use_memory_format(device: torch.device | str, layout: torch.memory_format) -> None:
    """Make ``layout`` that of images and weights on devices of this type, for the rest of the process."""
    _BACKENDS[backend(device).type] = replace(backend(device), memory_format=layout)


@functools.cache
def pointwise_form(device_type: str) -> str:
    """Return the form of 1×1 convolutions, see :mod:`.ops.variants`.

    On A2 and A3 convolutions convert layouts, which products of matrices need not; 'large' ones save the most.
    """
    if device_type != 'npu':
        return 'convolution'
    generation = find_generation(_runtime('npu').get_device_name())
    return 'large' if generation in load_facts()['convolutions']['convert_layouts'] else 'convolution'


def half_dtype(device: torch.device | str) -> torch.dtype:
    """Return the 16-bit type that mixed precision uses on ``device`` unless the user names one."""
    return backend(device).half


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype of the fastest inference: 16 bits, but float32 on a CPU without bfloat16 arithmetic."""
    if backend(device).type != 'cpu':
        return half_dtype(device)
    # Private names, but the only ones from torch 2.5 on; the last one is for Arm, and also true of any AVX-512 CPU.
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() or (
        not torch.cpu._is_avx2_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return half_dtype(device) if has_bfloat16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Return ``torch.autocast`` on ``device`` in ``dtype``, or a context that does nothing for None and float32."""
    if dtype is None or dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.type, dtype=dtype)


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has finished its queue. For clocks; never called inside a training step."""
    if (runtime := _runtime(device.type)) is not None:
        runtime.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of :func:`peak_memory`."""
    if (runtime := _runtime(device.type)) is not None:
        runtime.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Return the peak of allocated memory since :func:`reset_peak_memory`, in bytes; 0 on the CPU."""
    runtime = _runtime(device.type)
    synchronize(device)
    return runtime.max_memory_allocated(device) if runtime is not None else 0


def get_rng_state(device: torch.device) -> torch.Tensor | None:
    """Return the state of the device's random generator, a CPU tensor of bytes; None on the CPU: it is torch's own."""
    runtime = _runtime(device.type)
    return runtime.get_rng_state(device) if runtime is not None else None


def set_rng_state(device: torch.device, state: torch.Tensor | None) -> None:
    """Restore the state that :func:`get_rng_state` returned."""
    if (runtime := _runtime(device.type)) is not None and state is not None:
        runtime.set_rng_state(state, device)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for the errors that torch and the vendors raise when the device's memory is exhausted."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and 'out of memory' in str(error))


def apex_amp() -> ModuleType:
    """Import ``apex.amp`` of Ascend's or NVIDIA's apex.

    Raises:
        UserError: apex is missing, or PyPI's unrelated package of that name is installed.
    """
    if importlib.util.find_spec('apex') is None:
        raise UserError('--amp-impl apex needs apex, which is not on PyPI: build it from '
                        'https://github.com/Ascend/apex, or use --amp-impl native, which needs nothing.')
    try:
        return importlib.import_module('apex.amp')
    except ImportError as error:
        reason = str(error).partition('\n')[0]
        raise UserError(
            f"the installed package 'apex' has no mixed precision ({reason}). PyPI's apex is an unrelated web toolkit, "
            "NVIDIA's has dropped it: build https://github.com/Ascend/apex, or use --amp-impl native.") from error


def fused_optimizer_class(
        name: str, device: torch.device | str, use_apex: bool = False) -> Callable[..., torch.optim.Optimizer] | None:
    """Return the vendor's fused optimizer for ``device``, or None where there is none.

    Args:
        name: Name of the class, such as 'NpuFusedSGD', the same in torch_npu and in Ascend's apex.
        device: Device of the parameters.
        use_apex: Choice of apex's class, whose combined tensors apex's own loss scaling can unscale.
    """
    package, module = ('apex', 'apex.optimizers') if use_apex else ('torch_npu', 'torch_npu.optim')
    has_class = torch.device(device).type == 'npu' and importlib.util.find_spec(package) is not None
    return getattr(importlib.import_module(module), name, None) if has_class else None


def lack_of_fused_sgd(device: torch.device, momentum: float) -> str:
    """Return the reason why ``torch.optim.SGD(fused=True)`` does not run on ``device``; '' if it does.

    On an NPU it is aclnnFusedSgd, which came with CANN 9.1.0 and torch_npu of July 2026, and which needs a momentum.
    """
    key = {'npu': 'PrivateUse1', 'cuda': 'CUDA', 'cpu': 'CPU'}[device.type]
    if not torch._C._dispatch_has_kernel_for_dispatch_key('aten::_fused_sgd_', key):
        return f'this version of {"torch_npu" if device.type == "npu" else "torch"} has no fused SGD'
    if device.type != 'npu':
        return ''
    generation = find_generation(_runtime('npu').get_device_name(device))
    if generation and 'FusedSgd' in load_facts()['operators']['missing'][generation]:
        return f'the chips of generation {generation} have no fused SGD'
    if not _cann_has('aclnnFusedSgd'):
        return 'this version of CANN has no fused SGD'
    return '' if momentum > 0 else 'fused SGD needs a momentum here'


@functools.cache
def _cann_has(function: str) -> bool:
    """Return True if one of CANN's libraries of operators exports a function."""
    for library in ('libopapi_nn.so', 'libopapi.so'):  # from CANN 8.5 on the operators are in several libraries
        with contextlib.suppress(OSError, AttributeError):
            return bool(getattr(ctypes.CDLL(library), function))
    return False


def grad_scaler(device: torch.device) -> torch.amp.GradScaler:
    """Create a dynamic loss scaler that notices overflows on ``device``.

    This is torch's, which reads the device once a step. NPUs that saturate at the largest number instead of producing
    infinities (the 910A) need torch_npu's: it reads the chip's overflow flag and tells the other processes, at the
    cost of three more readings.
    """
    if device.type == 'npu' and not _runtime('npu').utils.is_support_inf_nan():
        return _runtime('npu').amp.GradScaler()
    return torch.amp.GradScaler(device.type)


def versions() -> dict[str, str]:
    """Return the versions of everything that decides a result, as {package: version}."""
    found: dict[str, str] = {}
    for package in ('timm-npu-irv2', 'torch', 'torchvision', 'timm', 'torch_npu', 'apex', 'huggingface_hub'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    others = {'cuda': torch.version.cuda, 'cann': os.environ.get('ASCEND_TOOLKIT_HOME')}
    return found | {name: Path(value).name for name, value in others.items() if value}


def describe(device: torch.device) -> dict[str, Any]:
    """Return the device's type and name, for logs and reports."""
    runtime = _runtime(device.type)
    name = runtime.get_device_name(device) if runtime is not None else torch.backends.cpu.get_cpu_capability()
    return {'type': device.type, 'name': name}


def prefetch(items: Iterable[T], place: Callable[[T], R], device: torch.device) -> Iterator[R]:
    """Yield ``place(item)`` for each item; on an accelerator from a stream of its own, one item ahead of the consumer.

    The transfer of the next batch then overlaps the work on this one. A result must be used on the stream that is
    current when the iterator is advanced. The side stream waits for the consumer before each item, since the memory
    it allocates may still be read by the consumer's queued work.
    """
    if (runtime := _runtime(device.type)) is None:
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


def profiler(device: torch.device) -> Any:
    """Return torch_npu's profiler on an NPU, else torch's, which has the same functions."""
    return importlib.import_module('torch_npu.profiler' if device.type == 'npu' else 'torch.profiler')


def survey() -> dict[str, list[dict[str, Any]]]:
    """Return the accelerators of this machine by kind: name and memory (bytes) of each, for diagnostics."""
    load_backends()
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in _BACKENDS:
        if (runtime := _runtime(kind)) is not None:
            found[kind] = []
            for index in range(device_count(kind)):
                runtime.set_device(index)  # an NPU answers only where it is current
                properties = runtime.get_device_properties(index)
                found[kind].append({'name': properties.name, 'memory': properties.total_memory})
    return found

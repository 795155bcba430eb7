"""``benchmark.py infer``: images/s, latency and memory of inference, alternated with the ways others run the network.

Memory is that of a process of its own, which has loaded the network and computed a few batches. The figures of this
package's engines on a CPU choose the one that ``engine='auto'`` stands for.
"""

import argparse
import functools
import importlib.util
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from .. import device as devices
from ..cli.benchmark_flags import (
    CANDIDATES,
    CHANNELS_LAST,
    CLIENTS,
    COMPILED,
    ENGINES,
    INT8,
    ONNXRUNTIME,
    OPENVINO,
    OURS,
    OURS_COMPILED,
    OURS_TRACED,
    OURS_UNFOLDED,
    PEERS,
    TIMM,
)
from ..deploy import Predictor, load, onnx, save, to_inference, trace
from ..deploy.engines import record_engine
from ..errors import CannotWrite
from ..tuning import apply_settings
from . import report
from .timing import ratio, times_in_turn
from .tuned import tuned_settings

__all__ = ['CANDIDATES', 'COLUMNS', 'run']

COLUMNS = ('images/s', "of timm's", 'p50 ms', 'p99 ms', 'MB')
CALIBRATION_IMAGES = 2  # random ones, enough to measure the speed

Infer = Callable[[Tensor], Any]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and return all figures."""
    device = devices.resolve_device(args.device)
    devices.configure(device)
    settings = {} if args.dtype == INT8 else tuned_settings(
        args.tuned, device, task='eval', batch_size=args.batch_size, img_size=args.img_size, precision=args.dtype)
    names = [name for name in args.only or CANDIDATES if args.only or _available(name, device, args.dtype)]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), names, args.img_size, args.dtype)
        memory = {name: _memory(Path(folder), name, device, args, settings) for name in names}
        runners = {name: create(name, Path(folder), device, args.dtype) for name in names}
        rates = _rates(runners, device, args)
        latencies = _latencies(runners, device, args)
        served = {name: _served(runner.network, device, args) for name, runner in runners.items()
                  if args.predictor and isinstance(runner, _Ours)}
    rows = {name: _row(rates, latencies[name], memory[name], name) for name in names}
    title = f'Inference at {args.img_size} px, {args.dtype}, batch {args.batch_size}, {device.type}'
    report.print_table(title, COLUMNS, rows)
    for line in _verdicts(rates, latencies, served):
        print(f'  {line}')
    _record(rates, latencies, device, args.dtype)
    return {'title': title, 'columns': COLUMNS, 'rows': rows, 'images_per_second': rates, 'latency_ms': latencies,
            'served': served, 'threads': torch.get_num_threads(), 'device': devices.describe(device),
            'versions': devices.versions()}


# ------------------------------------------------------------------------------------------------------- candidates


def _available(name: str, device: torch.device, dtype: str) -> bool:
    runtime = ENGINES.get(name, name)
    if runtime in (ONNXRUNTIME, OPENVINO):
        needed = (runtime, 'onnx', 'onnxruntime') if dtype == INT8 else (runtime, 'onnx')
        missing = [package for package in needed if importlib.util.find_spec(package) is None]
        dtypes = ('float32', 'bfloat16', INT8) if runtime == OPENVINO else ('float32', INT8)
        return device.type == 'cpu' and not missing and dtype in dtypes and (name in ENGINES or dtype != INT8
                                                                             or runtime == OPENVINO)
    traceable = devices.backend(device).fused_convolutions is not None
    return (dtype != INT8 or name in PEERS) and (name != OURS_TRACED or traceable)


def prepare(folder: Path, names: Iterable[str], img_size: int, dtype: str = 'float32') -> None:
    """Save the same random network into ``folder`` in each candidate's format: timm's weights, our folders, ONNX."""
    torch.manual_seed(0)
    model = timm.create_model('inception_resnet_v2').eval()
    torch.save(model.state_dict(), folder / 'timm.pth')
    if {OURS, OURS_TRACED, OURS_COMPILED} & set(names):
        save(to_inference(model), folder / 'ours')
    for name in ENGINES.keys() & set(names):
        images = torch.randn(CALIBRATION_IMAGES, 3, img_size, img_size) if dtype == INT8 else None
        network = to_inference(model, dtype=dtype, engine=ENGINES[name], calibration=images)
        save(network, folder / name)
    if {ONNXRUNTIME, OPENVINO} & set(names):
        example = torch.zeros(2, 3, img_size, img_size)
        torch.onnx.export(model, (example,), folder / 'timm.onnx', dynamo=False, input_names=['images'],
                          opset_version=onnx.OPSET, dynamic_axes={'images': {0: 'batch'}})


class _Ours:
    """This package's network, in the dtype and layout that it takes."""

    def __init__(self, network: Any, dtype: torch.dtype, layout: torch.memory_format):
        self.network, self.dtype, self.layout = network, dtype, layout

    def __call__(self, images: Tensor) -> Tensor:
        return self.network(images.to(self.dtype, memory_format=self.layout))


class _Traced:
    """This package's network as a graph for each shape."""

    def __init__(self, network: Any, dtype: torch.dtype):
        self.network, self.dtype = network, dtype
        self.graphs: dict[torch.Size, Any] = {}

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.dtype, memory_format=torch.channels_last)
        if images.shape not in self.graphs:
            self.graphs[images.shape] = trace(self.network, images)
        return self.graphs[images.shape](images)


def create(name: str, folder: Path, device: torch.device, dtype: str) -> Infer:
    """Return a function from normalised float32 images (N, 3, H, W) on ``device`` to logits.

    Args:
        name: One of ``CANDIDATES``.
        folder: Folder that :func:`prepare` filled.
        device: Device to run on.
        dtype: Name of the dtype to compute in; 'timm' stays in float32.
    """
    if name in ENGINES:
        return _Ours(load(folder / name), torch.float32, torch.contiguous_format)
    dtype = 'bfloat16' if dtype == INT8 else dtype
    if name == ONNXRUNTIME:
        runner = onnx.session(folder / 'timm.onnx', torch.get_num_threads())
        return lambda images: runner.run(None, {'images': images.numpy()})
    if name == OPENVINO:
        return _openvino(folder / 'timm.onnx', dtype)
    kind = getattr(torch, 'float32' if name == TIMM else dtype)
    if name in (OURS, OURS_TRACED, OURS_COMPILED):
        model: Any = load(folder / 'ours', device, kind)
    else:
        architecture = 'inception_resnet_v2_npu' if name == OURS_UNFOLDED else 'inception_resnet_v2'
        model = timm.create_model(architecture, checkpoint_path=folder / 'timm.pth')
        layout = torch.contiguous_format if name == TIMM else devices.memory_format(device)
        model = model.eval().to(device, kind).to(memory_format=layout)
    if name == OURS_TRACED:
        return _Traced(model, kind)
    if name in (OURS_COMPILED, COMPILED):
        model = torch.compile(model)
    layout = torch.contiguous_format if name == TIMM else devices.memory_format(device)
    if name == OURS:
        return _Ours(model, kind, layout)
    return lambda images: model(images.to(kind, memory_format=layout))


def _openvino(path: Path, dtype: str) -> Infer:
    compiled = onnx.optional('openvino').Core().compile_model(str(path), 'CPU', {
        'INFERENCE_NUM_THREADS': torch.get_num_threads(), 'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_PRECISION_HINT': {'float32': 'f32', 'bfloat16': 'bf16'}[dtype]})
    return lambda images: compiled(images.numpy())


# ------------------------------------------------------------------------------------------------------- measurements


def _images(args: argparse.Namespace, device: torch.device, batch_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch_size, 3, args.img_size, args.img_size, generator=generator).to(device)


@torch.inference_mode()
def _in_turn(
        runners: Mapping[str, Infer],
        images: Tensor,
        rounds: int,
        warmup: int,
) -> dict[str, list[float]]:
    """Return the seconds of each call."""
    from torch._inductor import config  # noqa: PLC0415 - takes seconds to import

    works = {name: functools.partial(infer, images) for name, infer in runners.items()}
    with config.patch(freezing=True):  # compiled candidates are compiled by their first call
        return times_in_turn(works, images.device, rounds, max(warmup, 1))


def _rates(runners: Mapping[str, Infer], device: torch.device, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the images per second of each round."""
    print(f'{args.rounds} rounds of {", ".join(runners)} …', file=sys.stderr, flush=True)
    seconds = _in_turn(runners, _images(args, device, args.batch_size), args.rounds, args.warmup)
    return {name: [args.batch_size / each for each in own] for name, own in seconds.items()}


def _latencies(runners: Mapping[str, Infer], device: torch.device, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the milliseconds of single images."""
    seconds = _in_turn(runners, _images(args, device, 1), args.latencies, args.warmup)
    return {name: [each * 1e3 for each in own] for name, own in seconds.items()}


def _memory(
        folder: Path,
        name: str,
        device: torch.device,
        args: argparse.Namespace,
        settings: Mapping[str, Any],
) -> float | None:
    """Return the megabytes of a process that serves batches with one candidate, or None if unknown."""
    print(f'memory of {name} …', file=sys.stderr, flush=True)
    context = multiprocessing.get_context('spawn')
    with context.Pool(1) as pool:
        return pool.apply(_memory_here, (folder, name, device, args, settings, torch.get_num_threads()))


def _memory_here(
        folder: Path,
        name: str,
        device: torch.device,
        args: argparse.Namespace,
        settings: Mapping[str, Any],
        threads: int,
) -> float | None:
    torch.set_num_threads(threads)
    devices.configure(device)
    apply_settings(settings, device)
    images = _images(args, device, args.batch_size)
    _in_turn({name: create(name, folder, device, args.dtype)}, images, 2, 1)
    if device.type != 'cpu':
        return devices.peak_memory(device) / 1e6
    status = Path('/proc/self/status')
    if not status.exists():
        return None
    (resident,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith('VmRSS'))
    return int(resident) * 1024 / 1e6


@torch.inference_mode()
def _served(network: Any, device: torch.device, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return images per second of whole batches and of single images through a Predictor, measured in turn."""
    shape = (3, args.img_size, args.img_size)
    network.pretrained_cfg['input_size'] = shape
    images = torch.randint(0, 256, (2 * CLIENTS, *shape), dtype=torch.uint8)
    rates: dict[str, list[float]] = {'batches': [], 'predictor': []}
    with Predictor(network, batch_size=args.batch_size) as predictor, ThreadPoolExecutor(CLIENTS) as clients:
        predictor.predict(list(images[:args.batch_size]))
        for _ in range(args.rounds):
            start = time.perf_counter()
            for batch in images.split(args.batch_size):
                network(batch.to(device)).softmax(-1).cpu()
            rates['batches'].append(len(images) / (time.perf_counter() - start))
            start = time.perf_counter()
            list(clients.map(predictor.predict, images))
            rates['predictor'].append(len(images) / (time.perf_counter() - start))
    return rates


# -------------------------------------------------------------------------------------------------------------- report


def _row(rates: Mapping[str, Sequence[float]], latencies: Sequence[float], memory: float | None, name: str) -> list:
    return [statistics.median(rates[name]), ratio(rates[name], rates[TIMM]).median if TIMM in rates else None,
            *_percentiles(latencies), memory]


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)]


def _verdicts(
        rates: Mapping[str, Sequence[float]],
        latencies: Mapping[str, Sequence[float]],
        served: Mapping[str, Mapping[str, Sequence[float]]],
) -> Iterable[str]:
    peers = [name for name in PEERS if name in rates]
    for name in (OURS, *ENGINES, OURS_TRACED, OURS_COMPILED):
        if name not in rates or not peers:
            continue
        best = max(peers, key=lambda peer: statistics.median(rates[peer]))
        median, low, high = ratio(rates[name], rates[best])
        yield f'{name}: {median:.3f} of the best peer, {best} ({low:.3f} to {high:.3f} in {len(rates[name])} rounds)'
        fastest = min(peers, key=lambda peer: statistics.median(latencies[peer]))
        median, low, high = ratio(latencies[fastest], latencies[name])
        yield f'{name}: {median:.3f} of the speed of the fastest peer with single images, {fastest}'
    if {OURS_UNFOLDED, CHANNELS_LAST} <= rates.keys():
        median, low, high = ratio(rates[OURS_UNFOLDED], rates[CHANNELS_LAST])
        yield f'{OURS_UNFOLDED}: {median:.3f} of {CHANNELS_LAST} ({low:.3f} to {high:.3f})'
    for name, figures in served.items():
        median, low, high = ratio(figures['predictor'], figures['batches'])
        yield (f'{name}: Predictor, {CLIENTS} threads with single images: {median:.3f} of the rate of whole batches '
               f'({low:.3f} to {high:.3f})')


def _record(
        rates: Mapping[str, Sequence[float]],
        latencies: Mapping[str, Sequence[float]],
        device: torch.device,
        dtype: str,
) -> None:
    """Record the engine for ``engine='auto'`` if there was a choice.

    The best has the greatest geometric mean of the rate of batches and that of single images.
    """
    engines = {OURS: 'torch', **ENGINES}
    speeds = {engines[name]: {'images_per_second': statistics.median(rates[name]),
                              'latency_ms': statistics.median(latencies[name])} for name in rates if name in engines}
    if device.type == 'cpu' and (len(speeds) > 1 or (dtype == INT8 and speeds)):
        best = max(speeds, key=lambda name: speeds[name]['images_per_second'] / speeds[name]['latency_ms'])
        try:
            path = record_engine(dtype, best, speeds)
        except CannotWrite as error:  # the figures are still wanted
            print(f"  not recorded for engine='auto': {error}")
            return
        print(f"  engine='auto' is {best} from now on, for {dtype} with {torch.get_num_threads()} "
              f'thread(s): {path}')


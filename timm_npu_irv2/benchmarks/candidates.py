"""Training steps to compare: this network as its users train it, and those it is measured against."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .. import device as devices
from ..ops import use_variants
from ..precision import Precision, create_precision

__all__ = ['Candidate', 'Workload', 'candidates']

Step = Callable[[], None]


@dataclass(frozen=True)
class Workload:
    """A device and the batches of random images to train on.

    Attributes:
        device: The device of the network and the images.
        batch_size: Number of images in a batch.
        img_size: Height and width of an image in pixels.
    """

    device: torch.device
    batch_size: int
    img_size: int

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return random images in the device's layout, and their classes."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch_size, 3, self.img_size, self.img_size, generator=generator)
        targets = torch.randint(1000, (self.batch_size,), generator=generator)
        layout = devices.memory_format(self.device)
        return images.to(self.device, memory_format=layout), targets.to(self.device)

    def network(self, name: str, **kwargs) -> nn.Module:
        """Create a network in training mode with random weights, the same in every call."""
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=1000, **kwargs).to(self.device)
        return model.to(memory_format=devices.memory_format(self.device)).train()


@dataclass(frozen=True)
class Candidate:
    """A network with the recipe it is trained by.

    Attributes:
        name: Name in tables.
        create: Function from a workload to a training step.
        lazy_fusion: Trained with TORCH_NPU_LAZY_FUSION.
    """

    name: str
    create: Callable[[Workload], Step]
    lazy_fusion: bool = False


def candidates(
        amp: bool,
        recompute: bool = False,
        zoo: bool = False,
        best: bool = False,
        compiled: bool = False,
        settings: Mapping[str, Any] | None = None,
) -> dict[str, Candidate]:
    """Return {short name: candidate}: 'ours', 'timm', and others if asked for.

    All train with label smoothing 0.1; all but the zoo's with timm's 'sgd' (Nesterov's momentum, weight decay but for
    biases and norms).

    Args:
        amp: Train in 16 bits: ours at O2 with a static loss scale of 128 (float16), timm's by autocast, with
            GradScaler if the type is float16, as in its train.py. Otherwise both train in float32.
        recompute: Add ours with ``set_grad_checkpointing('cheap')``.
        best: Add ours with the variants that move the fewest bytes on an A2 by count: 1×1 convolutions as products of
            matrices, and TORCH_NPU_LAZY_FUSION.
        zoo: Add the recipe of the model zoo's script: apex's O2 with a static loss scale of 128 and apex's NpuFusedSGD.
        compiled: Add ours and timm's, compiled by Inductor.
        settings: Settings of ours that ``benchmark.py tune`` chose, of those that do not hold for the whole process.
    """
    found = {
        'ours': Candidate('inception_resnet_v2_npu', lambda workload: _ours(workload, amp, settings=settings)),
        'timm': Candidate('inception_resnet_v2 (timm)', lambda workload: _timm(workload, amp)),
    }
    if compiled:
        inductor = {**(settings or {}), 'torchcompile': 'inductor'}
        found['ours, compiled'] = Candidate(
            'inception_resnet_v2_npu, compiled', lambda workload: _ours(workload, amp, settings=inductor),
        )
        found['timm, compiled'] = Candidate(
            'inception_resnet_v2 (timm), compiled', lambda workload: _timm(workload, amp, 'inductor'),
        )
    if recompute:
        found['ours, recomputing'] = Candidate(
            'inception_resnet_v2_npu, recomputing', lambda workload: _ours(workload, amp, recompute='cheap'),
        )
    if best:
        found['ours, best'] = Candidate(
            'inception_resnet_v2_npu, best variants', lambda workload: _with_products(_ours(workload, amp)), True,
        )
    if zoo:
        found['zoo'] = Candidate("the model zoo's recipe", _zoo)
    return found


def _criterion() -> nn.Module:
    return nn.CrossEntropyLoss(label_smoothing=0.1)


def _optimizer(model: nn.Module, fused: bool | None = None) -> torch.optim.Optimizer:
    given: dict[str, Any] = {} if fused is None else {'fused': fused}
    return timm.optim.create_optimizer_v2(model, 'sgd', lr=1e-4, momentum=0.9, weight_decay=1e-4, **given)


def _ours(
        workload: Workload,
        amp: bool,
        recompute: str | None = None,
        settings: Mapping[str, Any] | None = None,
) -> Step:
    chosen = settings or {}
    model: Any = workload.network('inception_resnet_v2_npu')
    model.set_grad_checkpointing(recompute or chosen.get('recompute', False))
    loss_scale = 128.0 if amp and devices.half_dtype(workload.device) == torch.float16 else None
    precision = create_precision(workload.device, amp=amp, opt_level='O2' if amp else None, loss_scale=loss_scale)
    model, optimizer = precision.prepare(model, _optimizer(model, chosen.get('fused_optimizer')))
    if 'torchcompile' in chosen:
        model = torch.compile(model, backend=chosen['torchcompile'])
    return _step(workload, precision, model, optimizer)


def _with_products(step: Step) -> Step:
    def with_products() -> None:
        with use_variants(pointwise='product'):
            step()
    return with_products


def _zoo(workload: Workload) -> Step:
    precision = create_precision(workload.device, amp=True, amp_impl='apex', opt_level='O2', loss_scale=128.0)
    model = workload.network('inception_resnet_v2')
    optimizer = timm.optim.create_optimizer_v2(
        model.parameters(), 'npufusedsgd', lr=1e-4, momentum=0.9, weight_decay=1e-4, use_apex=True)
    return _step(workload, precision, *precision.prepare(model, optimizer))


def _step(workload: Workload, precision: Precision, model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    images, targets = workload.batch()
    images = images.to(precision.input_dtype)
    criterion = _criterion()

    def step() -> None:
        with precision.autocast():
            loss = criterion(model(images), targets)
        optimizer.zero_grad()
        precision.step(loss, optimizer)
    return step


def _timm(workload: Workload, amp: bool, compiler: str | None = None) -> Step:
    model: Any = workload.network('inception_resnet_v2')
    dtype = devices.half_dtype(workload.device) if amp else None
    # The default first scale, 2**16, may overflow here, and a step that is skipped costs less than one that is not.
    scaler = torch.amp.GradScaler(workload.device.type, init_scale=2.0 ** 10, enabled=dtype == torch.float16)
    optimizer = _optimizer(model)
    if compiler:
        model = torch.compile(model, backend=compiler)
    images, targets = workload.batch()
    criterion = _criterion()

    def step() -> None:
        with devices.autocast(workload.device, dtype):
            loss = criterion(model(images), targets)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return step

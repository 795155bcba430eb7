"""What test_standin.py runs in processes of their own, each a function that returns something JSON can hold.

`python pieces.py NAME` runs one on the stand-in (see environment.py) and prints its result as the last line.
"""

import copy
import ctypes
import json
import os
import sys
import time
from collections.abc import Iterable

import standin_journal
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch_npu
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import timm_npu_irv2  # noqa: F401 - registers inception_resnet_v2_npu

SIZE, STEPS = 75, 2


def images(count: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % 10


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                         nn.Linear(128, 10))


def sgd(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    options = dict(lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4)
    if kind == 'NpuFusedSGD':
        return torch_npu.optim.NpuFusedSGD(model.parameters(), **options)
    return torch.optim.SGD(model.parameters(), fused=True if kind == 'fused' else None, **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()
    return loss.detach()


def vector(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([each.detach().cpu().double().flatten() for each in tensors])


def train(model: nn.Module, kind: str, device: str, size: int = SIZE) -> tuple[torch.Tensor, ...]:
    """The losses of a few steps from a copy of the model, the last step's gradients, and the weights and statistics.

    Three vectors, because an error in a gradient is a thousand times smaller in the weights.
    """
    model = copy.deepcopy(model).to(device).train()
    x, target = (each.to(device) for each in images(2, size))
    optimizer = sgd(model, kind)
    losses = [step(model, optimizer, x, target) for _ in range(STEPS)]
    gradients = [each.grad for each in model.parameters()]
    return vector(losses), vector(gradients), vector(model.state_dict().values())


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The greatest difference relative to the greatest value; NaN counts as infinite."""
    return ((actual - expected).abs().max() / expected.abs().max()).nan_to_num(float('inf')).item()


def largest_error(actual: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
    return max(map(error, actual, expected))


# ---- one process -----------------------------------------------------------------------------------------------------

def training() -> dict:
    """{'errors': {model and optimizer: error}, 'step': what one step of ours costs}."""
    errors = {}
    for name, kinds in ('inception_resnet_v2', ['plain']), ('inception_resnet_v2_npu', ['fused', 'NpuFusedSGD']):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10)
        expected = train(model, 'plain', 'cpu')
        for kind in kinds:
            errors[f'{name}, {kind}'] = largest_error(train(model, kind, 'npu'), expected)
    return {'errors': errors, 'step': cost_of_a_step(model.npu().train())}


def cost_of_a_step(model: nn.Module) -> dict:
    x, target = (each.npu() for each in images(2, SIZE))
    optimizer = sgd(model, 'fused')
    step(model, optimizer, x, target)
    with standin_journal.recording() as record:
        step(model, optimizer, x, target)
    return {'calls': len(record.operators), 'bytes': record.bytes, 'synchronizations': record.synchronizations,
            'D2H': len(record.copies('D2H')), 'H2D': len(record.copies('H2D')), 'names': record.calls()}


def small_training() -> float:
    return largest_error(*(train(small_network(), 'plain', device, 32) for device in ('npu', 'cpu')))


def autocast() -> dict:
    """The cosine between the float16 gradients of the stand-in and the CPU; the casts and the types it used."""
    gradients = []
    for device in 'cpu', 'npu':
        model = small_network().to(device)
        x, target = (each.to(device) for each in images(4, 32))
        with standin_journal.recording() as record, torch.autocast(device, torch.float16):
            logits = model(x)
            F.cross_entropy(logits, target).backward()
        gradients.append(torch.cat([each.grad.cpu().flatten() for each in model.parameters()]))
    return {'cosine': F.cosine_similarity(*gradients, dim=0).item(), 'dtype': str(logits.dtype),
            'casts': record.calls()['aclnnInplaceCopy'] + record.calls()['aclnnCast']}


def loss_scale() -> dict:
    """A dynamic loss scale through finite, infinite, finite steps, and whether the weights stayed finite."""
    model = small_network().npu()
    optimizer, scaler = sgd(model, 'fused'), torch.amp.GradScaler('npu', init_scale=1024.0, growth_interval=1)
    x, target = (each.npu() for each in images(2, 32))
    scales = []
    for factor in 1.0, float('inf'), 1.0:
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), target) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return {'scales': scales, 'finite': all(each.isfinite().all().item() for each in model.parameters())}


def journal() -> dict:
    """What the log and the trace hold of a known operator, copies, a synchronisation and a fallback to the CPU."""
    x, y = torch.ones(1000, device='npu'), torch.ones(1000, 1, device='npu').expand(1000, 1000)
    with standin_journal.recording() as add:
        torch.add(x, x)
    with standin_journal.recording() as expanded:
        torch.mul(y, 2)
    with standin_journal.recording() as item:
        x[0].item()
    with standin_journal.recording() as upload:
        torch.ones(50).npu()
    with standin_journal.recording() as waiting:
        torch.npu.synchronize()
    with standin_journal.recording() as fallback:
        torch.linalg.inv(torch.eye(3, device='npu'))
    return {'add': add.operators, 'expanded': expanded.operators, 'item': item.copies('D2H'),
            'item_synchronizations': item.synchronizations, 'upload': upload.copies('H2D'),
            'synchronizations': waiting.synchronizations, 'fallback': len(fallback.copies('D2H'))}


def without_operators() -> dict:
    """Two steps with a dynamic loss scale: the operators of the second, and the scale."""
    model = small_network().npu()
    optimizer, scaler = sgd(model, 'fused'), torch.amp.GradScaler('npu', init_scale=1024.0, growth_interval=1)
    x, target = (each.npu() for each in images(2, 32))
    for _ in range(2):
        with standin_journal.recording() as record:
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), target)).backward()
            scaler.step(optimizer)
            scaler.update()
    return {'operators': record.operators, 'scale': scaler.get_scale()}


# {name: (torch's optimizer, the one to compare, options of both, switch of the second)}
OPTIMIZERS = {
    'SGD foreach': (torch.optim.SGD, torch.optim.SGD, dict(momentum=0.9, nesterov=True), 'foreach'),
    'SGD fused': (torch.optim.SGD, torch.optim.SGD, dict(momentum=0.9, weight_decay=0.1), 'fused'),
    'Adam foreach': (torch.optim.Adam, torch.optim.Adam, dict(weight_decay=0.1), 'foreach'),
    'AdamW fused': (torch.optim.AdamW, torch.optim.AdamW, dict(weight_decay=0.1), 'fused'),
    'NpuFusedSGD': (torch.optim.SGD, torch_npu.optim.NpuFusedSGD, dict(momentum=0.9, nesterov=True), None),
    'NpuFusedAdam': (torch.optim.Adam, torch_npu.optim.NpuFusedAdam, dict(weight_decay=0.1), None),
    'NpuFusedAdamW': (torch.optim.AdamW, torch_npu.optim.NpuFusedAdamW, dict(weight_decay=0.1), None),
    'NpuFusedRMSprop': (torch.optim.RMSprop, torch_npu.optim.NpuFusedRMSprop, dict(momentum=0.9), None),
}


def optimizers() -> dict[str, float]:
    """{optimizer: error against torch's own on the CPU}.

    Without a BatchNorm: a bias before one has no gradient but rounding, which Adam would scale up.
    """
    torch.manual_seed(0)
    start = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 10))
    errors = {}
    for name, (reference, tested, options, switch) in OPTIMIZERS.items():
        weights = []
        for device, optimizer_class in ('cpu', reference), ('npu', tested):
            model = copy.deepcopy(start).to(device)
            switches = {switch: True} if switch and device == 'npu' else {}
            optimizer = optimizer_class(model.parameters(), lr=0.01, **options, **switches)
            x, target = (each.to(device) for each in images(8, 8))
            for _ in range(3):
                step(model, optimizer, x, target)
            weights.append(vector(model.parameters()))
        errors[name] = error(weights[1], weights[0])
    return errors


def out_of_memory() -> dict:
    """The class of the error when a device is full, and whether it works on once there is room."""
    kept = torch.ones(1 << 20, device='npu')
    try:
        torch.empty(1 << 30, device='npu')
        raised = 'nothing'
    except torch.OutOfMemoryError as caught:
        raised = str(caught).splitlines()[0]
    return {'raised': raised, 'sum': (kept + 1).sum().item()}


def missing_operator() -> None:
    ones = torch.ones(2, 3, device='npu')
    torch.linalg.cross(ones, ones)
    torch.npu.synchronize()


def private_format() -> None:
    torch_npu.npu.config.allow_internal_format = True
    torch_npu.npu_format_cast(torch.ones(16, 16, device='npu'), 29)  # FRACTAL_NZ
    torch.npu.synchronize()


def misplaced_argument() -> None:
    """aclnnNeg(self, out) is handed a scalar for `self`, as by a wrong signature."""
    torch.npu.init()
    operators = ctypes.CDLL('libopapi.so')
    operators.aclCreateScalar.restype = ctypes.c_void_p
    scalar = ctypes.c_void_p(operators.aclCreateScalar(ctypes.byref(ctypes.c_float(1)), 0))
    room = ctypes.c_uint64(), ctypes.c_void_p()
    operators.aclnnNegGetWorkspaceSize(scalar, None, *map(ctypes.byref, room))


# ---- evaluation and the rest of a training script: each is equal on the stand-in and the CPU -------------------------

def _accuracy(logits: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
    return timm.utils.accuracy(logits, target, topk=(1, 5))


def _mixup_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    soft = timm.data.mixup.mixup_target(target, 10, lam=0.3, smoothing=0.1)
    return torch.sum(-soft * F.log_softmax(logits, dim=-1), dim=-1).mean()


def _moving_average(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    averages = [logits * 2]
    torch._foreach_lerp_(averages, [logits], weight=0.1)
    return averages[0].lerp_(logits, 0.5)


def _clipped(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    weight = nn.Parameter(logits)
    weight.grad = logits * 3
    nn.utils.clip_grad_norm_([weight], 1.0)
    return weight.grad


def _distillation(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.kl_div(logits.log_softmax(-1), (logits * 2).log_softmax(-1), reduction='batchmean', log_target=True)


def _confusion(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.bincount(target * 10 + logits.argmax(1), minlength=100)


def _normalised(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (logits * 20 + 100).to(torch.uint8).float().sub_(127.5).div_(58.0).flip(0).clamp(-1, 1)


def script() -> dict[str, float]:
    """{what a script does: error}."""
    logits, target = torch.randn(16, 10, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
    functions = (
        _accuracy, _mixup_loss, _moving_average, _clipped, _distillation, _confusion, _normalised,
        nn.CrossEntropyLoss(label_smoothing=0.1), lambda x, t: x[t == 3], lambda x, t: x.sort(1),
        lambda x, t: torch.std_mean(x, 0),
    )
    errors = {}
    for function in functions:
        values = []
        for device in 'cpu', 'npu':
            result = function(logits.clone().to(device), target.to(device))
            values.append(vector([result] if isinstance(result, torch.Tensor) else result))
        errors[f'{getattr(function, "__name__", function)} {len(errors)}'] = error(values[1], values[0])
    return errors


# ---- two processes ---------------------------------------------------------------------------------------------------

def start_hccl() -> int:
    rank = int(os.environ['RANK'])
    torch.npu.set_device(rank)
    dist.init_process_group('hccl')
    return rank


def collectives() -> dict:
    rank = start_hccl()
    big = torch.arange(1_000_003, device='npu', dtype=torch.float32) * (rank + 1)
    dist.all_reduce(big)
    gathered = [torch.zeros(2, device='npu') for _ in range(2)]
    dist.all_gather(gathered, torch.full((2,), float(rank), device='npu'))
    sent = torch.full((2,), 7.0 + rank, device='npu')
    dist.broadcast(sent, src=1)
    objects = [None, None]
    dist.all_gather_object(objects, {'rank': rank})
    dist.barrier()
    dist.destroy_process_group()
    exact = torch.equal(big.cpu(), torch.arange(1_000_003, dtype=torch.float32) * 3)
    return {'all_reduce': exact, 'all_gather': [each.tolist() for each in gathered], 'broadcast': sent.tolist(),
            'objects': objects}


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64)


def transfers() -> dict:
    """What goes from rank to rank, and reductions in every type; True where both are what they must be."""
    rank = start_hccl()
    other = 1 - rank
    received = torch.empty(100_000, device='npu')
    sent = torch.full_like(received, float(rank))
    operations = dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)
    for each in dist.batch_isend_irecv(list(operations)):
        each.wait()
    exchanged = torch.empty(4, device='npu')
    dist.all_to_all_single(exchanged, torch.arange(4.0, device='npu') + 10 * rank)
    share = torch.empty(3, device='npu')
    dist.reduce_scatter_tensor(share, torch.arange(6.0, device='npu'))
    extremes = {}
    for dtype in DTYPES:
        values = torch.tensor([rank, 5 - rank], device='npu').to(dtype)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        extremes[str(dtype)] = values.tolist() == [1, 5]
    if rank == 0:
        dist.send(sent, 1)
    else:
        dist.recv(received, 0)
    dist.barrier()
    result = {'batch': bool((received == 0).all()) if rank == 1 else bool((received == 1).all()),
              'all_to_all': exchanged.tolist() == [2 * rank, 2 * rank + 1, 10 + 2 * rank, 11 + 2 * rank],
              'reduce_scatter': share.tolist() == [6 * rank, 6 * rank + 2, 6 * rank + 4], **extremes}
    dist.destroy_process_group()
    return result


def disagreement() -> None:
    rank = start_hccl()
    dist.all_reduce(torch.ones(1 + rank, device='npu'))
    torch.npu.synchronize()


def data_parallel() -> float:
    """Two ranks of two images each, with SyncBatchNorm, against one CPU process with all four."""
    rank = start_hccl()
    x, target = images(4, 32)
    own = slice(2 * rank, 2 * rank + 2)
    model = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(small_network()).npu(), device_ids=[rank])
    single = small_network()
    for trained, batch in (model, (x[own].npu(), target[own].npu())), (single, (x, target)):
        optimizer = sgd(trained, 'plain')
        for _ in range(STEPS):
            step(trained, optimizer, *batch)
    dist.destroy_process_group()
    return error(*(vector(network.state_dict().values()) for network in (model.module, single)))


def silent_peer() -> None:
    rank = start_hccl()
    dist.all_reduce(torch.ones(1, device='npu'))
    torch.npu.synchronize()
    if rank == 1:
        time.sleep(60)  # the test ends this process
    dist.all_reduce(torch.ones(1, device='npu'))
    torch.npu.synchronize()


if __name__ == '__main__':
    print(json.dumps(globals()[sys.argv[1]]()), flush=True)

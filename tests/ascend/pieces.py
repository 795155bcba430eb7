"""What the tests run here or in processes of their own, each a function that returns something JSON can hold.

`python pieces.py NAME…` runs some on the stand-in (see environment.py) and prints their results as the last line.
"""

import copy
import ctypes
import json
import os
import sys
import time
from collections.abc import Iterable

import standin_journal
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch_npu
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STEPS = 2


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


def train(model: nn.Module, kind: str, device: str, size: int = 75, steps: int = STEPS) -> tuple[torch.Tensor, ...]:
    """The first step's logits and gradients, the losses of all steps, and the weights and statistics after them.

    Separate vectors, because an error in a gradient is a thousand times smaller in the weights.
    """
    model = copy.deepcopy(model).to(device).train()
    x, target = (each.to(device) for each in images(2, size))
    optimizer = sgd(model, kind)
    logits = model(x)
    F.cross_entropy(logits, target).backward()
    first = vector([logits]), vector(each.grad for each in model.parameters())
    optimizer.step()
    losses = [step(model, optimizer, x, target) for _ in range(steps - 1)]
    return *first, vector(losses), vector(model.state_dict().values())


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The greatest difference relative to the greatest value; NaN counts as infinite."""
    return ((actual - expected).abs().max() / expected.abs().max()).nan_to_num(float('inf')).item()


def largest_error(actual: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
    return max(map(error, actual, expected))


# ---- one process -----------------------------------------------------------------------------------------------------

def small_training() -> float:
    return largest_error(*(train(small_network(), 'plain', device, 32) for device in ('npu', 'cpu')))


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


# ---- several processes -----------------------------------------------------------------------------------------------

def start_hccl() -> tuple[int, int]:
    """(rank, world size) of this process, in the job that its environment names."""
    rank = int(os.environ['RANK'])
    if not dist.is_initialized():
        torch.npu.set_device(rank)
        dist.init_process_group('hccl')
    return rank, dist.get_world_size()


def collectives() -> dict[str, bool]:
    """{collective: it gave what it must}."""
    rank, size = start_hccl()
    big = torch.arange(1_000_003, device='npu', dtype=torch.float32) % 1000  # more than one piece of the transport
    expected = big.cpu() * (size * (size + 1) // 2)
    big *= rank + 1
    dist.all_reduce(big)
    gathered = [torch.zeros(2, device='npu') for _ in range(size)]
    dist.all_gather(gathered, torch.full((2,), float(rank), device='npu'))
    sent = torch.full((2,), 7.0 + rank, device='npu')
    dist.broadcast(sent, src=size - 1)
    objects = [None] * size
    dist.all_gather_object(objects, {'rank': rank})
    pair = dist.new_group([0, 1])
    paired = torch.ones(3, device='npu') * (rank + 1)
    if rank < 2:
        dist.all_reduce(paired, group=pair)
    dist.barrier()
    return {'all_reduce': torch.equal(big.cpu(), expected),
            'all_gather': [each.tolist() for each in gathered] == [[float(each)] * 2 for each in range(size)],
            'broadcast': sent.tolist() == [6.0 + size] * 2,
            'objects': objects == [{'rank': each} for each in range(size)],
            'group of two': paired.tolist() == [3.0 if rank < 2 else rank + 1.0] * 3}


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64)


def transfers() -> dict[str, bool]:
    """{what goes from rank to rank, and reductions in every type: whether it was what it must be}."""
    rank, size = start_hccl()
    following, previous = (rank + 1) % size, (rank - 1) % size
    received = torch.empty(100_000, device='npu')
    sent = torch.full_like(received, float(rank))
    operations = dist.P2POp(dist.isend, sent, following), dist.P2POp(dist.irecv, received, previous)
    for each in dist.batch_isend_irecv(list(operations)):
        each.wait()
    found = {'batch': bool((received == previous).all())}
    exchanged = torch.empty(2 * size, device='npu')
    dist.all_to_all_single(exchanged, torch.arange(2.0 * size, device='npu') + 100 * rank)
    pairs = [[2 * rank + 100 * each, 2 * rank + 1 + 100 * each] for each in range(size)]
    found['all_to_all'] = exchanged.tolist() == [value for pair in pairs for value in pair]
    share = torch.empty(3, device='npu')
    dist.reduce_scatter_tensor(share, torch.arange(3.0 * size, device='npu'))
    found['reduce_scatter'] = share.tolist() == [size * (3 * rank + each) for each in range(3)]
    for dtype in DTYPES:
        values = torch.tensor([rank, 5 - rank], device='npu').to(dtype)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        found[f'maximum of {dtype}'] = values.tolist() == [size - 1, 5]
    if rank == 0:
        dist.send(sent + 9, 1)
    elif rank == 1:
        dist.recv(received, 0)
        found['recv'] = bool((received == 9).all())
    dist.barrier()
    return found


def disagreement() -> None:
    rank, _ = start_hccl()
    dist.all_reduce(torch.ones(1 + rank, device='npu'))
    torch.npu.synchronize()


def data_parallel() -> float:
    """Ranks of two images each, with SyncBatchNorm, against one CPU process with all of them."""
    rank, size = start_hccl()
    x, target = images(2 * size, 32)
    own = slice(2 * rank, 2 * rank + 2)
    model = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(small_network()).npu(), device_ids=[rank])
    single = small_network()
    for trained, batch in (model, (x[own].npu(), target[own].npu())), (single, (x, target)):
        optimizer = sgd(trained, 'plain')
        for _ in range(STEPS):
            step(trained, optimizer, *batch)
    return error(*(vector(network.state_dict().values()) for network in (model.module, single)))


def silent_peer() -> None:
    rank, _ = start_hccl()
    dist.all_reduce(torch.ones(1, device='npu'))
    torch.npu.synchronize()
    if rank == 1:
        time.sleep(60)  # the test ends this process
    dist.all_reduce(torch.ones(1, device='npu'))
    torch.npu.synchronize()


if __name__ == '__main__':
    print(json.dumps([globals()[name]() for name in sys.argv[1:]]), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()

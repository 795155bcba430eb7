"""PyTorch's FSDP2 and DistributedDataParallel train this network as they train timm's."""

import datetime

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from .pair import images, short_pair

pytestmark = pytest.mark.filterwarnings('ignore')


def shard(model: nn.Module) -> nn.Module:
    for name in ('repeat', 'repeat_1', 'repeat_2'):
        for block in getattr(model, name):
            fully_shard(block)
    fully_shard(model.mixed_5b)
    return fully_shard(model)


def wrap(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def losses(model: nn.Module, rank: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = images(8, torch.float64, 107).chunk(2)[rank]
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model.train()(x), torch.arange(4) + rank)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    with torch.no_grad():
        return [*found, *model.eval()(images(2, torch.float64)).flatten().tolist()]


def train_both(rank: int, world: int, prepare, folder: str) -> None:
    """Train timm's network and ours in one of several processes; write both lists of losses."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=1200))
    try:
        torch.save([losses(prepare(model), rank) for model in short_pair(torch.float64)], f'{folder}/{rank}')
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize('prepare, world', [
    (shard, 2), *(pytest.param(*case, marks=pytest.mark.long) for case in [(shard, 1), (wrap, 1), (wrap, 2)]),
])
def test_processes_train_it_as_they_train_timms(tmp_path, prepare, world):
    torch.multiprocessing.spawn(train_both, (world, prepare, str(tmp_path)), nprocs=world)
    for rank in range(world):
        expected, actual = torch.load(tmp_path / str(rank))
        assert actual == pytest.approx(expected, rel=1e-6)
        assert expected[0] != expected[2]

"""The evaluation of a model: every image once, the same digits for any number of processes."""

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import World, sum_over_ranks, together

__all__ = ['evaluate']


def evaluate(
        model: nn.Module,
        loader: Iterable[tuple[Tensor, Tensor]],
        world: World,
        *,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        tta: int = 0,
        on_batch: Callable[[int, Tensor, Tensor], None] | None = None,
) -> dict[str, float]:
    """Return cross entropy and accuracy over every image of the loader and all processes; each image counts once.

    Nothing waits for the device before the last batch.

    Args:
        model: Module from images (N, 3, H, W) to logits (N, C). It is left in evaluation mode.
        loader: Batches of images and class indices (N,) of this process, on the device. Processes may have different
            numbers of batches.
        world: This process among all.
        autocast: Context of the forward pass.
        tta: Number of images in a row that are views of one image, whose logits are averaged; 0 or 1 for none.
        on_batch: Function of the batch's index, logits and class indices, called after each batch.

    Returns:
        'loss', 'top1' and 'top5' in percent, and 'count'. Hits are counted in integers, so top1 and top5 depend neither
        on the number of processes nor on the batch size.

    Raises:
        UserError: Another process has failed; no process waits for it.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module  # whose forward would wait for processes that have fewer batches
    hits: list[Tensor] = []
    losses: list[Tensor] = []
    sizes: list[int] = []

    @torch.inference_mode()  # not around the talk of the processes, which PyTorch 2.5 refuses there
    def answer_all() -> None:
        model.eval()
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        for index, (images, labels) in enumerate(loader):
            with autocast():
                output = model(images.to(dtype))
            output = output[0] if isinstance(output, tuple | list) else output
            target = labels
            if tta > 1:
                output, target = output.unfold(0, tta, tta).mean(dim=2), labels[::tta]
            losses.append(nn.functional.cross_entropy(output.float(), target))
            hits.append(_hits(output, target))
            sizes.append(len(target))
            if on_batch is not None:
                on_batch(index, output, target)

    together(answer_all, world)
    return _metrics(losses, hits, sizes, world)


def _hits(output: Tensor, target: Tensor) -> Tensor:
    """Return how many targets are the first, and among the first five, logits of their row; int64 (2,)."""
    ranked = output.topk(min(5, output.shape[1]), dim=1).indices == target.unsqueeze(1)
    return torch.stack((ranked[:, 0].sum(), ranked.sum()))


def _metrics(losses: list[Tensor], hits: list[Tensor], sizes: list[int], world: World) -> dict[str, float]:
    """Return means over batches and processes, summed on the host, where float64 and integers are exact everywhere."""
    count = torch.tensor(sizes, dtype=torch.float64)
    loss = torch.stack(losses).cpu().double() @ count if losses else torch.zeros((), dtype=torch.float64)
    ranked = torch.stack(hits).cpu().sum(0) if hits else torch.zeros(2, dtype=torch.int64)
    loss_sum = float(sum_over_ranks(loss, world))
    top1, top5, total = sum_over_ranks(torch.cat((ranked, torch.tensor([sum(sizes)]))), world).tolist()
    return {
        'loss': loss_sum / max(total, 1),
        'top1': 100 * top1 / max(total, 1),
        'top5': 100 * top5 / max(total, 1),
        'count': total,
    }

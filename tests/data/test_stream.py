"""Streams go through timm's loader: the same images as from a data set with an index, and no start in mid-epoch."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.dataset import IterableImageDataset
from timm.data.mixup import FastCollateMixup

from timm_npu_irv2.data.augmentation import Augmentation
from timm_npu_irv2.data.pipeline import ImagePipeline
from timm_npu_irv2.data.stream import create_stream_loader
from timm_npu_irv2.distributed import World

from .endings import error_without_shared_memory

PIPELINE = ImagePipeline((3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.5), crop_pct=0.9)
IMAGES = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8))
          for seed in range(6)]


class Reader:
    """Six images in their order."""

    def __init__(self):
        self.epochs = []

    def __iter__(self):
        return iter(zip(IMAGES, range(6), strict=True))

    def __len__(self):
        return len(IMAGES)

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def loader(**given):
    return create_stream_loader(IterableImageDataset(None, reader=Reader()), PIPELINE, World(), batch_size=4, **given)


@pytest.mark.parametrize('use_prefetcher', [True, False])
def test_evaluation_yields_the_images_of_the_pipeline(use_prefetcher):
    expected = torch.stack([PIPELINE.transform(normalize=True)(image) for image in IMAGES])
    batches = list(loader(use_prefetcher=use_prefetcher))
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), expected)
    assert torch.cat([targets for _, targets in batches]).tolist() == list(range(6))


def test_training_mixes_until_mixup_is_switched_off():
    mixup = FastCollateMixup(mixup_alpha=1.0, label_smoothing=0, num_classes=6)
    stream = loader(augmentation=Augmentation(), mixup=mixup)
    assert stream.mixup_enabled and not all(hard(targets) for _, targets in stream)
    stream.mixup_enabled = False
    assert all(hard(targets) for _, targets in stream)


def hard(targets: torch.Tensor) -> bool:
    return bool((targets.max(1).values == 1).all())


def test_a_stream_says_that_it_starts_an_epoch_again(caplog):
    stream = loader()
    stream.set_epoch(3, start_batch=2)
    assert stream.samples.reader.epochs == [3] and 'epoch 3 starts again' in caplog.text


def test_a_batch_for_which_there_is_no_shared_memory_is_an_error_of_one_line():
    found = error_without_shared_memory(loader(num_workers=1))
    assert len(found) == 1 and found[0].startswith('a worker cannot send a batch: '), found

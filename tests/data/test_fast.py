"""The input backend 'fast' draws and shows what timm's transforms do, up to rounding, and reads what Pillow reads."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from timm_npu_irv2.data import fast
from timm_npu_irv2.data.decode import read_image
from timm_npu_irv2.data.pipeline import ImagePipeline
from timm_npu_irv2.data.samplers import reseed

from ..pictures import write_classes
from .test_loader import CONFIG, epoch_of, equal, options, train_loader
from .test_odd_files import FILES


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with the smooth parts, edges and some of the noise of a photograph."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize((width, height), 3)
    noise = generator.normal(0, 6, (height, width, 3))
    pixels = np.asarray(coarse) + noise
    pixels[height // 3:height // 2, width // 4:width // 2] = generator.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('images')
    write_classes(root / 'train', 3, 7)
    return root


SIZES = (468, 401), (160, 200), (500, 90), (299, 299), (99, 640)
PICTURES = [picture(*size, seed) for seed, size in enumerate(SIZES)]
TRANSFORMS = {
    'training': dict(is_training=True, interpolation='random'),
    'strong colours': dict(is_training=True, interpolation='bilinear', color_jitter=1.0, vflip=0.5),
    'no augmentation': dict(is_training=True, no_aug=True, interpolation='bicubic'),
    'randaugment': dict(is_training=True, auto_augment='rand-m9-mstd0.5-inc1', interpolation='bicubic'),
    'jitter sometimes, grey sometimes': dict(is_training=True, color_jitter_prob=0.5, grayscale_prob=0.5),
    'another resize method': dict(is_training=True, interpolation='lanczos'),
    'resized with its ratio': dict(is_training=True, train_crop_mode='rkrc', interpolation='bicubic'),
    'evaluation': dict(interpolation='bicubic', crop_pct=0.875),
    'squashed': dict(interpolation='bilinear', crop_mode='squash'),
    'border': dict(interpolation='bicubic', crop_mode='border'),
}


@pytest.mark.parametrize('given', TRANSFORMS.values(), ids=TRANSFORMS)
def test_same_draws_same_pixels_up_to_rounding(given):
    transform = create_transform((3, 99, 99), use_prefetcher=True, **given)
    quick, differences = fast.FastTransform(transform), []
    for seed in range(8):
        for image in PICTURES:
            reseed(seed)
            expected = np.asarray(transform(image)).astype(int)
            after = torch.rand(1), random.random()
            reseed(seed)
            found = quick(np.asarray(image).copy())
            assert (torch.rand(1), random.random()) == after
            assert found.shape == expected.shape and found.dtype == torch.uint8 and found.is_contiguous()
            differences.append(np.abs(found.numpy() - expected).ravel())
    assert np.percentile(np.concatenate(differences), 99) <= 1
    assert np.concatenate(differences).mean() < 0.1


def test_normalised_in_the_transform():
    transform = create_transform((3, 99, 99), is_training=True, re_prob=1.0)
    quick = fast.FastTransform(transform)
    reseed(1)
    expected = transform(PICTURES[0])
    reseed(1)
    found = quick(PICTURES[0])
    assert found.dtype == torch.float32 and (found - expected).abs().mean() < 0.1 / 255 / 0.225


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('damage', ['none', 'cut', 'changed'])
def test_reads_what_pillow_reads(name, damage):
    content = FILES[name]
    if damage == 'cut':
        content = content[:len(content) * 3 // 5]
    elif damage == 'changed':
        middle = len(content) // 2
        content = content[:middle] + bytes(255 - byte for byte in content[middle:middle + 9]) + content[middle + 9:]
    try:
        expected = np.asarray(read_image(io.BytesIO(content), 'RGB'))
    except Exception:
        with pytest.raises(Exception):  # noqa: B017 - as many types as there are formats
            fast.read_array(io.BytesIO(content))
        return
    assert np.array_equal(fast.read_array(io.BytesIO(content)), expected)


@pytest.mark.parametrize('words', [[], ['--aug-splits', '3'], ['--no-prefetcher'], ['--aa', 'rand-m9']], ids=str)
def test_workers_and_restart_change_nothing(folder, words):
    words = ['--input-backend', 'fast', *words]
    expected = epoch_of(options(folder, *words), 1)
    assert equal(epoch_of(options(folder, *words, '-j', '2'), 1), expected)
    assert equal(epoch_of(options(folder, *words, '-j', '1'), 1, start=2), expected[2:])
    slow = epoch_of(options(folder, *words, '--input-backend', 'pillow'), 1)
    for (images, targets), (others, same) in zip(expected, slow, strict=True):
        assert torch.equal(targets, same)
        assert (images - others).abs().mean() < 0.02  # of a standard deviation: noise, the worst case


def test_batches_of_workers_are_in_shared_memory(folder):
    loader = train_loader(options(folder, '--input-backend', 'fast', '-j', '1'))
    loader.set_epoch(0)
    batch = next(iter(loader._loader))
    assert batch[0].is_shared() and batch[0].is_contiguous() and batch[0].dtype == torch.uint8


def test_another_image_mode_uses_pillow(folder, caplog):
    pipeline = ImagePipeline.from_config({**CONFIG, 'input_size': (1, 75, 75)})
    batches = {}
    for backend in 'fast', 'pillow':
        loader = train_loader(options(folder, '--input-backend', backend), pipeline=pipeline)
        loader.set_epoch(0)
        batches[backend] = list(loader)
    assert equal(batches['fast'], batches['pillow'])
    assert "is for RGB images, not 'L': using pillow" in caplog.text

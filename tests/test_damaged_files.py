"""Files with flipped bytes, or cut off: refused in one line, or read as they were; no traceback, no hang."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from tests.kills import differences
from timm_npu_irv2 import serialization
from timm_npu_irv2.data.samplers import Batch, SampleKey
from timm_npu_irv2.data.worker import BatchDataset
from timm_npu_irv2.errors import UserError

FILES = 500  # of each kind; 2000 in all


def damaged(content: bytes, choose: random.Random) -> bytes:
    """One to three bytes changed, or the end cut off. Half of the changes are near an end, where the headers are."""
    if choose.random() < 0.25:
        return content[:choose.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(choose.randint(1, 3)):
        near = choose.choice((choose.randrange(600), -1 - choose.randrange(600), choose.randrange(len(content)),
                              choose.randrange(len(content))))
        changed[near] ^= choose.randrange(1, 256)
    return bytes(changed)


def fuzz(path: Path, load: Callable[[Path], Any], same: Callable[[Any], bool]) -> int:
    """Damage the file again and again; how often it was refused, after checking that it was else read as before."""
    content, choose, refused = path.read_bytes(), random.Random(0), 0
    assert same(load(path))
    for _ in range(FILES):
        path.write_bytes(damaged(content, choose))
        try:
            loaded = load(path)
        except UserError as error:
            assert '\n' not in str(error), str(error)
            refused += 1
        else:
            assert same(loaded)
    return refused


@pytest.fixture
def state_dict() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {f'layer{i}.weight': torch.randn(3, i + 1, 5, generator=generator) for i in range(20)}
    return {**state, 'bn.num_batches_tracked': torch.tensor(7), 'half': torch.ones(9, dtype=torch.bfloat16)}


def test_checkpoints(tmp_path, state_dict):
    path, state = tmp_path / 'last.pth.tar', {'state_dict': state_dict, 'epoch': 3, 'arch': 'x' * 50}
    serialization.write_checkpoint(state, path)
    assert fuzz(path, serialization.read_checkpoint, lambda loaded: not differences(loaded, state)) > 0.7 * FILES


@pytest.mark.parametrize('name', ['model.safetensors', 'model.pth'])
def test_weights(tmp_path, state_dict, name):
    serialization.save_weights(state_dict, tmp_path / name)
    refused = fuzz(tmp_path / name, serialization.load_weights, lambda loaded: not differences(loaded, state_dict))
    assert refused > 0.7 * FILES


def test_images(tmp_path):
    """JPEG has no checksum, so a change may be a change of the picture; what it says it holds must be there, though."""
    path = tmp_path / 'a.jpg'
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((150, 180)).save(path)

    class Samples(list):
        def __getitem__(self, index: int):
            return Image.open(path), 0

    def load(path: Path) -> Image.Image:
        dataset = BatchDataset(Samples([0]), [lambda image: image], 'RGB', lambda samples: ([i for i, _ in samples], 0))
        return dataset[Batch([SampleKey(0, 0)])].images[0]

    assert fuzz(path, load, lambda image: image.mode == 'RGB' and np.asarray(image).shape[2] == 3) > 0.2 * FILES


@pytest.mark.parametrize('length', [2**63, 2**40, 10_000])
def test_a_safetensors_header_larger_than_its_file_is_refused(tmp_path, length):
    path = tmp_path / 'model.safetensors'
    path.write_bytes(length.to_bytes(8, 'little') + b'{}' * 100)
    with pytest.raises(UserError, match=r'model\.safetensors cannot be read as a checkpoint'):
        serialization.load_weights(path)


def test_safetensors_of_others_have_no_checksum_and_are_read(tmp_path, state_dict):
    safetensors.torch.save_file(state_dict, tmp_path / 'model.safetensors')
    assert not differences(serialization.load_weights(tmp_path / 'model.safetensors'), state_dict)


@pytest.mark.parametrize('average', [torch.ones(0), torch.ones(2), 'x', [1]], ids=str)
def test_an_average_that_is_no_state_dict_is_refused(tmp_path, state_dict, average):
    torch.save({'state_dict': state_dict, 'state_dict_ema': average}, tmp_path / 'x.pth')
    with pytest.raises(UserError):
        serialization.read_checkpoint(tmp_path / 'x.pth')

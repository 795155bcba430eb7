"""benchmark.py growth, and the memory that listed images take: counted, not timed."""

import gc
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import timm

from timm_npu_irv2.benchmarks.growth import make_images
from timm_npu_irv2.data.folder import FolderReader
from timm_npu_irv2.data.loader import create_train_sampler
from timm_npu_irv2.distributed import World

SCRIPT = Path(__file__).parents[2] / 'train_scripts' / 'benchmark.py'


def grow(tmp_path: Path, *words: str) -> dict:
    command = [sys.executable, SCRIPT, 'growth', *words, '--rounds', '1', '--json', tmp_path / 'growth.json']
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads((tmp_path / 'growth.json').read_text())


def test_growth_measures_images_processes_and_classes(tmp_path):
    folder = tmp_path / 'here'
    folder.mkdir()
    found = grow(tmp_path, '--images', '30', '200', '--processes', '1', '2', '--classes', '10', '--steps', '2',
                 '--folder', str(folder))
    assert list(found['rows']) == ['30', '200'] and not list(folder.iterdir())
    columns, rows = found['processes']['columns'], found['processes']['rows']
    one, two = (dict(zip(columns, row, strict=True)) for row in rows.values())
    model = timm.create_model('test_resnet', num_classes=10)
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    assert one['numbers'] == one['collectives'] == 0
    assert numbers <= two['numbers'] <= numbers + 10 and two['collectives'] >= 3  # gradients, statistics, stop


def test_growth_without_room_is_one_line(tmp_path):
    result = subprocess.run([sys.executable, SCRIPT, 'growth', '--images', '10', '--processes', '--folder',
                             tmp_path / 'none'], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.count('\n') == 1 and '--folder' in result.stderr


def bytes_of(folder: Path, count: int) -> tuple[int, int]:
    """Bytes that a listing and an order of its images hold, and the most they took."""
    make_images(folder, count)
    gc.collect()
    tracemalloc.start()
    reader = FolderReader(folder / 'train')
    batches = iter(create_train_sampler(len(reader), World(), [8]))
    next(batches)
    figures = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return figures


def test_the_memory_of_listed_images_grows_with_their_names_alone(tmp_path):
    few, many = bytes_of(tmp_path / 'few', 10**4), bytes_of(tmp_path / 'many', 10**5)
    held, most = ((more - less) / (10**5 - 10**4) for less, more in zip(few, many, strict=True))
    name = len('n00000123/n00000123_99.png')
    assert held < name + 20 and most < name + 50, 'bytes an image'


@pytest.mark.long
def test_ten_million_images_take_two_gigabytes_at_most(tmp_path):
    found = grow(tmp_path, '--images', str(10**7), '--processes', '--folder', str(tmp_path))
    row = dict(zip(found['columns'], found['rows'][str(10**7)], strict=True))
    assert row['main MB'] <= 2000 and row['shared out MB'] <= 200 + 100 * 10**7 / 1e6, row

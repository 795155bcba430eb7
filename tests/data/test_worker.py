"""Images that are damaged, dangerous or unusual: right, or stopped at, or skipped and told; never silently another."""

import gc
import io
import multiprocessing
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_npu_irv2.data.decode import to_pil_mode
from timm_npu_irv2.data.pipeline import ImagePipeline
from timm_npu_irv2.distributed import World
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.training.loaders import build_eval_loader, build_train_loader
from timm_npu_irv2.training.options import parse_args

from .endings import error_of, error_without_shared_memory

CONFIG = {'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'interpolation': 'bilinear',
          'crop_pct': 1.0, 'crop_mode': 'center'}
PIPELINE = ImagePipeline.from_config(CONFIG)


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def photograph(size: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 60000 × 60000."""
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))
    header = struct.pack('>IIBBBBB', 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(999))) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + chunks


BAD = {
    'truncated.jpg': encoded(photograph(), 'JPEG')[:-700],
    'empty.jpg': b'',
    'text.jpg': b'this is no image\n',
    'bomb.png': bomb(),
    'float.png': encoded(Image.fromarray(np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)), 'TIFF'),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Eight images in two classes, in train and in val."""
    for split in ('train', 'val'):
        for index in range(8):
            path = tmp_path / split / f'class{index % 2}' / f'{index}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(seed=index).save(path)
    return tmp_path


def options(folder: Path, *words: str):
    return parse_args(['--data-dir', str(folder), '-b', '4', '-j', '0', '--no-aug', *words])


def loaders(args):
    train = build_train_loader(args, PIPELINE, World(), num_classes=2, batch_size=args.batch_size)
    return train, build_eval_loader(args, PIPELINE, World(), split='val', num_classes=2, train_loader=train,
                                    batch_size=args.validation_batch_size or args.batch_size)


@pytest.mark.parametrize('name', BAD)
@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_bad_image_stops_the_run_with_its_name(folder, split, name):
    path = folder / split / 'class1' / name
    path.write_bytes(BAD[name])
    loader = loaders(options(folder, '--epoch-repeats', '2'))[split == 'val']
    with pytest.raises(UserError, match=rf'^image {path} cannot be read: [^\n]+$'):
        list(loader)


@pytest.mark.parametrize('workers', ['0', '2'])
def test_skipped_images_are_named_once_and_leave_the_evaluation(folder, caplog, workers):
    for name, content in BAD.items():
        (folder / 'val' / 'class1' / name).write_bytes(content)
    _, loader = loaders(options(folder, '--on-bad-image', 'skip', '-j', workers, '-vb', '3'))
    for _ in range(2):
        targets = torch.cat([target for _, target in loader])
    assert targets.bincount().tolist() == [4, 4] and len(loader.indices) == 8
    assert {Path(name).name for name in loader.bad_images} == set(BAD)
    assert [caplog.text.count(f'{name}, which cannot be read') for name in BAD] == [1] * len(BAD)


def test_a_batch_of_bad_images_alone_is_left_out(folder):
    for path in (folder / 'val' / 'class0').iterdir():
        path.write_bytes(b'')
    _, loader = loaders(options(folder, '--on-bad-image', 'skip', '-vb', '2'))
    assert [len(target) for _, target in loader] == [2, 2]


def test_in_training_the_next_image_takes_the_place_with_its_own_class(folder):
    before = dict(enumerate(zip(*(torch.cat(part) for part in zip(*ordered(folder), strict=True)), strict=True)))
    bad = folder / 'train' / 'class0' / '6.png'  # the last of its class: the next is of the other
    bad.write_bytes(b'')
    train, _ = loaders(options(folder, '--on-bad-image', 'skip'))
    images, targets = (torch.cat(part) for part in zip(*train, strict=True))
    assert len(targets) == 8 and targets.sum() == 5
    known = [image for image, _ in before.values()]
    for image, target in zip(images, targets, strict=True):
        index = next(i for i, other in enumerate(known) if torch.equal(image, other))
        assert before[index][1] == target
    assert list(train.bad_images) == [str(bad)]


def ordered(folder: Path) -> list:
    return list(loaders(options(folder))[0])


def test_images_none_of_which_can_be_read_are_no_endless_loop(folder):
    for path in (folder / 'train').rglob('*.png'):
        path.write_bytes(b'')
    train, _ = loaders(options(folder, '--on-bad-image', 'skip'))
    with pytest.raises(UserError, match='none of 8 images can be read'):
        list(train)


def test_sixteen_bits_of_grey_keep_their_upper_eight(tmp_path):
    grey = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)
    Image.fromarray(grey).save(tmp_path / 'a.png')
    for mode in ('RGB', 'L'):
        image = to_pil_mode(Image.open(tmp_path / 'a.png'), mode)
        assert image.mode == mode
        assert np.array_equal(np.asarray(image.getchannel(0)), grey >> 8)


def test_the_four_colours_of_print_become_three(tmp_path):
    image = Image.new('RGB', (32, 32), (200, 30, 60))
    image.convert('CMYK').save(tmp_path / 'a.jpg', quality=100)
    pixels = np.asarray(to_pil_mode(Image.open(tmp_path / 'a.jpg'), 'RGB')).astype(int)
    assert np.abs(pixels - (200, 30, 60)).max() <= 4


def test_a_batch_for_which_there_is_no_shared_memory_is_an_error_of_one_line(folder):
    """A container has 64 MiB unless it is told otherwise. A limit on the size of files stands for that."""
    _, loader = loaders(options(folder, '-j', '1'))
    found = error_without_shared_memory(loader)
    loader.close()
    assert len(found) == 1 and '\n' not in found[0], found
    assert found[0].startswith('a worker cannot send a batch: ') and 'docker run --shm-size' in found[0]


def test_workers_that_cannot_all_start_end_with_one_line(folder, capfd):
    _, loader = loaders(options(folder, '-j', '8'))
    others = set(multiprocessing.active_children())  # of earlier tests
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(entry.name) for entry in Path('/proc/self/fd').iterdir()}
    free = [os.open(os.devnull, os.O_RDONLY) for _ in range(max(used) + 13 - len(used))]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, limits[1]))
    for descriptor in free[-12:]:  # some can start
        os.close(descriptor)
    try:
        found = error_of(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in free[:-12]:
            os.close(descriptor)
    assert len(found) == 1 and found[0].startswith('--workers 8 cannot be started: '), found
    assert 'ulimit -n' in found[0]
    stop_at = time.monotonic() + 6000
    while set(multiprocessing.active_children()) - others:  # a worker may be on its way out
        assert time.monotonic() < stop_at
        time.sleep(0.1)
    gc.collect()  # torch's destructor
    assert 'Traceback' not in capfd.readouterr().err


@pytest.mark.parametrize('workers', ['0', '1'])
def test_a_name_of_several_lines_is_told_whole(folder, workers):
    path = folder / 'val' / 'class0' / 'a\nb.png'
    path.write_bytes(b'')
    _, loader = loaders(options(folder, '-j', workers))
    assert error_of(loader) == [f'image {path} cannot be read: it is empty, or in no format that Pillow reads']


def test_an_empty_class_folder_is_named(folder):
    (folder / 'train' / 'class0a').mkdir()
    (folder / 'train' / '.hidden').mkdir()
    with pytest.raises(UserError, match=r"class folder '.*/train/class0a' holds no image: fill it"):
        loaders(options(folder))


def test_a_worker_whose_main_process_was_killed_before_it_started_ends():
    """torch's watchdog compares with the parent it finds; the sockets that it inherited would hold up other ranks."""
    code = """
import os, time
from timm_npu_irv2.data.worker import start_worker
main = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == main:
    time.sleep(0.01)
print('started', flush=True)
start_worker(0, main_process=main)
time.sleep(600)
print('still there', flush=True)
"""
    done = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == 'started\n'  # the worker has it, too, so it ended


@pytest.mark.parametrize('killed', [True, False])
def test_a_connection_that_breaks_is_reported_unless_the_main_process_was_killed(killed):
    """A thread that hands out the worker's tensors meets the end of the main process before the watchdog does."""
    code = f"""
import os, signal, sys, time
from timm_npu_irv2.data.worker import start_worker
main = os.getpid()
reader, writer = os.pipe()
if os.fork():
    if {killed}:
        os.kill(main, signal.SIGKILL)
    os._exit(0 if os.wait()[1] == 0 else 1)
os.close(writer)
start_worker(0, main_process=main)
try:
    if {killed}:
        os.read(reader, 1)  # until the main process is gone
    raise ConnectionResetError
except ConnectionResetError:
    sys.excepthook(*sys.exc_info())
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == (-signal.SIGKILL if killed else 0)
    assert ('ConnectionResetError' in done.stderr) is not killed, done.stderr


def test_workers_load_where_python_starts_processes_by_a_server(folder):
    """As Python 3.14 does by default: the server, not the main process, would be the parent of the workers."""
    own = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method('forkserver', force=True)
    try:
        train, _ = loaders(options(folder, '--workers', '1', '--input-backend', 'fast'))
        train.set_epoch(0)
        images, _ = next(iter(train))
        time.sleep(1.5)  # the watchdog of a worker looks once a second
        assert sum(len(batch) for batch, _ in train) and torch.isfinite(images).all()
        train.close()
    finally:
        multiprocessing.set_start_method(own, force=True)

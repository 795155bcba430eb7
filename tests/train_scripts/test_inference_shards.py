"""inference.py writes its results as they come: any number of processes, killed at any time, each image once."""

import contextlib
import csv
import fcntl
import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from timm_npu_irv2.cli.script import run_script
from timm_npu_irv2.cli.shards import open_shards, settings_of
from timm_npu_irv2.errors import UserError
from train_scripts import inference

SCRIPTS = Path(__file__).parents[2] / 'train_scripts'
ROOT = SCRIPTS.parent
WITNESS = ROOT / 'tests' / 'witness' / 'killed_in_shard.py'
MODEL = ['--model', 'test_resnet', '--num-classes', '5', '--img-size', '32', '--device', 'cpu', '-b', '16', '-j', '1']
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(
    filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=5)
    with torch.no_grad():
        model.fc.weight.normal_(std=2)
    path = tmp_path_factory.mktemp('weights') / 'weights.pth'
    torch.save({'state_dict': model.state_dict()}, path)
    return path


def write_tars(folder: Path, count: int, each: int = 100) -> Path:
    """Write tar files of small images, whose names repeat from file to file, as WebDataset shards' may."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for start in range(0, count, each):
        with tarfile.open(folder / f'shard-{start // each:04}.tar', 'w') as archive:
            for number in range(min(each, count - start)):
                file = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, 'PNG')
                for ending, content in (('png', file.getvalue()), ('cls', b'1')):
                    member = tarfile.TarInfo(f'{number:06}.{ending}')
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


def command(*words: object, processes: int = 1, kill_at: int | None = None) -> list[str]:
    start = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)] if processes > 1 else []
    script = [SCRIPTS / 'inference.py'] if kill_at is None else [WITNESS, kill_at, SCRIPTS / 'inference.py']
    return [sys.executable, *map(str, [*start, *script, *words])]


def infer(*words: object) -> int:
    return run_script('inference.py', inference.main, list(map(str, words)))


def answers(folder: Path) -> dict[str, dict[str, str]]:
    """Return the rows of CSV shards by image, each of which has to be there once."""
    rows = [row for path in sorted(folder.glob('part-*.csv')) for row in csv.DictReader(path.open())]
    found = {row.pop('filename'): row for row in rows}
    assert len(found) == len(rows)
    return found


def started_shards(folder: Path) -> int:
    return len(list(folder.glob('part-*')))


def run_and_measure(folder: Path, *words: object, kill_at: int | None = None) -> int:
    """Run two processes, which are killed when there are ``kill_at`` shards; return rank 0's peak memory in kB."""
    process = subprocess.Popen(command(*words, '--results-dir', folder, processes=2, kill_at=kill_at), env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, peak_of_rank_0(process.pid))
        time.sleep(0.02)
    assert (process.returncode == 0) == (kill_at is None)
    return peak


def peak_of_rank_0(launcher: int) -> int:
    with contextlib.suppress(OSError):  # a process that ends meanwhile
        for child in Path(f'/proc/{launcher}/task/{launcher}/children').read_text().split():
            if b'\0RANK=0\0' in b'\0' + Path(f'/proc/{child}/environ').read_bytes():
                status = Path(f'/proc/{child}/status').read_text().split('VmHWM:')
                return int(status[1].split()[0]) if len(status) > 1 else 0
    return 0


def kill_twice(root: Path, checkpoint: Path, count: int, size: int) -> int:
    """Classify ``count`` images in two processes that are killed twice; return rank 0's peak memory."""
    images, folder = write_tars(root / f'{count} images', count, each=max(count // 100, 50)), root / f'{count} results'
    words = [images, *MODEL, '--checkpoint', checkpoint, '--results-format', 'csv', '--results-shards', size,
             '--resume']
    shards = -(-count // size)
    peaks = [run_and_measure(folder, *words, kill_at=shards // 4)]
    after_first = started_shards(folder)
    peaks.append(run_and_measure(folder, *words, kill_at=max(shards // 2, after_first + 1)))
    assert shards // 4 <= after_first < started_shards(folder) < shards  # both runs were killed in the middle
    peaks.append(run_and_measure(folder, *words))
    assert started_shards(folder) == shards and len(answers(folder)) == count
    assert not [path for path in folder.iterdir() if path.name.startswith('.')]  # nothing half-written is left
    return max(peaks)


def test_killed_twice_and_resumed_each_image_is_there_once(checkpoint, tmp_path):
    kill_twice(tmp_path, checkpoint, 1200, 10)
    found = answers(tmp_path / '1200 results')
    assert infer(tmp_path / '1200 images', *MODEL, '--checkpoint', checkpoint, '--results-dir', tmp_path / 'whole',
                 '--results-format', 'csv', '--results-shards', 5000) == 0
    expected = answers(tmp_path / 'whole')
    assert found.keys() == expected.keys() and len({row['prob'] for row in expected.values()}) > 600
    for name, row in expected.items():
        assert found[name]['label'] == row['label'] and float(found[name]['prob']) == pytest.approx(float(row['prob']))


@pytest.mark.long
def test_100000_images_killed_twice_in_the_memory_of_1000(checkpoint, tmp_path):
    small = run_and_measure(tmp_path / 'small', write_tars(tmp_path / 'few', 1000), *MODEL, '--checkpoint', checkpoint,
                            '--results-format', 'csv')
    large = kill_twice(tmp_path, checkpoint, 100_000, 1000)
    print(f'peak memory of the main process: {small / 1e3:.0f} MB for 1000 images, {large / 1e3:.0f} MB for 100000 '
          f'({large / small:.3f} ×); each image once')
    assert large <= 1.2 * small


# ------------------------------------------------------------------------------------------------------ one process


@pytest.fixture
def images(tmp_path) -> Path:
    return write_tars(tmp_path / 'images', 25, each=10)


@pytest.fixture
def run(images, checkpoint, tmp_path, capfd):
    """run(options…) -> the summary, and the last line of the log."""
    def start(*words: object, code: int = 0, data: object = images) -> tuple[dict, str]:
        assert infer(data, *MODEL, '--checkpoint', checkpoint, '--results-dir', tmp_path / 'out', *words) == code
        out, err = capfd.readouterr()
        return json.loads(out.split('--result\n')[1]) if code == 0 else {}, err.splitlines()[-1]

    return start


def test_shards_are_a_folder_of_parquet_with_one_schema(run, images, tmp_path):
    dataset = pytest.importorskip('pyarrow.dataset')
    with tarfile.open(images / 'bad.tar', 'w') as archive:
        for number in range(10):
            member = tarfile.TarInfo(f'{number}.png')
            member.size = 3
            archive.addfile(member, io.BytesIO(b'bad'))
    summary, line = run('--results-shards', 5, '--topk', 2, '--on-bad-image', 'skip')
    assert (summary['images'], summary['shards']) == (35, 7) and ' left' in line
    table = dataset.dataset(tmp_path / 'out').to_table().to_pylist()
    assert len(table) == 25 and len({row['filename'] for row in table}) == 25
    assert all(len(row['label']) == len(row['prob']) == 2 for row in table)
    empty = dataset.dataset(tmp_path / 'out' / 'part-00000000.parquet').to_table()
    assert empty.num_rows == 0 and empty.schema == dataset.dataset(tmp_path / 'out' / 'part-00000006.parquet').schema


def test_places_of_images(run, images, tmp_path):
    names = [f'shard-000{number}.tar' for number in range(3)]
    for name in ('a ü.png', 'b.JPEG'):
        Image.new('RGB', (16, 16)).save(tmp_path / name)
    (tmp_path / 'list.txt').write_bytes('\ufeffa ü.png\r\n\r\nimages\r\nb.JPEG\r\n'.encode())
    for place, count in (
            (images / 'shard-{0000..0002}.tar', 25), (images / names[2], 5), (tmp_path / 'list.txt', 27),
    ):
        summary, _ = run('--results-dir', tmp_path / str(count), '--results-shards', '100', '--results-format', 'csv',
                         data=place)
        assert summary['images'] == count == len(answers(tmp_path / str(count)))
    assert {Path(name).name for name in answers(tmp_path / '27')} >= {'a ü.png', 'b.JPEG'}


def test_what_is_there_is_not_computed_again_or_overwritten(run, images, tmp_path):
    options = ['--results-shards', 10, '--results-format', 'csv']
    run(*options)
    first = tmp_path / 'out' / 'part-00000000.csv'
    first.write_text(first.read_text().replace('000000.png', 'mark.png'))
    _, line = run(*options, code=2)
    assert 'has the results of an earlier run: go on with it with --resume' in line
    (tmp_path / 'out' / 'part-00000001.csv').unlink()
    run('--results-format', 'csv', '--resume')  # in shards as before
    assert len(answers(tmp_path / 'out')) == 25 and 'mark.png' in first.read_text()
    for words, message in (
            (['--topk', 2], 'another topk'), (['--results-shards', 7], 'another shard-size'),
            (['--crop-pct', 1], 'another'), (['--model-dtype', 'bfloat16'], 'another model-dtype'),
    ):
        _, line = run('--results-format', 'csv', '--resume', *words, code=2)
        assert f'out was begun with {message}' in line
    (images / 'shard-0001.tar').rename(images / 'shard-0009.tar')
    assert 'other images' in run('--results-format', 'csv', '--resume', code=2)[1]
    (images / 'shard-0009.tar').unlink()
    assert '25 images, of which there are 15 now' in run('--results-format', 'csv', '--resume', code=2)[1]


@pytest.mark.parametrize(('words', 'message'), [
    (['--results-shards', '5', '--results-dir', ''], 'name a folder for them with --results-dir'),
    (['--resume', '--results-file', 'a.csv'], '--results-file is one file'),
    (['--resume', '--results-format', 'json'], 'shards have one of parquet, csv, json-record'),
    (['--resume', '--results-format', 'csv', '--picture', 'a.png'], '--picture needs all images'),
    (['--resume', '--results-format', 'csv', '--results-dir', '/proc/here'], 'cannot write /proc/here'),
])
def test_mistakes_are_told_in_a_line(run, words, message):
    _, line = run(*words, code=2)
    assert line.startswith('inference.py: error: ') and message in line


def test_a_full_disk_ends_the_run_in_a_line_and_a_resumed_one_completes_it(images, checkpoint, tmp_path):
    words = [images, *MODEL, '--checkpoint', checkpoint, '--results-format', 'csv', '--results-shards', '5',
             '--results-dir', tmp_path / 'out', '--output-type', 'logit', '--topk', '0']
    limited = ['bash', '-c', 'ulimit -f 1; trap "" XFSZ; exec "$@"', 'bash', *command(*words)]  # files of at most 1 kB
    done = subprocess.run(limited, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 2 and 'cannot write' in done.stderr.splitlines()[-1]
    assert infer(*words, '--resume') == 0
    assert len(answers(tmp_path / 'out')) == 25


@pytest.mark.parametrize('kind', ['csv', 'json-record', 'parquet'])
def test_a_name_that_is_not_utf_8_is_written(checkpoint, tmp_path, kind):
    """Linux allows any bytes in the name of a file; Python has them as surrogates, which UTF-8 cannot hold."""
    if kind == 'parquet':
        pytest.importorskip('pyarrow')
    folder = tmp_path / 'images'
    folder.mkdir()
    Image.new('RGB', (16, 16)).save(folder / os.fsdecode(b'caf\xe9.png'))
    assert infer(folder, *MODEL, '--checkpoint', checkpoint, '--results-dir', tmp_path / 'answers', '--resume',
                 '--results-format', kind) == 0
    (path,) = (tmp_path / 'answers').glob('part-*')
    if kind == 'parquet':
        text = str(importlib.import_module('pyarrow.parquet').read_table(path).to_pylist())
    else:
        text = path.read_text(encoding='utf-8')
    assert r'caf\udce9.png' in text.replace(r'\\', '\\')


def test_another_network_in_the_same_folder_is_another_run(tmp_path):
    folder = tmp_path / 'network'
    folder.mkdir()
    (folder / 'config.json').write_text('{}')
    (folder / 'model.safetensors').write_bytes(b'old')
    before = settings_of(Namespace(checkpoint=str(folder), topk=1, workers=1))
    assert settings_of(Namespace(checkpoint=str(folder), topk=1, workers=2)) == before
    (folder / 'model.safetensors').write_bytes(b'new')
    assert settings_of(Namespace(checkpoint=str(folder), topk=1, workers=1)) != before


def test_a_new_revision_of_a_published_model_is_another_run(images, tmp_path, capfd):
    folder = tmp_path / 'published'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps({'architecture': 'test_resnet', 'num_classes': 5}))
    model = timm.create_model('test_resnet', num_classes=5)
    words = ['--model', f'local-dir:{folder}', *MODEL[4:], '--results-dir', tmp_path / 'out', '--results-format', 'csv',
             '--results-shards', 10]
    safetensors.torch.save_file(model.state_dict(), folder / 'model.safetensors')
    assert infer(images, *words) == infer(images, *words, '--resume') == 0
    model.fc.bias.data += 1
    safetensors.torch.save_file(model.state_dict(), folder / 'model.safetensors')
    (tmp_path / 'out' / 'part-00000001.csv').unlink()
    assert infer(images, *words, '--resume') == 2
    assert 'out was begun with another checkpoint' in capfd.readouterr().err
    assert len(answers(tmp_path / 'out')) == 15


def test_processes_with_different_settings_write_nothing(tmp_path):
    with pytest.raises(UserError, match='rank 1 has another checkpoint than rank 0'):
        open_shards(tmp_path / 'out', 'csv', 5, 10, 'digest', [{'checkpoint': 'a'}, {'checkpoint': 'b'}], resume=False)
    assert not any(path.is_file() for path in tmp_path.rglob('*'))


def test_of_two_runs_that_begin_at_the_same_time_one_is_refused(tmp_path):
    """The second one waits while the first one looks for an earlier run and writes its own record."""
    options = dict(format='csv', size=5, images=10, digest='x', settings=[{}], resume=False)
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(open_shards, tmp_path, **options)
        wait([second], timeout=0.2)  # it comes to the folder meanwhile; if not, it is refused all the same
        (tmp_path / '_run.json').write_text('{}')
        os.close(folder)
        with pytest.raises(UserError, match='has the results of an earlier run'):
            second.result(300)

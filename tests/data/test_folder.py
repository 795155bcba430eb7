"""Images are found in folders and tar files alike, through links, and read by any number of threads."""

import io
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_npu_irv2.data.decode import read_image
from timm_npu_irv2.data.folder import find_images
from timm_npu_irv2.errors import UserError


def write(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    return path


def test_a_folder_and_its_tar_file_hold_the_same(tmp_path):
    root = tmp_path / 'data'
    for number in (10, 9, 1):
        write(root / 'cat' / f'{number}.png', number)
    write(root / 'Dog' / 'deep' / 'a.JPEG')
    write(root / '.hidden' / 'a.png')
    (root / 'cat' / 'notes.txt').write_text('no image')
    with tarfile.open(tmp_path / 'data.tar', 'w') as archive:
        archive.add(root, './')
    folder, tar = find_images(root), find_images(tmp_path / 'data.tar')
    assert [image.name for image in folder] == ['cat/1.png', 'cat/9.png', 'cat/10.png', 'Dog/deep/a.JPEG']
    assert [image.name for image in tar] == [image.name for image in folder]
    for one, other in zip(folder, tar, strict=True):
        assert one.open().read() == other.open().read() != b''


def test_a_tar_within_a_tar_is_a_folder(tmp_path):
    content = write(tmp_path / 'a.png').read_bytes()
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode='w') as archive:
        archive.add(tmp_path / 'a.png', 'a.png')
    with tarfile.open(tmp_path / 'outer.tar', 'w') as archive:
        member = tarfile.TarInfo('n01440764.tar')
        member.size = len(inner.getvalue())
        archive.addfile(member, io.BytesIO(inner.getvalue()))
    (image,) = find_images(tmp_path / 'outer.tar')
    assert image.name == 'n01440764/a.png' and image.open().read() == content


def test_links_are_followed_and_circles_end(tmp_path):
    root = tmp_path / 'data'
    write(tmp_path / 'elsewhere' / 'a.png')
    write(root / 'dog' / 'b.png')
    (root / 'cat').symlink_to(tmp_path / 'elsewhere')
    (root / 'dog' / 'circle').symlink_to(root)
    assert [image.name for image in find_images(root)] == ['cat/a.png', 'dog/b.png']


def test_a_link_to_itself_is_named(tmp_path):
    (tmp_path / 'dog').mkdir()
    (tmp_path / 'dog' / 'link').symlink_to('link')
    with pytest.raises(UserError, match=rf'^{tmp_path}/dog/link: Too many levels of symbolic links$'):
        list(find_images(str(tmp_path)))


def test_a_tar_file_holds_what_unpacking_it_gives(tmp_path, caplog):
    first, second = (write(tmp_path / f'{number}.png', number).read_bytes() for number in (1, 2))

    def add(name: str, content: bytes = b'', kind: bytes = tarfile.REGTYPE, target: str = '') -> None:
        member = tarfile.TarInfo(name)
        member.size, member.type, member.linkname = len(content), kind, target
        archive.addfile(member, io.BytesIO(content))

    with tarfile.open(tmp_path / 'data.tar', 'w') as archive:
        add('cat/a.png', first)
        add('cat/hard.png', kind=tarfile.LNKTYPE, target='./cat/a.png')
        add('dog/soft.png', kind=tarfile.SYMTYPE, target='../cat/hard.png')
        add('dog/lost.png', kind=tarfile.SYMTYPE, target='/elsewhere/a.png')
        add('cat/twice.png', first)
        add('cat/twice.png', second)
    found = {image.name: image.open().read() for image in find_images(tmp_path / 'data.tar')}
    assert found == {'cat/a.png': first, 'cat/hard.png': first, 'cat/twice.png': second, 'dog/soft.png': first}
    assert 'left out 1 links that lead to no image in it, such as dog/lost.png' in caplog.text


def test_tar_files_in_a_folder_are_read_if_asked_and_named_otherwise(tmp_path):
    write(tmp_path / 'a.jfif.png')
    for name in 'x', 'y':
        with tarfile.open(tmp_path / f'{name}.tar', 'w') as archive:
            archive.add(tmp_path / 'a.jfif.png', '0.png')
    (tmp_path / 'a.jfif.png').unlink()
    assert [image.path for image in find_images(tmp_path, tars=True)] == [f'{tmp_path}/{n}.tar/0.png' for n in 'xy']
    with pytest.raises(UserError, match='no images in this folder, but 2 tar files: name one of them, or use'):
        find_images(tmp_path)


def test_threads_read_one_tar_file_at_the_same_time(tmp_path):
    for number in range(40):
        write(tmp_path / 'data' / 'cat' / f'{number}.png', number)
    with tarfile.open(tmp_path / 'data.tar', 'w') as archive:
        archive.add(tmp_path / 'data', '.')
    images = list(find_images(tmp_path / 'data.tar')) * 5
    random.Random(0).shuffle(images)

    def right(image) -> bool:
        with image.open() as file:
            return file.read() == (tmp_path / 'data' / image.name).read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, images))


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('torn.tar', b'no tar', 'torn.tar'),
    ('nowhere.tar', None, 'No such file'),
    ('empty.tar', bytes(10240), 'no images'),
])
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        find_images(tmp_path / name)


@pytest.mark.parametrize('ending', ['png', 'pgm', 'tif', 'jp2'])
def test_sixteen_bits_of_grey_keep_their_upper_eight_in_every_format(tmp_path, ending):
    grey = np.random.default_rng(0).integers(0, 65536, (40, 50), dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / f'a.{ending}', **({'irreversible': False} if ending == 'jp2' else {}))
    for mode in 'L', 'RGB':
        assert np.array_equal(np.asarray(read_image(tmp_path / f'a.{ending}', mode).getchannel(0)), grey >> 8)

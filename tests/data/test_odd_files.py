"""Odd image files have the same pixels in training, evaluation, inference and calibration, in a folder and in a tar."""

import functools
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from timm.data.loader import fast_collate

from timm_npu_irv2.data.dataset import open_dataset
from timm_npu_irv2.data.folder import find_images
from timm_npu_irv2.data.image_files import decode_stream, find_files
from timm_npu_irv2.data.loader import create_eval_loader
from timm_npu_irv2.data.pipeline import ImagePipeline
from timm_npu_irv2.data.samplers import Batch, SampleKey
from timm_npu_irv2.data.worker import BatchDataset
from timm_npu_irv2.deploy import InferenceNetwork, Predictor
from timm_npu_irv2.deploy.quantization import ModelInputs
from timm_npu_irv2.distributed import World
from timm_npu_irv2.errors import UserError

RANDOM = np.random.default_rng(0)
RGB = Image.fromarray(RANDOM.integers(0, 256, (40, 50, 3), dtype=np.uint8))
RGBA = Image.fromarray(RANDOM.integers(0, 256, (40, 50, 4), dtype=np.uint8))
GREY = Image.fromarray(RANDOM.integers(0, 65536, (40, 50), dtype=np.uint16))
LA = RGBA.convert('LA')
PALETTE = RGB.quantize(64)
CMYK = Image.fromarray(RANDOM.integers(0, 256, (40, 50, 4), dtype=np.uint8), 'CMYK')


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    if options.get('save_all'):
        options['append_images'] = [image.rotate(90), image.rotate(180)]
    image.copy().save(file, kind, **options)  # Pillow's encoders leave settings behind in an image
    return file.getvalue()


def transparent(kind: str) -> bytes:
    return encoded(PALETTE, kind, transparency=bytes(range(64)) if kind == 'PNG' else 3)


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
PGM = b'P5 # a comment\n50 40\n65535\n' + np.asarray(GREY).astype('>u2').tobytes()
FILES = {
    **{f'exif{turn}.jpg': encoded(RGB, 'JPEG', exif=exif(turn)) for turn in range(1, 9)},
    'exif6.png': encoded(RGB, 'PNG', exif=exif(6)),
    'plain.jpg': encoded(RGB, 'JPEG'),
    'progressive.jpg': encoded(RGB, 'JPEG', progressive=True),
    'subsampled.jpg': encoded(RGB, 'JPEG', subsampling=2, quality=20),
    'full.jpg': encoded(RGB, 'JPEG', subsampling=0),
    'grey.jpg': encoded(RGB.convert('L'), 'JPEG'),
    'cmyk.jpg': encoded(CMYK, 'JPEG'),
    'cmyk.tif': encoded(CMYK, 'TIFF'),
    'ycbcr.tif': encoded(RGB.convert('YCbCr'), 'TIFF'),
    'lab.tif': encoded(Image.fromarray(np.asarray(RGB), 'LAB'), 'TIFF'),
    'icc.jpg': encoded(RGB, 'JPEG', icc_profile=PROFILE),
    'icc.png': encoded(RGB, 'PNG', icc_profile=PROFILE),
    'plain.png': encoded(RGB, 'PNG'),
    'alpha.png': encoded(RGBA, 'PNG'),
    'la.png': encoded(LA, 'PNG'),
    'grey.png': encoded(RGB.convert('L'), 'PNG'),
    'transparent grey.png': encoded(RGB.convert('L'), 'PNG', transparency=7),
    'transparent rgb.png': encoded(RGB, 'PNG', transparency=(1, 2, 3)),
    'one bit.png': encoded(RGB.convert('1'), 'PNG'),
    'two bits.png': encoded(RGB.quantize(4), 'PNG', bits=2),
    'four bits.png': encoded(RGB.quantize(16), 'PNG', bits=4),
    'palette.png': encoded(PALETTE, 'PNG'),
    'palette with alpha.png': transparent('PNG'),
    '16.png': encoded(GREY, 'PNG'),
    '16.tif': encoded(GREY, 'TIFF'),
    '16.pgm': PGM,
    '16.jp2': encoded(GREY, 'JPEG2000'),
    '8.pgm': encoded(RGB.convert('L'), 'PPM'),
    'text.pgm': b'P2\n3 2\n255\n0 1 2\n253 254 255\n',
    'bits.pbm': encoded(RGB.convert('1'), 'PPM'),
    'colour.ppm': encoded(RGB, 'PPM'),
    'colour.jp2': encoded(RGB, 'JPEG2000'),
    'alpha.jp2': encoded(RGBA, 'JPEG2000'),
    'still.gif': encoded(PALETTE, 'GIF'),
    'transparent.gif': transparent('GIF'),
    'animated.gif': encoded(RGB, 'GIF', save_all=True),
    'animated.png': encoded(RGB, 'PNG', save_all=True),
    'animated.webp': encoded(RGB, 'WEBP', lossless=True, save_all=True),
    'lossy.webp': encoded(RGB, 'WEBP'),
    'alpha.webp': encoded(RGBA, 'WEBP', lossless=True),
    'several.mpo': encoded(RGB, 'MPO', save_all=True),
    'pages.tif': encoded(RGB, 'TIFF', save_all=True),
    'packed.tif': encoded(RGB, 'TIFF', compression='tiff_lzw'),
    'plain.bmp': encoded(RGB, 'BMP'),
    'palette.bmp': encoded(PALETTE, 'BMP'),
    '1x1.png': encoded(RGB.crop((0, 0, 1, 1)), 'PNG'),
    '400x2.png': encoded(RGB.resize((400, 2)), 'PNG'),
    '2x400.jpg': encoded(RGB.resize((2, 400)), 'JPEG'),
    'garbage behind.jpg': encoded(RGB, 'JPEG') + bytes(range(256)),
    'garbage behind.png': encoded(RGB, 'PNG') + b'garbage',
    'a png.jpg': encoded(RGB, 'PNG'),
    'a jpeg.png': encoded(RGB, 'JPEG'),
    'UPPER.JPG': encoded(RGB, 'JPEG'),
}
BAD = {
    'torn.jpg': encoded(RGB, 'JPEG')[:-300],
    'empty.png': b'',
    'text.png': b'no image',
    'float.tif': encoded(Image.fromarray(np.ones((4, 4), np.float32)), 'TIFF'),
    '32 bits.tif': encoded(Image.fromarray(np.ones((4, 4), np.int32)), 'TIFF'),
}
CONFIG = {'input_size': (3, 32, 32), 'mean': (0.0,), 'std': (1 / 255,), 'interpolation': 'bicubic', 'crop_pct': 0.9}


def config(mode: str) -> dict:
    return {**CONFIG, 'input_size': (len(Image.new(mode, (1, 1)).getbands()), 32, 32), 'input_img_mode': mode}


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('odd') / 'val'
    for name, content in FILES.items():
        (root / 'odd').mkdir(parents=True, exist_ok=True)
        (root / 'odd' / name).write_bytes(content)
    with tarfile.open(root.with_name('odd.tar'), 'w') as archive:
        archive.add(root, '.')
    return root


def of_evaluation(root: Path, pipeline: ImagePipeline, **options) -> dict[str, torch.Tensor]:
    dataset = open_dataset('', str(root), 'validation', input_img_mode=pipeline.input_img_mode)
    loader = create_eval_loader(dataset, pipeline, World(), batch_size=7, **options)
    images = torch.cat([images for images, _ in loader]).round().to(torch.uint8)
    return dict(zip((dataset.filename(index, basename=True) for index in loader.indices), images, strict=True))


def of_training(root: Path, pipeline: ImagePipeline, **options) -> dict[str, torch.Tensor]:
    dataset = open_dataset('', str(root), 'validation', input_img_mode=pipeline.input_img_mode)
    batches = BatchDataset(dataset, [pipeline.transform()], pipeline.input_img_mode, fast_collate, seed=1, **options)
    return {dataset.filename(index, basename=True): batches[Batch([SampleKey(index, 0)])].images[0]
            for index in range(len(dataset))}


def of_inference(root: Path, pipeline: ImagePipeline) -> dict[str, torch.Tensor]:
    images = find_files([str(root)], pipeline.input_img_mode)
    return {images.name(index): torch.as_tensor(pipeline.transform()(images[index])) for index in range(len(images))}


def of_calibration(root: Path, pipeline: ImagePipeline, **options) -> dict[str, torch.Tensor]:
    inputs = ModelInputs(root, {**pipeline.to_config(), 'uint8': True}, **options)
    names = [image.name.rpartition('/')[2] for image, _ in inputs.samples]
    return dict(zip(names, (torch.from_numpy(image[0]) for image, _ in inputs), strict=not options))


class Recorder(torch.nn.Module):
    """A network that keeps the images that it is given."""

    def __init__(self):
        super().__init__()
        self.images: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images += images.clone()
        return torch.zeros(len(images), 2)


@functools.cache
def deployed(channels: int) -> InferenceNetwork:
    return InferenceNetwork(2, channels)


def of_predictor(root: Path, pipeline: ImagePipeline) -> dict[str, torch.Tensor]:
    network, recorder, images = deployed(pipeline.input_size[0]), Recorder(), find_images(root)
    network.pretrained_cfg = pipeline.to_config()
    files = [image.path if image.offset < 0 else image.open().read() for image in images]
    with Predictor(network, topk=1, compiled=recorder) as predictor:
        predictor.predict(files)
    return dict(zip((image.name.rpartition('/')[2] for image in images), recorder.images, strict=True))


@pytest.mark.parametrize('mode', ['RGB', 'L', 'RGBA', 'YCbCr'])
@pytest.mark.parametrize('kind', ['folder', 'tar'])
@pytest.mark.filterwarnings('ignore')
def test_all_readers_have_the_same_pixels(folder, mode, kind):
    root = folder if kind == 'folder' else folder.with_name('odd.tar')
    pipeline = ImagePipeline.from_config(config(mode))
    expected = of_evaluation(folder, pipeline)
    assert expected.keys() == FILES.keys() and len(FILES) >= 54
    for reader in of_evaluation, of_training, of_inference, of_calibration, of_predictor:
        found = reader(root, pipeline)
        assert found.keys() == expected.keys()
        assert [name for name in FILES if not torch.equal(found[name], expected[name])] == []


def test_they_are_the_pixels_that_pillow_reads(folder):
    found = of_evaluation(folder, ImagePipeline.from_config(config('RGB')))
    transform = ImagePipeline.from_config(config('RGB')).transform()
    for name in set(FILES) - {'16.png', '16.tif', '16.pgm', '16.jp2'}:
        image = Image.open(io.BytesIO(FILES[name])).convert('RGB')
        assert torch.equal(found[name], torch.as_tensor(transform(image))), name
    sixteen = torch.as_tensor(transform(Image.fromarray((np.asarray(GREY) >> 8).astype(np.uint8)).convert('RGB')))
    for name in '16.png', '16.tif', '16.pgm', '16.jp2':
        assert torch.equal(found[name], sixteen), name


@pytest.mark.parametrize('name', BAD)
def test_a_bad_file_is_refused_or_left_out_by_all(tmp_path, folder, name):
    root = tmp_path / 'val'
    (root / 'odd').mkdir(parents=True)
    shutil.copy(folder / 'odd' / 'plain.png', root / 'odd')
    (root / 'odd' / name).write_bytes(BAD[name])
    pipeline = ImagePipeline.from_config(config('RGB'))
    for reader in of_evaluation, of_training, of_calibration:
        with pytest.raises(UserError, match=rf'^image .*{name} cannot be read: [^\n]+$'):
            reader(root, pipeline)
    with pytest.raises(UserError, match=rf'{name} cannot be read: [^\n]+$'):
        of_predictor(root, pipeline)
    for reader in of_evaluation, of_calibration:
        assert len(reader(root, pipeline, on_bad_image='skip')) == 1


@pytest.mark.parametrize('kind', ['folder', 'tar'])
def test_inference_gives_a_bad_file_no_answer_of_its_neighbour(tmp_path, folder, kind):
    root = tmp_path / 'images'
    root.mkdir()
    for name, content in (('0.png', FILES['plain.png']), ('1.jpg', BAD['torn.jpg']), ('2.png', FILES['la.png'])):
        (root / name).write_bytes(content)
    if kind == 'tar':
        with tarfile.open(tmp_path / 'images.tar', 'w') as archive:
            archive.add(root, '.')
        root = tmp_path / 'images.tar'
    images, pipeline = find_files([str(root)], 'RGB'), ImagePipeline.from_config(config('RGB'))
    transform = pipeline.transform()

    def decode(on_bad_image: str) -> list:
        return list(decode_stream(
            iter(range(3)), lambda index: transform(images[index]), images.name, batch_size=2, num_threads=3,
            on_bad_image=on_bad_image))

    batches = decode('skip')
    assert [images.name(index) for indices, _ in batches for index in indices] == ['0.png', '2.png']
    with pytest.raises(UserError, match=r'^image .*1\.jpg cannot be read'):
        decode('stop')


@pytest.mark.parametrize('content', ['pipe', 'pipe.tar', 'folder', 'x' * 70_000])
def test_what_is_no_list_of_images_is_one_line(tmp_path, content):
    path = tmp_path / ('list.tar' if content == 'pipe.tar' else 'list.txt')
    if content.startswith('pipe'):
        os.mkfifo(path)
    elif content == 'folder':
        path = tmp_path / 'images.lst'
        path.mkdir()
    else:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        find_files([str(path)], 'RGB')
    assert '\n' not in str(caught.value)


def test_a_line_that_is_no_path_is_an_image_that_cannot_be_read(tmp_path):
    names = ['a\0b.png', 'x' * 5000, 'y' * 300 + '.png', '~', '/dev/zero', '']
    (tmp_path / 'list.txt').write_text('\n'.join(['a.png', *names]))
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    images = find_files([str(tmp_path / 'list.txt')], 'RGB')
    batches = list(decode_stream(
        iter(range(len(images))), lambda index: np.zeros((3, *images[index].size), np.uint8), images.name, batch_size=4,
        num_threads=1, on_bad_image='skip'))
    assert [index for indices, _ in batches for index in indices] == [0]

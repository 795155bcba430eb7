#!/usr/bin/env python3
"""What Inception-ResNet-v2, or any timm model, takes images for.

    python train_scripts/inference.py IMAGE_OR_FOLDER... --checkpoint RUN/last.pth.tar --topk 5 --picture answers.png
    python train_scripts/inference.py --data-dir DIR --model hf-hub:OWNER/NAME --results-file answers.csv

The options are those of timm's inference.py. Images are decoded by threads while the device computes.
"""

import csv
import io
import json
import logging
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import (
    CustomDatasetInfo,
    DatasetInfoLabelMapper,
    ImageNetInfo,
    create_dataset,
    create_transform,
    infer_imagenet_subset,
    resolve_data_config,
)
from timm.data.readers.img_extensions import get_img_extensions
from timm.layers import apply_test_time_pool
from timm.utils import natural_key
from torch import Tensor, nn

from timm_npu_irv2 import device as devices
from timm_npu_irv2 import hub
from timm_npu_irv2.cli.flags import INERT, OUR_MODEL, REFUSED, pick
from timm_npu_irv2.cli.parser import Flag, Group, parse_flags
from timm_npu_irv2.cli.script import run_script, start_log
from timm_npu_irv2.data.decode import to_pil_mode
from timm_npu_irv2.distributed import World, initialize, shutdown
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.ops.normalize import normalize_images
from timm_npu_irv2.plots import Prediction, draw_contact_sheet, gradcam
from timm_npu_irv2.serialization import atomic_write, make_folder
from timm_npu_irv2.training import setup

_logger = logging.getLogger('inference')

IN_PICTURE, BARS = 40, 5
EXTENSIONS = {'csv': '.csv', 'json': '.json', 'json-record': '.json', 'json-split': '.json', 'parquet': '.parquet'}


# ------------------------------------------------------------------------------------------------------- options


def _choice(names: str, help: str, default: str, *choices: str) -> Flag:
    return Flag(names, help, default=default, rest={'choices': choices})


FLAGS = (
    Group('Images', (
        # parse_flags makes a dict of what is given several times
        Flag('data', 'images, or folders of images',
             rest={'nargs': '*', 'metavar': 'IMAGE_OR_FOLDER', 'type': lambda text: (text, None)}),
        Flag('--data-dir', 'one more; or where the --dataset is', rest={'metavar': 'DIR'}),
        *pick('dataset', 'dataset_download', 'class_map', 'input_img_mode', 'on_bad_image'),
        Flag('--split', 'name of the split of the --dataset', default='validation', rest={'metavar': 'NAME'}),
    )),
    Group('Model', (
        Flag('-m --model', "name of the model; 'hf-hub:OWNER/NAME' or 'local-dir:FOLDER' for a published one",
             default=OUR_MODEL, rest={'metavar': 'NAME'}),
        Flag('--checkpoint', 'weights in any dialect; averaged ones first', default='', rest={'metavar': 'FILE'}),
        Flag('--pretrained', 'the pretrained weights; so it is without --checkpoint', bool, False),
        *pick('num_classes', 'model_kwargs', 'fuser', 'fast_norm', 'torchscript',
                         'torchcompile', 'torchcompile_mode'),
        Flag('--test-pool', "average over several positions where the images are larger than the model's", bool, False),
    )),
    Group('Preprocessing', (
        *pick('img_size', 'in_chans', 'input_size', 'crop_pct', 'mean', 'std', 'interpolation'),
        Flag('--use-train-size', "the model's training size, even where it has another one for testing", bool, False),
        Flag('--crop-mode', "(default: the model's)", rest={'choices': ('center', 'squash', 'border')}),
    )),
    Group('Device and precision', (
        *pick('device', 'device_modules', 'amp', 'amp_dtype', 'model_dtype', 'allow_internal_format',
                         'jit_compile'),
        Flag('--fast', 'weights and images in 16 bits where the device computes faster so: float16, or bfloat16 on a '
             'CPU that has it', bool, False),
        Flag('-b --batch-size', 'images at a time', int, 256, '[1, inf)', {'metavar': 'N'}),
        Flag('-j --workers', 'threads that decode images', int, 2, '[0, inf)', {'metavar': 'N'}),
        Flag('--log-freq', 'batches between two lines of the log', int, 10, '[1, inf)', {'metavar': 'N'}),
    )),
    Group('Results', (
        Flag('--topk', 'the first K answers; 0 for the outputs of all classes', int, 1, '[0, inf)', {'metavar': 'K'}),
        Flag('--picture', 'draw the images with their answers', default='', rest={'metavar': 'FILE.png'}),
        Flag('--gradcam', 'show in the picture what in each image spoke for its first answer', bool, False),
        Flag('--results-dir', 'write the results into this folder', default='', rest={'metavar': 'DIR'}),
        Flag('--results-file', 'write the results to this file (default: named after model and size, in the folder)',
             default='', rest={'metavar': 'FILE'}),
        Flag('--results-format', 'as', default=['csv'], rest={'nargs': '+', 'choices': tuple(EXTENSIONS)}),
        Flag('--results-separate-col', 'a column for each of the K answers', bool, False),
        Flag('--fullname', 'the path of an image instead of its name', bool, False),
        *(Flag(f'--{name}-col', f"name of the column of {what}", default=default, rest={'metavar': 'NAME'})
          for name, what, default in (('filename', 'images', 'filename'), ('index', 'class indices', 'index'),
                                      ('label', 'labels', 'label'), ('output', 'outputs', ''))),
        _choice('--output-type', 'probabilities or logits', 'prob', 'prob', 'logit'),
        _choice('--label-type', 'what a class is called', 'description', 'none', 'name', 'description', 'detail',
                'detailed'),
        Flag('--include-index', 'also the class indices', bool, False),
        Flag('--exclude-output', 'no probabilities or logits', bool, False),
        Flag('--no-console-results', 'do not print the results', bool, False),
    )),
    INERT['inference.py'],
)

UNSUPPORTED = {
    **REFUSED,
    '--aot-autograd': 'torch has dropped what was behind it; use --torchcompile aot_eager.',
}


def parse(argv: Sequence[str]) -> Namespace:
    """The options.

    Raises:
        UserError: An unknown option, a value out of range, a contradiction; one line.
    """
    args = parse_flags(FLAGS, argv, prog='inference.py', refused=UNSUPPORTED, description=(
        "Classify images with Inception-ResNet-v2, or any timm model, on NPU, CUDA or CPU. The options are those of "
        "timm's inference.py. '-' and '_' in names are the same."))
    args.data = [*args.data, *([args.data_dir] if args.data_dir else [])]
    args.pretrained = args.pretrained or not args.checkpoint
    wrong = [
        (not args.data and not args.dataset, 'no images: name some, or a folder of them.'),
        (args.dataset and len(args.data) > 1, f'--dataset {args.dataset} is in one place: name one --data-dir.'),
        (args.num_gpu > 1, f'--num-gpu {args.num_gpu}: this script uses one device.'),
        (args.amp and args.model_dtype not in (None, 'float32'),
         f'--model-dtype {args.model_dtype} is for inference without --amp: leave one out.'),
        (args.fast and (args.amp or args.model_dtype), '--fast chooses the precision: leave out --amp, --model-dtype.'),
        (args.torchscript and args.torchcompile, '--torchscript and --torchcompile exclude each other.'),
        (args.exclude_output and not args.topk, '--exclude-output with --topk 0 leaves nothing to tell.'),
        (args.results_format and len({EXTENSIONS[each] for each in args.results_format}) < len(args.results_format),
         f'--results-format {" ".join(args.results_format)}: the files would have the same name.'),
        (args.gradcam and not args.picture, '--gradcam is drawn into the picture: name it with --picture FILE.png.'),
    ]
    for is_wrong, text in wrong:
        if is_wrong:
            raise UserError(text)
    return args


# --------------------------------------------------------------------------------------------------------- story


def main(argv: Sequence[str]) -> int:
    """Read the options, go through the images, tell and draw the answers."""
    args = parse(argv)
    setup.set_global_options(args)
    world = initialize(args.device)
    try:
        start_log(world.is_primary)
        devices.configure(world.device, args.allow_internal_format or None, args.jit_compile)
        infer(args, world)
    finally:
        shutdown(world)
    return 0


def infer(args: Namespace, world: World) -> None:
    """The answers to all images, as a table and a picture."""
    model = load_model(args)
    labels = label_function(args, model)
    config = resolve_data_config(vars(args), model=model, use_test_size=not args.use_train_size)
    if args.test_pool:
        model, pooled = apply_test_time_pool(model, config)
        config['crop_pct'] = 1.0 if pooled else config['crop_pct']
    dtype = precision_of(args, world)
    model = setup.place_model(
        model.to(dtype).eval(), world, channels_last=args.channels_last, torchscript=args.torchscript)
    compiled = model
    if args.torchcompile:
        compiled = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    images = find_images(args, config['input_size'][0])
    _logger.info(f'{args.checkpoint or args.model}: {len(images)} images at {config["input_size"][-1]} px; '
                 f'{world.device.type}, {"autocast, " if args.amp else ""}{str(dtype).removeprefix("torch.")}')
    place = Placement(world.device, dtype, config)
    answers = predict(compiled, images, create_transform(**config, is_training=False, use_prefetcher=True), place, args)
    if args.picture:
        draw(args, model, answers, labels, place)
    table = tabulate(args, answers, labels)
    write_results(args, table, config['input_size'][-1])
    if not args.no_console_results:
        print(f'--result\n{json.dumps(by_name(args, table), indent=4, ensure_ascii=False)}', flush=True)


def load_model(args: Namespace) -> nn.Module:
    """The model with its weights, on the CPU."""
    options = {'num_classes': args.num_classes, 'in_chans': args.in_chans or (args.input_size or [None])[0],
               **args.model_kwargs}
    if args.checkpoint and not Path(args.checkpoint).is_file():
        raise UserError(f'--checkpoint {args.checkpoint}: no such file.')
    if args.checkpoint and args.model == OUR_MODEL:
        given = {key: value for key, value in options.items() if value is not None}
        return hub.create(args.checkpoint, scriptable=args.torchscript, **given)
    return hub.create_model(args.model, pretrained=args.pretrained and not args.checkpoint,
                            checkpoint_path=args.checkpoint, scriptable=args.torchscript, **options)


def precision_of(args: Namespace, world: World) -> torch.dtype:
    """What weights and images are in."""
    if not args.fast:
        return getattr(torch, args.model_dtype or 'float32')
    if (dtype := devices.fast_dtype(world.device)) == torch.float32:
        _logger.warning('--fast: this CPU has no bfloat16, so float32 is as fast as it gets.')
    return dtype


def label_function(args: Namespace, model: nn.Module) -> Callable[[int], str] | None:
    """What the classes are called: as was published with the model, else ImageNet's names if it has its classes."""
    if args.label_type == 'none':
        return None
    cfg = dict(model.pretrained_cfg)
    if cfg.get('label_names'):
        info: Any = CustomDatasetInfo(cfg['label_names'], cfg.get('label_descriptions'))
    elif subset := infer_imagenet_subset({'num_classes': model.num_classes}):
        info = ImageNetInfo(subset)
    else:
        _logger.warning(f'The names of the {model.num_classes} classes are not known; their indices stand for them.')
        return str
    return DatasetInfoLabelMapper(info, label_type=args.label_type)


# -------------------------------------------------------------------------------------------------------- images


class Images:
    """Files to be decoded.

    Args:
        paths: Theirs.
        mode: The PIL mode the network wants.
    """

    def __init__(self, paths: Sequence[Path], mode: str):
        self.paths, self.mode = paths, mode
        short = [path.name for path in paths]
        self.unique = len(set(short)) == len(short)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int, full: bool) -> str:
        """The file's name; its path if that is wanted, or if several have the same name."""
        path = self.paths[index]
        return path.as_posix() if full or not self.unique else path.name

    def __getitem__(self, index: int) -> Image.Image:
        with Image.open(self.paths[index]) as image:
            return to_pil_mode(image, self.mode)


class Samples:
    """The same for one of timm's data sets."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int, full: bool) -> str:
        """The sample's name; its number if it has none."""
        return str(self.dataset.filename(index, basename=not full) if hasattr(self.dataset, 'filename') else index)

    def __getitem__(self, index: int) -> Image.Image:
        return self.dataset[index][0]


def find_images(args: Namespace, channels: int) -> Images | Samples:
    """The images that are asked for: files, the files in folders (however deep, in natural order), a data set's."""
    mode = args.input_img_mode or ('RGB' if channels == 3 else 'L')
    if args.dataset or (len(args.data) == 1 and args.data[0].endswith('.tar')):
        with hub.translate_hub_errors(f'--dataset {args.dataset}' if args.dataset else args.data[0]):
            dataset = create_dataset(args.dataset, root=args.data[0] if args.data else None, split=args.split,
                                     class_map=args.class_map, download=args.dataset_download, input_img_mode=mode)
        if not hasattr(dataset, '__getitem__'):
            raise UserError(f'--dataset {args.dataset} is a stream, whose images have no names.')
        args.workers = min(args.workers, 1)  # timm's readers may share a file between samples
        return Samples(dataset)
    paths: list[Path] = []
    for place in map(Path, args.data):
        found = [path for path in place.rglob('*') if path.suffix.lower() in get_img_extensions(as_set=True)]
        if not place.exists() or (place.is_dir() and not found):
            raise UserError(f'{place}: {"no images in this folder" if place.is_dir() else "no such file or folder"}.')
        paths += sorted(found, key=lambda path: natural_key(path.as_posix())) if place.is_dir() else [place]
    return Images(paths, mode)


def decode_batches(
        images: Images | Samples,
        transform: Callable,
        args: Namespace,
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of (indices, uint8 images (N, C, H, W)), decoded by threads up to two batches ahead."""
    with ThreadPoolExecutor(max(1, args.workers)) as pool:
        indices = iter(range(len(images)))
        running: deque = deque()

        def decode(index: int) -> np.ndarray:
            return transform(images[index])

        def refill() -> None:
            room = 2 * args.batch_size - len(running)
            running.extend((index, pool.submit(decode, index)) for index in islice(indices, room))

        try:
            refill()
            while running:
                batch = {}
                for index, future in (running.popleft() for _ in range(min(args.batch_size, len(running)))):
                    try:
                        batch[index] = future.result()
                    except Exception as error:  # as many kinds as there are formats
                        reason = ' '.join((str(error) or type(error).__name__).split())[:200]
                        if args.on_bad_image == 'stop':
                            raise UserError(f'image {images.name(index, True)} cannot be read: {reason}; '
                                            '--on-bad-image skip leaves such images out.') from error
                        _logger.warning(f'image {images.name(index, True)} is left out: {reason}')
                refill()
                if batch:
                    yield list(batch), torch.from_numpy(np.stack(list(batch.values())))
        finally:
            for _, future in running:
                future.cancel()


@dataclass
class Placement:
    """How uint8 images get to the network."""

    device: torch.device
    dtype: torch.dtype
    config: dict[str, Any]

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images on the device, in its layout."""
        mean, std = (torch.tensor(self.config[key], device=self.device) for key in ('mean', 'std'))
        return normalize_images(images.to(self.device, non_blocking=True), mean, std, self.dtype,
                                devices.memory_format(self.device))


# ----------------------------------------------------------------------------------------------------- inference


@dataclass
class Answers:
    """The answers to N images.

    Attributes:
        names: Of the images.
        indices: (N, K) classes, the likeliest first; None for --topk 0.
        outputs: (N, K) their probabilities or logits, or (N, classes) all of them.
        top: (M, bars) the first probabilities and classes for the picture, and the M images in uint8.
    """

    names: list[str] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    top: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    shown: list[Tensor] = field(default_factory=list)


@torch.inference_mode()
def predict(
        model: nn.Module,
        images: Images | Samples,
        transform: Callable,
        place: Placement,
        args: Namespace,
) -> Answers:
    """The answers to ``images``, in their order."""
    half = getattr(torch, args.amp_dtype) if args.amp_dtype else devices.half_dtype(place.device)
    answers, started, done = Answers(), time.perf_counter(), 0
    batches = ((indices, batch, place(batch)) for indices, batch in decode_batches(images, transform, args))
    for number, (indices, batch, ready) in enumerate(batches):
        with devices.autocast(place.device, half if args.amp else None):
            logits = model(ready).float()
        outputs = logits.softmax(-1) if args.output_type == 'prob' else logits
        if args.topk:
            outputs, classes = outputs.topk(min(args.topk, logits.shape[1]))
            answers.indices.append(classes.cpu())
        answers.outputs.append(outputs.cpu())
        answers.names += [images.name(index, args.fullname) for index in indices]
        if args.picture and (room := IN_PICTURE - done) > 0:
            probabilities, classes = logits[:room].softmax(-1).topk(min(args.topk or 1, BARS, logits.shape[1]))
            answers.top.append((probabilities.cpu(), classes.cpu()))
            answers.shown.append(batch[:room])
        done += len(indices)
        if number % args.log_freq == 0:
            _logger.info(f'Predict [{done:>{len(str(len(images)))}}/{len(images)}]  '
                         f'{done / (time.perf_counter() - started):.1f} images/s')
    if not done:
        raise UserError('none of the images can be read.')
    return answers


def draw(
        args: Namespace,
        model: nn.Module,
        answers: Answers,
        labels: Callable[[int], str] | None,
        place: Placement,
) -> None:
    """The contact sheet of the first images."""
    path = Path(args.picture)
    if not path.parent.is_dir():
        raise UserError(f'--picture {path}: there is no folder {path.parent}.')
    shown = torch.cat(answers.shown)
    probabilities, classes = (torch.cat(part) for part in zip(*answers.top, strict=True))
    heat: list[Any] = [None] * len(shown)
    if args.gradcam:
        parts = zip(shown.split(8), classes[:, 0].to(place.device).split(8), strict=True)
        heat = [each.numpy() for images, wanted in parts for each in gradcam(model, place(images), wanted)]
    cells = [
        Prediction(image.permute(1, 2, 0).squeeze(-1).numpy(), [(labels or str)(index) for index in row.tolist()],
                   values.tolist(), title=name, heat=each)
        for image, name, row, values, each in zip(
            shown, answers.names[:len(shown)], classes, probabilities, heat, strict=True)
    ]
    count = f'{len(shown)} of {len(answers.names)}' if len(answers.names) > len(shown) else str(len(shown))
    if draw_contact_sheet(path, cells, f'{Path(args.checkpoint).name or args.model} · {count} images'):
        _logger.info(f'Picture: {path}')


# ------------------------------------------------------------------------------------------------------- results


def tabulate(args: Namespace, answers: Answers, labels: Callable[[int], str] | None) -> dict[str, list[Any]]:
    """timm's table, column by column."""
    columns: dict[str, list[list[Any]]] = {}
    if args.topk:
        indices = torch.cat(answers.indices).tolist()
        if args.include_index or labels is None:
            columns[args.index_col] = indices
        if labels is not None:
            columns[args.label_col] = [[labels(index) for index in row] for row in indices]
    if not args.exclude_output:
        columns[args.output_col or args.output_type] = torch.cat(answers.outputs).tolist()
    table: dict[str, list[Any]] = {args.filename_col: answers.names}
    for name, rows in columns.items():
        if len(rows[0]) == 1:
            table[name] = [row[0] for row in rows]
        elif args.results_separate_col:
            table |= {f'{name}_{place}': [row[place] for row in rows] for place in range(len(rows[0]))}
        else:
            table[name] = rows
    return table


def records(table: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The table's rows."""
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def by_name(args: Namespace, table: dict[str, list[Any]]) -> dict[str, Any]:
    """The rows by the names of the images."""
    return {row.pop(args.filename_col): row for row in records(table)}


def write_results(args: Namespace, table: dict[str, list[Any]], size: int) -> None:
    """A file for each format, if a file or a folder is named."""
    if not args.results_file and not args.results_dir:
        return
    stem = Path(args.results_file or f'{args.model.replace(":", "_").replace("/", "_")}-{size}')
    stem = stem.with_suffix('') if stem.suffix in EXTENSIONS.values() else stem
    for format in args.results_format:
        path = Path(args.results_dir) / f'{stem}{EXTENSIONS[format]}'
        make_folder(path.parent)
        atomic_write(path, as_file(args, table, format))
        _logger.info(f'Results: {path}')


def as_file(args: Namespace, table: dict[str, list[Any]], format: str) -> str | bytes:
    """The table in a format; lists in a cell of CSV are JSON."""
    if format == 'json':
        return json.dumps(by_name(args, table), indent=4, ensure_ascii=False) + '\n'
    if format == 'json-record':
        return ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in records(table))
    if format == 'json-split':
        return json.dumps({'columns': list(table), 'data': [list(row.values()) for row in records(table)]}, indent=4)
    if format == 'parquet':
        try:
            import pandas as pd  # noqa: PLC0415 (an optional dependency)

            return pd.DataFrame(table).set_index(args.filename_col).to_parquet()
        except ImportError as error:
            raise UserError('--results-format parquet needs pandas and pyarrow: pip install pandas pyarrow.') from error
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(table)
    for row in records(table):
        cells = row.values()
        writer.writerow([json.dumps(cell, ensure_ascii=False) if isinstance(cell, list) else cell for cell in cells])
    return text.getvalue()


if __name__ == '__main__':
    sys.exit(run_script('inference.py', main, sys.argv[1:]))

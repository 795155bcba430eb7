#!/usr/bin/env python3
"""Classify images with Inception-ResNet-v2, or any timm model.

    python train_scripts/inference.py IMAGE_OR_FOLDER... --checkpoint RUN/last.pth.tar --topk 5 --picture answers.png
    python train_scripts/inference.py --data-dir DIR --model hf-hub:OWNER/NAME --results-file answers.csv
    torchrun --nproc-per-node 8 train_scripts/inference.py DIR --checkpoint FILE --results-dir answers --resume

The options are those of timm's inference.py. Threads decode images while the device computes. Several processes, or
--results-shards, write the results as they come, in shards; --resume continues an interrupted run.
"""

import timm_npu_irv2.cli.environment  # noqa: F401 - sets variables that torch reads when it is loaded

# isort: split
import sys

from timm_npu_irv2.cli.inference_flags import INFERENCE
from timm_npu_irv2.cli.script import check_command_line

if __name__ == '__main__':
    check_command_line(INFERENCE, sys.argv[1:])  # before the imports below, which take seconds

# isort: split
import logging
from argparse import Namespace
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from timm.data import DatasetInfoLabelMapper
from torch import Tensor, nn

from timm_npu_irv2 import device as devices
from timm_npu_irv2 import hub
from timm_npu_irv2.cli.checks import (
    check_compile_backend,
    check_installed,
    check_output_file,
    check_rules,
    dataset_rules,
    translate_compile_errors,
)
from timm_npu_irv2.cli.evaluation import (
    check_deployed,
    describe_precision,
    engine_options,
    engine_rules,
    prepare_model,
)
from timm_npu_irv2.cli.flags import device_switches
from timm_npu_irv2.cli.predictions import Answers, Labels, Progress, ShardWriter, tabulate, write_results
from timm_npu_irv2.cli.script import leave_at_end, run_script, start_log
from timm_npu_irv2.cli.shards import images_of_shards, settings_of, shard_rules, shards_to_write
from timm_npu_irv2.cli.table import EXTENSIONS, by_key, to_json
from timm_npu_irv2.cli.tuned import eval_workload, use_tuned
from timm_npu_irv2.data.classes import class_info
from timm_npu_irv2.data.dataset import open_dataset
from timm_npu_irv2.data.image_files import (
    DatasetImages,
    ImageList,
    IndexedImages,
    NamedImages,
    decode_stream,
    find_files,
)
from timm_npu_irv2.data.pipeline import ImagePipeline, pool_over_positions
from timm_npu_irv2.deploy import is_deployed, open_deployed, to_inference
from timm_npu_irv2.distributed import World, agree, barrier, gather_objects, initialize, together
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.ops.normalize import normalize_images
from timm_npu_irv2.plots import Prediction, draw_contact_sheet, gradcam
from timm_npu_irv2.rendezvous import world_from_env
from timm_npu_irv2.serialization import weights_checksum
from timm_npu_irv2.training import setup

_logger = logging.getLogger('inference')

IN_PICTURE, BARS = 40, 5


# ------------------------------------------------------------------------------------------------------- options


def parse(argv: Sequence[str]) -> Namespace:
    """Parse the options.

    Raises:
        UserError: Unknown option, value out of range, or contradiction.
    """
    args = INFERENCE.parse(argv)
    args.data = [*args.data, *([args.data_dir] if args.data_dir else [])]
    args.pretrained = args.pretrained or not args.checkpoint
    args.shards = bool(args.results_shards or args.resume) or world_from_env()[2] > 1
    args.results_format = args.results_format or ['parquet' if args.shards else 'csv']
    formats = args.results_format
    check_rules([
        (not args.data and not args.dataset, 'no images: name some, or a folder of them.'),
        (args.dataset and len(args.data) > 1, f'--dataset {args.dataset} is in one place: name one --data-dir.'),
        (args.num_gpu > 1,
         f'--num-gpu {args.num_gpu}: start the processes with torchrun --nproc-per-node {args.num_gpu}.'),
        (args.amp and args.model_dtype not in (None, 'float32'),
         f'--model-dtype {args.model_dtype} is for inference without --amp: leave one out.'),
        (args.fast and (args.amp or args.model_dtype), '--fast chooses the precision: leave out --amp, --model-dtype.'),
        (args.torchscript and args.torchcompile, '--torchscript and --torchcompile exclude each other.'),
        (args.exclude_output and not args.topk, '--exclude-output with --topk 0 leaves no results.'),
        (len({EXTENSIONS[each] for each in formats}) < len(formats),
         f'--results-format {" ".join(formats)}: the files would have the same name.'),
        (args.gradcam and not args.picture, '--gradcam is drawn into the picture: name it with --picture FILE.png.'),
        *engine_rules(args),
        (args.checkpoint and not Path(args.checkpoint).is_file() and not is_deployed(Path(args.checkpoint)),
         f'--checkpoint {args.checkpoint}: no such file.'),
        *(shard_rules(args) if args.shards else []),
        *dataset_rules(args.dataset),
    ])
    check_compile_backend(args.torchcompile)
    check_output_file('--picture', args.picture)
    if args.results_file or args.results_dir:
        path = Path(args.results_dir) / (args.results_file or '.csv')
        check_output_file('--results-file', str(path), make_folder=True)
    if args.picture:
        check_installed('--picture', 'matplotlib')
    return args


# --------------------------------------------------------------------------------------------------------- story


def main(argv: Sequence[str]) -> int:
    """Parse the options, classify the images, and write the results."""
    args = parse(argv)
    if 'parquet' in args.results_format:
        check_installed('--results-format parquet', *([] if args.shards else ['pandas']), 'pyarrow')
    setup.set_global_options(args)
    world = initialize(args.device, dist_url=args.dist_url, backend=args.dist_backend, timeout=timedelta(days=30))
    with leave_at_end(world, 'inference.py'):
        start_log(world.is_primary)
        devices.configure(world.device, **device_switches(args))
        network, labels = together(lambda: prepare(args, world.device), world)
        lost_process = setup.translate_lost_process_errors(world, 'Start again with --resume.')
        with translate_compile_errors(args.torchcompile):
            if args.shards:
                with lost_process:
                    infer_in_shards(args, world, network, labels)
            else:
                infer(args, network, labels)
    return 0


def prepare(args: Namespace, device: torch.device) -> tuple['Network', Labels | None]:
    """Return the network on its device, and the function from a class index to its label (None for no labels)."""
    if deployed := bool(args.checkpoint) and is_deployed(Path(args.checkpoint)):
        model: Any = open_deployed(Path(args.checkpoint), device).network
        check_deployed(args, model, args.checkpoint)
    else:
        model = load_model(args)
    weights = weights_checksum(model.state_dict()) if args.shards and not args.checkpoint else ''
    pipeline = ImagePipeline.for_model(model, vars(args), use_test_size=not args.use_train_size)
    labels, num_classes = label_function(args, model), model.num_classes
    if args.test_pool:
        model, pipeline = pool_over_positions(model, pipeline)
    args = use_tuned(args, device, **eval_workload(args, device, args.batch_size, pipeline.input_size, deployed))
    dtype, amp_dtype = (torch.float32, None) if args.engine or deployed else choose_dtypes(args, device)
    if args.engine:
        model = to_inference(model.eval(), **engine_options(args, device))
        _logger.info(f'Engine: {args.engine}{", int8" if args.calibration else ""}')
    elif not deployed:
        model = prepare_model(model, device, dtype, torchscript=args.torchscript)
    _logger.info(f'{args.checkpoint or args.model}: images of {pipeline.input_size[-1]} px; {device.type}, '
                 f'{describe_precision(dtype, amp_dtype)}')
    return Network(model, num_classes, pipeline, device, dtype, amp_dtype, args.torchcompile,
                   args.torchcompile_mode, weights), labels


def infer(args: Namespace, network: 'Network', labels: Labels | None) -> None:
    """Classify all images, and write the results as tables and as a picture."""
    images = open_images(args, network.pipeline.input_img_mode)
    if args.gradcam:  # fails now, and not after all images, for a network or a size that it cannot handle
        blank = torch.zeros(1, *network.pipeline.input_size, dtype=torch.uint8)
        gradcam(network.model, network.place(blank), torch.zeros(1, dtype=torch.long, device=network.device))
    answers = classify(args, network, images)
    if args.picture:
        draw(args, network, answers, labels or str)
    table = tabulate(args, answers, labels)
    write_results(args, table, network.pipeline.input_size[-1])
    if not args.no_console_results:
        print(f'--result\n{to_json(by_key(table, args.filename_col))}', end='', flush=True)


def infer_in_shards(args: Namespace, world: World, network: 'Network', labels: Labels | None) -> None:
    """Classify this process's share of the images, and write the results of each shard when it is complete."""
    mode = network.pipeline.input_img_mode
    images = IndexedImages(open_images(args, mode)) if args.dataset else ImageList(args.data, mode)
    own = together(lambda: {**settings_of(args, network.weights), 'pipeline': network.pipeline.to_config()}, world)
    settings = gather_objects(own, world)
    shards, missing = agree(lambda: shards_to_write(args, settings, map(images.name, images)), world)
    writer = ShardWriter(args, shards, missing[world.rank::world.size], labels, network.num_classes)
    progress = Progress(shards.images, shards.images_in(set(range(len(shards))) - set(missing)))
    chosen = images_of_shards(images, images.name, shards, writer.numbers)
    try:
        for number, (items, _, logits) in enumerate(_answer_stream(args, network, images, chosen)):
            writer.add([(shard, images.name(image)) for shard, image in items], logits.cpu())
            if world.is_primary and number % args.log_freq == 0:
                progress.log(shards.images_in(shards.done()) + writer.waiting)
        writer.finish()
        barrier(world)
    except KeyboardInterrupt:
        _logger.warning('Interrupted; --resume goes on from here.')
        raise
    if world.is_primary:
        progress.log(shards.images)
        summary = {'images': shards.images, 'shards': len(shards), 'results': str(shards.folder),
                   'images_per_second': round(progress.rate, 2)}
        print(f'--result\n{to_json(summary)}', end='', flush=True)


def load_model(args: Namespace) -> nn.Module:
    """Return the model with its weights, on the CPU."""
    options = {'num_classes': args.num_classes, 'in_chans': args.in_chans or (args.input_size or [None])[0],
               **args.model_kwargs}
    return hub.create_model(args.model, pretrained=args.pretrained and not args.checkpoint,
                            checkpoint_path=args.checkpoint, scriptable=args.torchscript, **options)


def open_images(args: Namespace, mode: str) -> NamedImages:
    """Return the images that the options name: files, folders, tar files, or a data set."""
    if not args.dataset:
        return find_files(args.data, mode)
    dataset = open_dataset(args.dataset, args.data[0] if args.data else None, args.split, class_map=args.class_map,
                           download=args.dataset_download, input_img_mode=mode)
    if not hasattr(dataset, '__getitem__'):
        raise UserError(f'--dataset {args.dataset} is a stream, whose images have no names.')
    return DatasetImages(dataset, mode)


def choose_dtypes(args: Namespace, device: torch.device) -> tuple[torch.dtype, torch.dtype | None]:
    """Return the type of weights and images, and that of autocast (None without --amp)."""
    if args.amp:
        return torch.float32, getattr(torch, args.amp_dtype) if args.amp_dtype else devices.half_dtype(device)
    if not args.fast:
        return getattr(torch, args.model_dtype or 'float32'), None
    if (dtype := devices.fast_dtype(device)) == torch.float32:
        _logger.warning('--fast: this CPU has no bfloat16, so float32 is its fastest type.')
    return dtype, None


def label_function(args: Namespace, model: nn.Module) -> Labels | None:
    """Return the function from a class index to its label; None for --label-type none."""
    if args.label_type == 'none':
        return None
    info = class_info(dict(model.pretrained_cfg), model.num_classes)
    if info is None:
        _logger.warning(f'The names of the {model.num_classes} classes are not known; using their indices.')
        return str
    return DatasetInfoLabelMapper(info, label_type=args.label_type)


class Network:
    """A model with its image pipeline on a device: from uint8 images to logits."""

    def __init__(
            self,
            model: Any,
            num_classes: int,
            pipeline: ImagePipeline,
            device: torch.device,
            dtype: torch.dtype,
            amp_dtype: torch.dtype | None,
            compile_backend: str | None,
            compile_mode: str | None,
            weights: str = '',
    ):
        self.weights = weights  # their checksum, where the options name no file
        self.model, self.num_classes, self.pipeline, self.device = model, num_classes, pipeline, device
        self.dtype, self.amp_dtype = dtype, amp_dtype
        self._run = torch.compile(model, backend=compile_backend, mode=compile_mode) if compile_backend else model
        self._mean, self._std = (torch.tensor(each, device=device) for each in (pipeline.mean, pipeline.std))

    def place(self, images: Tensor) -> Tensor:
        """Return uint8 images normalised, on the device and in its layout."""
        return normalize_images(images.to(self.device, non_blocking=True), self._mean, self._std, self.dtype,
                                devices.memory_format(self.device))

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of placed images, in float32."""
        with devices.autocast(self.device, self.amp_dtype):
            return self._run(images).float()


@torch.inference_mode()
def classify(args: Namespace, network: Network, images: NamedImages) -> Answers:
    """Return the answers to all images that can be read, in their order."""
    answers, progress, indexed = Answers(), Progress(len(images)), IndexedImages(images)
    for number, (items, batch, logits) in enumerate(_answer_stream(args, network, indexed, enumerate(indexed))):
        done = len(answers.names)
        answers.add(args, [images.name(index, args.fullname) for index, _ in items], logits)
        if args.picture and (room := IN_PICTURE - done) > 0:
            probabilities, classes = logits[:room].softmax(-1).topk(min(args.topk or 1, BARS, logits.shape[1]))
            answers.shown.append(batch[:room])
            answers.shown_top.append((probabilities.cpu(), classes.cpu()))
        if number % args.log_freq == 0:
            progress.log(len(answers.names))
    if not answers.names:
        raise UserError('none of the images can be read.')
    return answers


@torch.inference_mode()
def _answer_stream(
        args: Namespace,
        network: Network,
        images: ImageList | IndexedImages,
        chosen: Iterator[tuple[int, Any]],
) -> Iterator[tuple[list[tuple[int, Any]], Tensor, Tensor]]:
    """Yield batches of (number, image) with their pixels in uint8 and their logits, in the order of ``chosen``."""
    transform = network.pipeline.transform()
    batches = decode_stream(
        chosen, lambda item: transform(images.read(item[1])), lambda item: images.name(item[1]),
        batch_size=args.batch_size, num_threads=min(args.workers, images.max_threads or args.workers),
        on_bad_image=args.on_bad_image)
    for items, batch in batches:
        yield items, batch, network.logits(network.place(batch))


# ------------------------------------------------------------------------------------------------------- results


def draw(args: Namespace, network: Network, answers: Answers, labels: Labels) -> None:
    """Draw the contact sheet of the first images."""
    path = Path(args.picture)
    shown = torch.cat(answers.shown)
    probabilities, classes = (torch.cat(part) for part in zip(*answers.shown_top, strict=True))
    heat: list[Any] = [None] * len(shown)
    if args.gradcam:
        parts = zip(shown.split(8), classes[:, 0].to(network.device).split(8), strict=True)
        heat = [each.numpy() for images, wanted in parts
                for each in gradcam(network.model, network.place(images), wanted)]
    cells = [
        Prediction(image.permute(1, 2, 0).squeeze(-1).numpy(), [labels(index) for index in row.tolist()],
                   values.tolist(), title=name, heat=each)
        for image, name, row, values, each in zip(
            shown, answers.names[:len(shown)], classes, probabilities, heat, strict=True)
    ]
    count = f'{len(shown)} of {len(answers.names)}' if len(answers.names) > len(shown) else str(len(shown))
    if draw_contact_sheet(path, cells, f'{Path(args.checkpoint).name or args.model} · {count} images'):
        _logger.info(f'Picture: {path}')


if __name__ == '__main__':
    sys.exit(run_script('inference.py', main, sys.argv[1:]))

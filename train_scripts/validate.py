#!/usr/bin/env python3
"""The accuracy of Inception-ResNet-v2, or any timm model, over every image of a validation set, each counted once.

    python train_scripts/validate.py --data-dir DIR --checkpoint FILE [options]
    python train_scripts/validate.py -c RUN/args.yaml --checkpoint RUN/model_best.pth.tar      # as it was trained
    torchrun --nproc-per-node 8 train_scripts/validate.py --data-dir DIR --checkpoint FILE [options]

The options are those of timm's validate.py; the result does not depend on the number of processes or the batch size.
"""

import csv
import io
import json
import logging
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import RealLabelsImagenet, resolve_data_config
from timm.layers import apply_test_time_pool
from timm.models import create_model, get_pretrained_cfg, is_model, list_models
from timm.utils import decay_batch_step, natural_key, random_seed, reparameterize_model
from torch import Tensor, nn

from timm_npu_irv2 import device as devices
from timm_npu_irv2 import serialization
from timm_npu_irv2.cli.checks import check_image_size
from timm_npu_irv2.cli.flags import INERT, REFUSED, TRAIN_FLAGS, pick
from timm_npu_irv2.cli.parser import Flag, Group, parse_flags
from timm_npu_irv2.cli.script import run_script, start_log
from timm_npu_irv2.data.loader import DeviceLoader
from timm_npu_irv2.distributed import World, gather_objects, initialize, shutdown
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.plots import Prediction, draw_prediction_grid, select_predictions
from timm_npu_irv2.serialization import atomic_write
from timm_npu_irv2.training import setup
from timm_npu_irv2.training.evaluation import evaluate
from timm_npu_irv2.training.loaders import build_eval_loader

_logger = logging.getLogger('validate')

Results = dict[str, Any]


# ------------------------------------------------------------------------------------------------------- options


FLAGS = (
    Group('Data set', (
        *pick('data', 'data_dir', 'dataset', 'dataset_download', 'class_map', 'input_img_mode', 'input_key',
                         'target_key', 'dataset_trust_remote_code', 'on_bad_image'),
        Flag('--split --val-split', 'name of the split', default='validation', rest={'metavar': 'NAME'}),
        Flag('--num-samples --val-num-samples', 'samples in the split, for iterable data sets', int, within='[1, inf)'),
        Flag('--real-labels', 'JSON file of the reassessed labels of ImageNet, to be counted instead', default=''),
        Flag('--valid-labels', 'file of the class indices that the data set has, one a line', default=''),
    )),
    Group('Model', (
        Flag('-m --model', "name of the model; a pattern, 'all' or a file of names validates several",
             default='inception_resnet_v2_npu', rest={'metavar': 'NAME'}),
        Flag('--checkpoint --pth-path', 'weights in any dialect, or a folder of them; the second name is '
             "Ascend ModelZoo's", default='', rest={'metavar': 'FILE'}),
        Flag('--use-ema', 'take the averaged weights of the checkpoint', bool, False),
        Flag('--pretrained', 'the pretrained weights; so it is without --checkpoint', bool, False),
        *pick('num_classes', 'gp', 'model_kwargs', 'fuser', 'fast_norm', 'torchscript',
                         'torchcompile', 'torchcompile_mode'),
        Flag('--reparam', 'reparameterise the model for inference', bool, False),
        Flag('--test-pool', "average over several positions where the images are larger than the model's", bool, False),
    )),
    Group('Images', (
        *pick('img_size', 'in_chans', 'input_size', 'crop_pct', 'mean', 'std', 'interpolation', 'tta'),
        Flag('--use-train-size', "the model's training size, even where it has another one for testing", bool, False),
        Flag('--crop-mode', "(default: the model's)", rest={'choices': ('center', 'squash', 'border')}),
        Flag('--crop-border-pixels', 'pixels to cut off the border', int, within='[0, inf)'),
    )),
    Group('Device and precision', (
        *pick('device', 'device_modules', 'amp', 'amp_dtype', 'model_dtype', 'allow_internal_format',
                         'jit_compile', 'dist_url', 'dist_backend'),
    )),
    Group('Running and results', (
        Flag('-b --batch-size', 'images a process takes at a time', int, 256, '[1, inf)', {'metavar': 'N'}),
        *pick('workers', 'pin_mem', 'no_prefetcher', 'seed'),
        Flag('--log-freq', 'batches between two lines of the log', int, 10, '[1, inf)', {'metavar': 'N'}),
        Flag('--retry', 'halve the batch until it fits the memory', bool, False),
        Flag('--metrics-avg', 'also precision, recall and F1, averaged so (pip install scikit-learn)',
             rest={'choices': ('micro', 'macro', 'weighted')}),
        Flag('--results-file', 'write the results to this file', default='', rest={'metavar': 'FILE'}),
        Flag('--picture', 'draw some of the images with their predictions', default='', rest={'metavar': 'FILE.png'}),
        Flag('--results-format', 'as', default='csv', rest={'choices': ('csv', 'json')}),
    )),
    INERT['validate.py'],
)

NAMES = {name for group in FLAGS for flag in group.flags for name in flag.names.split()}
NAMES_IN_TRAINING = {name for group in TRAIN_FLAGS for flag in group.flags for name in flag.names.split()}

# On the command line an error; in a config, which may be the args.yaml of a training run, without meaning.
UNSUPPORTED = {
    **dict.fromkeys(NAMES_IN_TRAINING - NAMES, 'it is an option of train.py.'),
    **REFUSED,
    '--tf-preprocessing': "it needs TensorFlow, and reproduces what its own models were trained with; use --crop-pct "
                          'and --interpolation.',
    '--aot-autograd': 'torch has dropped what was behind it; use --torchcompile aot_eager.',
}


def parse(argv: Sequence[str]) -> Namespace:
    """The options.

    Raises:
        UserError: An unknown option, a value out of range, a contradiction; one line.
    """
    args = parse_flags(FLAGS, argv, prog='validate.py', refused=UNSUPPORTED, description=(
        "Validate Inception-ResNet-v2, or any timm model, on NPU, CUDA or CPU. The options are those of timm's "
        "validate.py. '-' and '_' in names are the same."))
    args.data_dir = args.data or args.data_dir
    args.pretrained = args.pretrained or not args.checkpoint
    sizes = [size for size in (args.img_size, *(args.input_size or ())[1:]) if size]
    check_image_size(args.model, sizes)
    if args.amp and args.model_dtype not in (None, 'float32'):
        raise UserError(f'--model-dtype {args.model_dtype} is for validation without --amp: leave one out.')
    if args.num_gpu > 1:
        raise UserError(f'--num-gpu {args.num_gpu}: start the processes with torchrun --nproc-per-node {args.num_gpu}.')
    if args.torchscript and args.torchcompile:
        raise UserError('--torchscript and --torchcompile exclude each other.')
    if args.valid_labels and args.real_labels:
        raise UserError('--valid-labels and --real-labels exclude each other.')
    return args


def expand(args: Namespace) -> list[tuple[str, str]]:
    """The (model, checkpoint) pairs to validate: one, unless --model or --checkpoint name several."""
    folder = Path(args.checkpoint)
    if args.checkpoint and folder.is_dir():
        files = [str(path) for suffix in ('pth.tar', 'pth', 'safetensors') for path in folder.glob(f'*.{suffix}')]
        if not files:
            raise UserError(f'--checkpoint {folder}: the folder holds no .pth.tar, .pth or .safetensors.')
        return [(args.model, path) for path in sorted(files, key=natural_key)]
    if args.model == 'all':
        excluded = ['*_in21k', '*_in22k', '*in12k', '*_dino', '*fcmae', '*seer']  # other classes than ImageNet's 1000
        return [(name, '') for name in list_models(pretrained=True, exclude_filters=excluded)]
    if ':' in args.model or is_model(args.model):
        return [(args.model, args.checkpoint)]
    if Path(args.model).is_file():
        return [(line.strip(), '') for line in Path(args.model).read_text().splitlines() if line.strip()]
    names = list_models(args.model, pretrained=True) if any(mark in args.model for mark in '*?[') else []
    if not names:
        raise UserError(f'--model {args.model}: timm has no such model; `timm.list_models()` lists them.')
    return [(name, '') for name in names]


# --------------------------------------------------------------------------------------------------------- story


def main(argv: Sequence[str]) -> int:
    """Read the options, validate each model, write and print the results."""
    args = parse(argv)
    setup.set_global_options(args)
    world = initialize(args.device, dist_url=args.dist_url, backend=args.dist_backend)
    try:
        start_log(world.is_primary)
        devices.configure(world.device, args.allow_internal_format or None, args.jit_compile)
        pairs = expand(args)
        with setup.translate_lost_process_errors(world, 'Start again.'):
            if len(pairs) == 1:
                results: Any = validate(args, world, *pairs[0])
            else:
                results = validate_several(args, world, pairs)
        if world.is_primary:
            if args.results_file:
                write_results(Path(args.results_file), results, args.results_format)
            print(f'--result\n{json.dumps(results, indent=4)}', flush=True)
    finally:
        shutdown(world)
    return 0


def validate_several(args: Namespace, world: World, pairs: Sequence[tuple[str, str]]) -> list[Results]:
    """The results of those models that can be validated, the best first."""
    results = []
    for name, checkpoint in pairs:
        try:
            results.append(validate(args, world, name, checkpoint))
        except UserError as error:
            _logger.error(f'{checkpoint or name} is left out: {error}')
    return sorted(results, key=lambda result: result.get('top1', 0), reverse=True)


def validate(args: Namespace, world: World, name: str, checkpoint: str) -> Results:
    """The results of one model, with a smaller batch if --retry says so and the memory does."""
    args = Namespace(**{**vars(args), 'model': name, 'checkpoint': checkpoint})
    while True:
        try:
            return measure(args, world)
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            smaller = decay_batch_step(args.batch_size)
            advice = f'{world.device}: out of memory with --batch-size {args.batch_size}'
            if not args.retry or not smaller or world.distributed:
                raise UserError(f'{advice}; use a smaller one, or --retry with one process.') from error
        _logger.warning(f'{advice}; trying {smaller}.')
        args.batch_size = smaller


def measure(args: Namespace, world: World) -> Results:
    """Build the model and the loader, go through the images, and work out what is asked for."""
    random_seed(args.seed)
    model = load_model(args)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    data_config = resolve_data_config(vars(args), model=model, use_test_size=not args.use_train_size)
    if args.test_pool:
        model, pooled = apply_test_time_pool(model, data_config)
        data_config['crop_pct'] = 1.0 if pooled else data_config['crop_pct']
    dtype = getattr(torch, args.model_dtype or 'float32')
    data_config['crop_border_pixels'] = args.crop_border_pixels
    loader = build_eval_loader(
        args, data_config, world, split=args.split, batch_size=args.batch_size, num_samples=args.num_samples,
        num_classes=None if args.valid_labels else args.num_classes, dtype=dtype)
    _logger.info(f'{args.model}: {parameters / 1e6:.2f} M parameters, {args.num_classes} classes, '
                 f'{data_config["input_size"][-1]} px; {world.size} × {world.device.type}, '
                 f'{describe_precision(args, world)}; weights: {args.checkpoint or "pretrained"}')
    tally = Tally(len(loader), args.log_freq)
    metrics = evaluate(prepare(model, args, world, dtype), loader, world, autocast=autocast_of(args, world),
                       tta=args.tta, on_batch=tally)
    seconds = time.perf_counter() - tally.started
    answers = gather_objects(tally.answers(loader), world)
    bad_images = sorted(name for names in gather_objects(list(loader.bad_images), world) for name in names)
    loader.close()
    if not world.is_primary:
        return {}
    results = collect(args, data_config, metrics, parameters, seconds, loader, answers)
    if bad_images:
        _logger.warning(f'{len(bad_images)} image(s) could not be read and are not counted; the results name them.')
        results |= {'bad_image_count': len(bad_images), 'bad_images': bad_images}
    return results


def load_model(args: Namespace) -> nn.Module:
    """The model with its weights, on the CPU; ``args.num_classes`` becomes its number of classes."""
    state_dict = serialization.load_weights(args.checkpoint, args.use_ema) if args.checkpoint else None
    if state_dict is not None and args.num_classes is None:
        args.num_classes = classes_in(state_dict, args.model)
    try:
        model = create_model(
            args.model,
            pretrained=args.pretrained and state_dict is None,
            num_classes=args.num_classes,
            in_chans=args.in_chans or (args.input_size or [3])[0],
            global_pool=args.gp,
            scriptable=args.torchscript,
            **args.model_kwargs,
        )
        if state_dict is not None:
            model.load_state_dict(state_dict)
    except UserError:
        raise
    except (RuntimeError, OSError, TypeError, ValueError, AssertionError) as error:
        reason = ' '.join(str(error).split())[:300]
        raise UserError(f'{args.checkpoint or f"--model {args.model}"}: {reason}') from error
    args.num_classes = args.num_classes or model.num_classes
    return reparameterize_model(model) if args.reparam else model


def classes_in(state_dict: dict[str, Tensor], name: str) -> int | None:
    """The number of classes of a checkpoint, from its classifier; None if it cannot be told."""
    config = get_pretrained_cfg(name) if is_model(name) else None
    for classifier in (getattr(config, 'classifier', None), 'classif', 'last_linear'):
        for prefix in ('', 'module.'):
            if isinstance(classifier, str) and f'{prefix}{classifier}.weight' in state_dict:
                return len(state_dict[f'{prefix}{classifier}.weight'])
    return None


def prepare(model: nn.Module, args: Namespace, world: World, dtype: torch.dtype) -> nn.Module:
    """The model on its device, compiled if asked, with the columns of --valid-labels."""
    model = setup.place_model(
        model.to(dtype).eval(), world, channels_last=args.channels_last, torchscript=args.torchscript)
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    if not args.valid_labels:
        return model
    try:
        labels = [int(line) for line in Path(args.valid_labels).read_text().split()]
    except (OSError, ValueError) as error:
        raise UserError(f'--valid-labels {args.valid_labels}: {error}') from error
    if not labels or max(labels) >= args.num_classes:
        raise UserError(f'--valid-labels {args.valid_labels}: expected indices below {args.num_classes}, one a line.')
    return Columns(model, labels)


def autocast_of(args: Namespace, world: World) -> Callable:
    """The context of the forward pass."""
    dtype = getattr(torch, args.amp_dtype) if args.amp_dtype else devices.half_dtype(world.device)
    return partial(devices.autocast, world.device, dtype if args.amp else None)


def describe_precision(args: Namespace, world: World) -> str:
    """What is computed in, in words."""
    if args.amp:
        return f'{args.amp_dtype or str(devices.half_dtype(world.device)).removeprefix("torch.")} autocast'
    return args.model_dtype or 'float32'


class Columns(nn.Module):
    """Some of a model's logits: those of the classes that a data set has."""

    def __init__(self, model: nn.Module, labels: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer('labels', torch.tensor(labels, device=next(model.parameters()).device))

    def forward(self, images: Tensor) -> Tensor:
        """The logits (N, len(labels)) of images (N, C, H, W)."""
        return self.model(images)[:, self.labels]


@dataclass
class Tally:
    """The first five answers for each image of this process, and a line of the log now and then."""

    batches: int
    log_freq: int
    started: float = field(default_factory=time.perf_counter)
    answered: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)

    def __call__(self, index: int, output: Tensor, target: Tensor) -> None:
        """Take a batch; :func:`evaluate` calls it."""
        self.answered.append(output.topk(min(5, output.shape[1]), dim=1).indices)
        self.targets.append(target)
        if index % self.log_freq == 0:
            _logger.info(f'Validate [{index + 1:>{len(str(self.batches))}}/{self.batches}]')

    def answers(self, loader: Any) -> tuple[list[int] | None, list[list[int]], list[int]]:
        """The images' indices in the data set, their answers and their targets."""
        if not self.targets:
            return [], [], []
        return loader.indices, torch.cat(self.answered).tolist(), torch.cat(self.targets).tolist()


# ------------------------------------------------------------------------------------------------------- results


def collect(
        args: Namespace,
        data_config: dict[str, Any],
        metrics: dict[str, float],
        parameters: int,
        seconds: float,
        loader: Any,
        answers: Sequence[tuple[list[int], list[list[int]], list[int]]],
) -> Results:
    """timm's entries, then ours."""
    if args.real_labels:
        metrics = {**metrics, **real_accuracy(args, loader, answers)}
    results = {'model': args.model}
    for key in 'top1', 'top5':
        results |= {key: round(metrics[key], 4), f'{key}_err': round(100 - metrics[key], 4)}
    if args.metrics_avg:
        results |= averaged_metrics(args.metrics_avg, answers)
    results |= {
        'param_count': round(parameters / 1e6, 2),
        'img_size': data_config['input_size'][-1],
        'crop_pct': data_config['crop_pct'],
        'interpolation': data_config['interpolation'],
        'loss': metrics['loss'],
        'count': metrics['count'],
        'images_per_second': round(metrics['count'] / seconds, 2),
    }
    if args.checkpoint:
        results['checkpoint'] = args.checkpoint
    if args.picture:
        draw_answers(args, loader, answers)
    _logger.info(f' * Acc@1 {results["top1"]:.3f} ({results["top1_err"]:.3f}) '
                 f'Acc@5 {results["top5"]:.3f} ({results["top5_err"]:.3f}) of {metrics["count"]} images')
    return results


def real_accuracy(args: Namespace, loader: Any, answers: Sequence[tuple]) -> dict[str, float]:
    """Top-1 and top-5 in percent by the reassessed labels, over the images that have any."""
    if not isinstance(loader, DeviceLoader):
        raise UserError('--real-labels needs a data set with file names.')
    try:
        labels = RealLabelsImagenet(loader.samples.filenames(basename=True), args.real_labels).real_labels
    except (AssertionError, AttributeError, OSError, ValueError) as error:
        reason = str(error) or 'the data set is not the 50000 images of ImageNet'
        raise UserError(f'--real-labels {args.real_labels}: {reason}') from error
    hits: dict[str, list[bool]] = {'top1': [], 'top5': []}
    for indices, answered, _ in answers:
        for index, guesses in zip(indices, answered, strict=True):
            right = labels[loader.samples.filename(index, basename=True)]
            if right:
                hits['top1'].append(guesses[0] in right)
                hits['top5'].append(any(guess in right for guess in guesses))
    return {key: 100 * sum(values) / max(len(values), 1) for key, values in hits.items()}


def draw_answers(args: Namespace, loader: Any, answers: Sequence[tuple]) -> None:
    """SampleKey wrong and right answers; the wrong ones first."""
    if not isinstance(loader, DeviceLoader):
        raise UserError('--picture needs a data set with an index.')
    names = {index: name for name, index in (loader.class_to_idx or {}).items()}
    every = sorted((index, answered[0], target) for process in answers
                   for index, answered, target in zip(*process, strict=True))
    right = sum(answer == target for _, answer, target in every)
    draw_prediction_grid(Path(args.picture), [
        Prediction(loader.samples[index][0], [str(names.get(answer, answer))], target=str(names.get(target, target)))
        for index, answer, target in select_predictions(every)
    ], title=f'{right} of {len(every)} right ({100 * right / max(len(every), 1):.2f} %)')


def averaged_metrics(average: str, answers: Sequence[tuple]) -> dict[str, float]:
    """Precision, recall and F1 in percent."""
    try:
        from sklearn.metrics import precision_recall_fscore_support  # noqa: PLC0415 (an optional dependency)
    except ImportError as error:
        raise UserError('--metrics-avg needs scikit-learn: pip install scikit-learn.') from error
    guesses = [answer[0] for _, answered, _ in answers for answer in answered]
    targets = [target for _, _, own in answers for target in own]
    scores = precision_recall_fscore_support(targets, guesses, average=average, zero_division=0)
    names = 'precision', 'recall', 'f1_score'
    return {f'{average}_{name}': round(100 * float(score), 4) for name, score in zip(names, scores[:3], strict=True)}


def write_results(path: Path, results: Results | list[Results], format: str) -> None:
    """Write one result, or several, as JSON or as the lines of a CSV table."""
    if format == 'json':
        text = json.dumps(results, indent=4) + '\n'
    else:
        rows = results if isinstance(results, list) else [results]
        table = io.StringIO()
        writer = csv.DictWriter(table, list(dict.fromkeys(name for row in rows for name in row)), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
        text = table.getvalue()
    atomic_write(path, text)


if __name__ == '__main__':
    sys.exit(run_script('validate.py', main, sys.argv[1:]))

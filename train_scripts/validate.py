#!/usr/bin/env python3
"""Measure the accuracy of Inception-ResNet-v2, or any timm model, over every image of a validation set.

    python train_scripts/validate.py --data-dir DIR --checkpoint FILE [options]
    python train_scripts/validate.py -c RUN/args.yaml --checkpoint RUN/model_best.pth.tar      # options of the training
    python train_scripts/validate.py --data-dir DIR --checkpoint FILE DEPLOYED model.onnx int8.onnx    # one table
    torchrun --nproc-per-node 8 train_scripts/validate.py --data-dir DIR --checkpoint FILE [options]

The options are those of timm's validate.py. Each image counts once, so the result depends neither on the number of
processes nor on the batch size.
"""

import timm_npu_irv2.cli.environment  # noqa: F401 - sets variables that torch reads when it is loaded

# isort: split
import sys

from timm_npu_irv2.cli.script import check_command_line
from timm_npu_irv2.cli.validate_flags import VALIDATE

if __name__ == '__main__':
    check_command_line(VALIDATE, sys.argv[1:])  # before the imports below, which take seconds

# isort: split
import contextlib
import json
import logging
import os
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import is_model, list_models
from timm.utils import decay_batch_step, natural_key, random_seed, reparameterize_model
from torch import nn

from timm_npu_irv2 import device as devices
from timm_npu_irv2 import hub, serialization
from timm_npu_irv2.cli.checks import (
    check_compile_backend,
    check_image_size,
    check_installed,
    check_output_file,
    check_rules,
    dataset_rules,
    translate_compile_errors,
)
from timm_npu_irv2.cli.evaluation import (
    check_deployed,
    classes_in,
    describe_precision,
    engine_options,
    engine_rules,
    prepare_model,
    select_classes,
)
from timm_npu_irv2.cli.flags import device_switches
from timm_npu_irv2.cli.script import leave_at_end, run_script, start_log
from timm_npu_irv2.cli.table import to_csv, to_text
from timm_npu_irv2.cli.tuned import eval_workload, use_tuned
from timm_npu_irv2.data.classes import class_indices
from timm_npu_irv2.data.pipeline import ImagePipeline, pool_over_positions, remember_training, trained_channels
from timm_npu_irv2.deploy import is_deployed, open_deployed, to_inference
from timm_npu_irv2.distributed import World, agree, gather_objects, initialize, together
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.hub.client import download
from timm_npu_irv2.published import CONFIG, WEIGHTS, split_revision
from timm_npu_irv2.serialization import atomic_write
from timm_npu_irv2.training import setup
from timm_npu_irv2.training.answers import (
    ProcessAnswers,
    Tally,
    averaged_metrics,
    check_index,
    draw_answers,
    read_real_labels,
    real_accuracy,
)
from timm_npu_irv2.training.evaluation import evaluate
from timm_npu_irv2.training.loaders import build_eval_loader
from timm_npu_irv2.tuning import preserve_settings

_logger = logging.getLogger('validate')

Results = dict[str, Any]
ENDINGS = ('.pth.tar', '.pth', '.safetensors', '.onnx', '.om')
TABLE = {'network': 'network', 'format': 'format', 'top1': 'top-1', 'top5': 'top-5', 'loss': 'loss',
         'images_per_second': 'images/s', 'file_mb': 'MB'}


class Candidate(NamedTuple):
    """A network to validate.

    Attributes:
        model: Name of its model, 'hf-hub:…' and 'local-dir:…' included.
        checkpoint: File of its weights or deployed network; empty for published and pretrained ones.
        place: Word of --checkpoint that names it; empty without one.
    """

    model: str
    checkpoint: str
    place: str = ''


class Loaded(NamedTuple):
    """A network with its weights.

    Attributes:
        model: Network from images to logits.
        format: Format of its file, in words.
        size: Number of bytes of its file; None for pretrained weights of timm.
        deployed: True for a network that is ready to run, False for a trained model.
    """

    model: Any
    format: str
    size: int | None
    deployed: bool


class Job(NamedTuple):
    """A candidate ready to be evaluated.

    Attributes:
        model: Network on its device.
        loader: Batches of images.
        figures: Entries of the results.
        autocast: Context of the forward pass.
        real_labels: Classes by the stem of the file name, in place of those of the data set; None for the latter.
    """

    model: nn.Module
    loader: Any
    figures: dict[str, Any]
    autocast: Callable[[], contextlib.AbstractContextManager]
    real_labels: Mapping[str, Sequence[int]] | None = None


# ------------------------------------------------------------------------------------------------------- options


def parse(argv: Sequence[str]) -> Namespace:
    """Parse the options.

    Raises:
        UserError: Unknown option, value out of range, or contradiction.
    """
    args = VALIDATE.parse(argv)
    args.checkpoint = [each for each in args.checkpoint if each]
    args.data_dir = args.data or args.data_dir
    if len(args.checkpoint) > 1 and not args.data_dir and not args.dataset and _is_data(args.checkpoint[-1]):
        args.data_dir = args.checkpoint.pop()  # `--checkpoint FILE DIR`, which argparse takes for two files
    args.pretrained = args.pretrained or not args.checkpoint
    check_image_size(args.model, [size for size in (args.img_size, *(args.input_size or ())[1:]) if size])
    check_rules([
        (args.amp and args.model_dtype not in (None, 'float32'),
         f'--model-dtype {args.model_dtype} is for validation without --amp: leave one out.'),
        (args.num_gpu > 1,
         f'--num-gpu {args.num_gpu}: start the processes with torchrun --nproc-per-node {args.num_gpu}.'),
        (args.torchscript and args.torchcompile, '--torchscript and --torchcompile exclude each other.'),
        (args.valid_labels and args.real_labels, '--valid-labels and --real-labels exclude each other.'),
        *dataset_rules(args.dataset),
        *engine_rules(args),
    ])
    check_compile_backend(args.torchcompile)
    check_output_file('--results-file', args.results_file)
    check_output_file('--picture', args.picture)
    if args.picture:
        check_installed('--picture', 'matplotlib')
    if args.metrics_avg:
        check_installed('--metrics-avg', 'sklearn')
    return args


def _is_data(place: str) -> bool:
    return Path(place).is_dir() and not (Path(place) / CONFIG).is_file()


def find_candidates(model: str, checkpoints: Sequence[str] = ()) -> list[Candidate]:
    """Return the networks to validate: one, unless --model or --checkpoint names several."""
    if checkpoints and (':' in model or is_model(model)):
        return [candidate for place in checkpoints for candidate in _candidates_at(model, place)]
    if model == 'all':
        excluded = ['*_in21k', '*_in22k', '*in12k', '*_dino', '*fcmae', '*seer']  # other classes than ImageNet's 1000
        return [Candidate(name, '') for name in list_models(pretrained=True, exclude_filters=excluded)]
    if ':' in model or is_model(model):
        return [Candidate(model, '')]
    if os.path.isfile(model):  # noqa: PTH113 - Path.is_file may raise
        lines = serialization.read_text(model, f'--model {model}').splitlines()
        return [Candidate(line.strip(), '') for line in lines if line.strip()]
    names = list_models(model, pretrained=True) if any(mark in model for mark in '*?[') else []
    if not names:
        raise UserError(f'--model {model}: timm has no such model; `timm.list_models()` lists them.')
    return [Candidate(name, '') for name in names]


def _candidates_at(model: str, place: str) -> list[Candidate]:
    """Return the network in a place that --checkpoint names, or all networks in a folder."""
    if place.startswith(('hf-hub:', 'local-dir:')):
        return [Candidate(place, '', place)]
    folder = Path(place)
    if not folder.is_dir() or is_deployed(folder):
        return [Candidate(model, place, place)]
    if (folder / CONFIG).is_file():
        return [Candidate(f'local-dir:{place}', '', place)]
    files = [str(path) for ending in ENDINGS for path in folder.glob(f'*{ending}')]
    if not files:
        raise UserError(f'--checkpoint {folder}: no {", ".join(ENDINGS)} or {CONFIG} in this folder.')
    return [Candidate(model, path, path) for path in sorted(files, key=natural_key)]


# --------------------------------------------------------------------------------------------------------- story


def main(argv: Sequence[str]) -> int:
    """Parse the options, validate each model, and write and print the results."""
    args = parse(argv)
    setup.set_global_options(args)
    world = initialize(args.device, dist_url=args.dist_url, backend=args.dist_backend)
    with leave_at_end(world, 'validate.py'):
        start_log(world.is_primary)
        devices.configure(world.device, **device_switches(args))
        candidates = agree(lambda: find_candidates(args.model, args.checkpoint), world)
        lost_process = setup.translate_lost_process_errors(world, 'Start again.')
        with lost_process, translate_compile_errors(args.torchcompile):
            if len(candidates) == 1:
                results: Any = validate(args, world, candidates[0])
            else:
                results = validate_several(args, world, candidates)
        if world.is_primary:
            if args.results_file:
                write_results(Path(args.results_file), results, args.results_format)
            if len(candidates) > 1:
                print(to_text([{'network': row.get('checkpoint', row['model']), **row} for row in results], TABLE))
            print(f'--result\n{json.dumps(results, indent=4)}', flush=True)
        if len(args.checkpoint) > 1 and len(results) < len(candidates):
            raise UserError(f'{len(candidates) - len(results)} of {len(candidates)} networks could not be validated.')
    return 0


def validate_several(args: Namespace, world: World, candidates: Sequence[Candidate]) -> list[Results]:
    """Return the results of all models that can be validated, the best first."""
    results = []
    for candidate in candidates:
        try:
            results.append(validate(args, world, candidate))
        except UserError as error:  # in every process, see together()
            if world.is_primary:
                _logger.error(f'Skipped {candidate.place or candidate.model}: {error}')
    if not results:
        raise UserError(f'none of the {len(candidates)} networks could be validated.')
    return sorted(results, key=lambda result: result.get('top1', 0), reverse=True)


def validate(args: Namespace, world: World, candidate: Candidate) -> Results:
    """Return the results of one model; with --retry, the batch size is reduced until a batch fits into memory."""
    batch_size = args.batch_size
    while True:
        try:
            with preserve_settings(world.device):  # those of --tuned are for this network and batch size
                return measure(args, world, candidate, batch_size)
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            smaller = decay_batch_step(batch_size)
            advice = f'{world.device}: out of memory with --batch-size {batch_size}'
            if not args.retry or not smaller or world.distributed:
                raise UserError(f'{advice}; use a smaller one, or --retry with one process.') from error
        _logger.warning(f'{advice}; trying {smaller}.')
        batch_size = smaller


def measure(args: Namespace, world: World, candidate: Candidate, batch_size: int) -> Results:
    """Return the results of one model on rank 0, nothing on the others. If one process fails, all of them do."""
    random_seed(args.seed)
    job = together(lambda: build_job(args, world, candidate, batch_size), world)
    tally = Tally(len(job.loader), args.log_freq, keep=bool(args.real_labels or args.metrics_avg or args.picture))
    with contextlib.closing(job.loader):
        metrics = evaluate(job.model, job.loader, world, tta=args.tta, on_batch=tally, autocast=job.autocast)
        seconds = time.perf_counter() - tally.started
        answers = gather_objects(tally.answers(job.loader), world) if tally.keep else []
        bad_images = sorted(name for names in gather_objects(list(job.loader.bad_images), world) for name in names)
    results = agree(lambda: collect(args, candidate, metrics, job, seconds, answers), world)
    if bad_images:
        _logger.warning(f'{len(bad_images)} unreadable image(s) were not counted; the results name them.')
        results |= {'bad_image_count': len(bad_images), 'bad_images': bad_images}
    return results if world.is_primary else {}


def build_job(args: Namespace, world: World, candidate: Candidate, batch_size: int) -> Job:
    """Return a candidate ready to be evaluated in this process."""
    model, format, size, deployed = load(args, candidate, world.device)
    num_classes = args.num_classes or model.num_classes
    parameters = sum(parameter.numel() for parameter in model.parameters())
    pipeline = ImagePipeline.for_model(model, vars(args), use_test_size=not args.use_train_size)
    class_to_idx = None if args.valid_labels else class_indices(model.pretrained_cfg.get('label_names'))
    if args.test_pool:
        model, pipeline = pool_over_positions(model, pipeline)
    args = use_tuned(args, world.device, **eval_workload(args, world.device, batch_size, pipeline.input_size, deployed))
    dtype = torch.float32 if args.engine or deployed else getattr(torch, args.model_dtype or 'float32')
    amp_dtype = getattr(torch, args.amp_dtype) if args.amp_dtype else devices.half_dtype(world.device)
    loader = build_eval_loader(
        args, pipeline, world, split=args.split, batch_size=batch_size, num_samples=args.num_samples,
        num_classes=None if args.valid_labels else num_classes, class_to_idx=class_to_idx, dtype=dtype)
    real_labels = read_real_labels(args.real_labels, loader) if args.real_labels else None
    if args.picture:
        check_index('--picture', loader)
    precision = format if deployed else describe_precision(dtype, amp_dtype if args.amp else None)
    _logger.info(f'{candidate.model}: {parameters / 1e6:.2f} M parameters, {num_classes} classes, '
                 f'{pipeline.input_size[-1]} px; {world.size} × {world.device.type}, {precision}; '
                 f'weights: {candidate.place or "pretrained"}')
    figures = {'param_count': round(parameters / 1e6, 2) or None, 'img_size': pipeline.input_size[-1],
               'crop_pct': pipeline.crop_pct, 'interpolation': pipeline.interpolation, 'format': format,
               'file_mb': round(size / 1e6, 1) if size else None}
    return Job(prepare(args, model, world.device, dtype, num_classes, deployed=deployed), loader, figures,
               partial(devices.autocast, world.device, amp_dtype if args.amp else None), real_labels)


def load(args: Namespace, candidate: Candidate, device: torch.device) -> Loaded:
    """Return the network of a candidate: a deployed one on its device, a model on the CPU."""
    path = Path(candidate.checkpoint)
    if candidate.checkpoint and is_deployed(path):
        opened = open_deployed(path, device)
        check_deployed(args, opened.network, candidate.checkpoint)
        return Loaded(opened.network, opened.format, opened.size, True)
    if candidate.checkpoint:
        return Loaded(load_model(args, candidate), 'checkpoint', path.stat().st_size, False)
    model = load_model(args, candidate)
    source, _, place = candidate.model.partition(':')
    folder = download(*split_revision(place)) if source == 'hf-hub' else Path(place)  # from the cache
    size = (folder / WEIGHTS).stat().st_size if place else None
    return Loaded(model, 'published' if place else 'pretrained', size, False)


def load_model(args: Namespace, candidate: Candidate) -> nn.Module:
    """Return the model with its weights, on the CPU. Without --num-classes, a checkpoint decides their number."""
    content = serialization.read_checkpoint(candidate.checkpoint) if candidate.checkpoint else {}
    state_dict = (args.use_ema and content.get('state_dict_ema')) or content.get('state_dict')
    model = hub.create_model(
        candidate.model,
        pretrained=(args.pretrained or not candidate.checkpoint) and state_dict is None,
        num_classes=args.num_classes or (classes_in(state_dict, candidate.model) if state_dict else None),
        in_chans=args.in_chans or (args.input_size or [trained_channels(content)])[0],
        global_pool=args.gp,
        scriptable=args.torchscript,
        **args.model_kwargs,
    )
    if state_dict is not None:
        try:
            model.load_state_dict(state_dict)
            remember_training(model.pretrained_cfg, content, model.num_classes)
        except UserError:
            raise
        except (RuntimeError, ValueError) as error:
            raise UserError(f'{candidate.checkpoint}: {" ".join(str(error).split())[:300]}') from error
    return reparameterize_model(model) if args.reparam else model


def prepare(
        args: Namespace, model: nn.Module, device: torch.device, dtype: torch.dtype, num_classes: int, deployed: bool,
) -> nn.Module:
    """Return the model on its device, compiled if asked, reduced to the classes of --valid-labels."""
    if deployed:
        pass  # it is on its device, and compiled
    elif args.engine:
        model = to_inference(model.eval(), **engine_options(args, device))
        _logger.info(f'Engine: {args.engine}{", int8" if args.calibration else ""}')
    else:
        model = prepare_model(model, device, dtype, torchscript=args.torchscript)
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    return select_classes(model, args.valid_labels, num_classes) if args.valid_labels else model


# ------------------------------------------------------------------------------------------------------- results


def collect(
        args: Namespace, candidate: Candidate, metrics: dict[str, float], job: Job, seconds: float,
        answers: Sequence[ProcessAnswers],
) -> Results:
    """Return the entries of timm's validate.py, then those of this script."""
    if job.real_labels is not None:
        metrics = {**metrics, **real_accuracy(job.real_labels, job.loader, answers)}
    results: Results = {'model': candidate.model}
    for key in 'top1', 'top5':
        results |= {key: round(metrics[key], 4), f'{key}_err': round(100 - metrics[key], 4)}
    if args.metrics_avg:
        results |= averaged_metrics(args.metrics_avg, answers)
    results |= {**job.figures, 'loss': metrics['loss'], 'count': metrics['count'],
                'images_per_second': round(metrics['count'] / seconds, 2)}
    if candidate.place:
        results['checkpoint'] = candidate.place
    if args.picture:
        draw_answers(Path(args.picture), job.loader, answers)
    _logger.info(f' * Acc@1 {results["top1"]:.3f} ({results["top1_err"]:.3f}) '
                 f'Acc@5 {results["top5"]:.3f} ({results["top5_err"]:.3f}) of {metrics["count"]} images')
    return results


def write_results(path: Path, results: Results | list[Results], format: str) -> None:
    """Write one result, or several, as JSON or as the rows of a CSV table."""
    if format == 'json':
        atomic_write(path, json.dumps(results, indent=4) + '\n')
    else:
        atomic_write(path, to_csv(results if isinstance(results, list) else [results]))


if __name__ == '__main__':
    sys.exit(run_script('validate.py', main, sys.argv[1:]))

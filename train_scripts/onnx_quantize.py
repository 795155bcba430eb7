#!/usr/bin/env python3
"""Quantise an ONNX file of onnx_export.py to int8, and measure its loss of accuracy.

    python train_scripts/onnx_quantize.py model.onnx model_int8.onnx --calibration FOLDER_OF_IMAGES

The ranges of the activations come from the images of the calibration folder. --method auto tries each method, and
float32 for the first and the last layer, and keeps what changes the logits of other images least: every second image of
the calibration folder, which is then left out of calibration. The loss is measured on the images that --evaluation
names, else on these. A file that loses more than --max-loss is not written.
"""

import timm_npu_irv2.cli.environment  # noqa: F401 - sets variables that torch reads when it is loaded

# isort: split
import sys

from timm_npu_irv2.cli.onnx_flags import ONNX_QUANTIZE
from timm_npu_irv2.cli.script import check_command_line

if __name__ == '__main__':
    check_command_line(ONNX_QUANTIZE, sys.argv[1:])  # before the imports below, which take seconds

# isort: split
import copy
import logging
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from timm_npu_irv2.cli.checks import check_output_file, check_rules
from timm_npu_irv2.cli.script import run_script, start_log
from timm_npu_irv2.deploy import onnx, quantization
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.serialization import atomic_write

_logger = logging.getLogger('onnx_quantize')


def parse(argv: Sequence[str]) -> Namespace:
    """Return the options.

    Raises:
        UserError: An unknown option, a value out of range, a missing file or folder.
    """
    args = ONNX_QUANTIZE.parse(argv)
    check_output_file('INT8.onnx', args.output)
    args.model, args.output = Path(args.model), Path(args.output)
    check_rules([
        (not args.model.is_file(), f'{args.model}: no such file.'),
        (not args.calibration, '--calibration DIR is missing: name a folder of images like those the model will see.'),
        (args.model.resolve() == args.output.resolve(), 'the int8 file would overwrite the float32 one.'),
    ])
    return args


def main(argv: Sequence[str]) -> int:
    """Calibrate, quantise, compare."""
    args = parse(argv)
    start_log()
    config = onnx.preprocessing(args.model)
    calibration = quantization.ModelInputs(args.calibration, config, args.on_bad_image)
    held_out = calibration.split() if args.method == 'auto' or not args.evaluation else None
    evaluation = quantization.ModelInputs(args.evaluation, config, args.on_bad_image) if args.evaluation else held_out
    evaluation.keep(args.evaluation_images)
    calibration.keep(args.images)
    with tempfile.TemporaryDirectory() as folder:
        int8 = Path(folder) / 'int8.onnx'
        recipe = quantize(args, int8, calibration, held_out)
        _logger.info(f'{int8.stat().st_size / 1e6:.1f} MB (float32: {args.model.stat().st_size / 1e6:.1f}), '
                     f'calibrated by {recipe} with {len(calibration)} images')
        loss = quantization.compare(args.model, int8, evaluation)
        report(loss)
        check_loss(loss, args.max_loss)
        atomic_write(args.output, int8.read_bytes())
    return 0


def quantize(
        args: Namespace,
        output: Path,
        calibration: quantization.ModelInputs,
        held_out: quantization.ModelInputs | None,
) -> quantization.Recipe:
    """Write the int8 file and return how it was calibrated."""
    options = {'per_channel': not args.per_tensor, 'reduce_range': not args.full_range}
    if args.method == 'auto':
        chosen = copy.copy(held_out)
        chosen.keep(args.images)
        return quantization.quantize_best(args.model, output, calibration, chosen, **options)
    quantization.quantize(args.model, output, calibration, method=args.method, **options)
    return quantization.Recipe(args.method)


def report(loss: quantization.Loss) -> None:
    """Print the accuracy before and after."""
    print(f'same answer as float32 on {100 * loss.agreement:.2f} % of {loss.images} images; '
          f'logits differ by {loss.error:.1e} (relative)')
    if loss.top1:
        before, after = (100 * share for share in loss.top1)
        print(f'top-1 {after:.2f} % (float32: {before:.2f} %), a loss of {before - after:.2f}')


def check_loss(loss: quantization.Loss, limit: float | None) -> None:
    """Raise UserError if int8 loses more than ``limit`` (see --max-loss)."""
    if loss.top1:
        limit, lost = 1.0 if limit is None else limit, 100 * (loss.top1[0] - loss.top1[1])
        what = f'int8 loses {lost:.2f} points of top-1'
    else:
        limit, lost = 5.0 if limit is None else limit, 100 * (1 - loss.agreement)
        what = f'int8 gives another answer on {lost:.2f} % of the images'
    if lost > limit:
        raise UserError(f'{what}, more than --max-loss {limit:g}: no file was written. Calibrate with more images, or '
                        'images more like those the model was trained on; or raise --max-loss.')


if __name__ == '__main__':
    sys.exit(run_script('onnx_quantize.py', main, sys.argv[1:]))

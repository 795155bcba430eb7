#!/usr/bin/env python3
"""Quantise an ONNX file of onnx_export.py to int8, and measure its loss of accuracy.

    python train_scripts/onnx_quantize.py model.onnx model_int8.onnx --calibration FOLDER_OF_IMAGES

The ranges of the activations come from the images of the calibration folder. The loss is measured on the images that
--evaluation names, else on every second image of the calibration folder, which is then left out of calibration.
"""

import timm_npu_irv2.cli.environment  # noqa: F401 - sets variables that torch reads when it is loaded

# isort: split
import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from timm_npu_irv2.cli.flags import pick
from timm_npu_irv2.cli.parser import Flag, Group, parse_flags
from timm_npu_irv2.cli.script import run_script, start_log
from timm_npu_irv2.deploy import onnx, quantization
from timm_npu_irv2.errors import UserError

_logger = logging.getLogger('onnx_quantize')

FLAGS = (
    Group('Files', (
        Flag('model', 'ONNX file of onnx_export.py', rest={'metavar': 'FILE.onnx'}),
        Flag('output', 'file to write', rest={'metavar': 'INT8.onnx'}),
        Flag('--calibration', 'folder or tar file of images such as the model will see', default='',
             rest={'metavar': 'DIR'}),
        Flag('--evaluation', 'folder or tar file of images on which int8 is compared with float32; class folders give '
             'the accuracy, too', default='', rest={'metavar': 'DIR'}),
        *pick('on_bad_image'),
    )),
    Group('Quantisation', (
        Flag('--images', 'largest number of images for calibration', int, 100, '[1, inf)', {'metavar': 'N'}),
        Flag('--evaluation-images', 'largest number of images for the comparison', int, 1000, '[1, inf)',
             {'metavar': 'N'}),
        Flag('--method', 'method that finds the ranges of the activations', default='minmax',
             rest={'choices': ('minmax', 'entropy', 'percentile')}),
        Flag('--per-tensor', 'use one scale for all channels of a convolution', bool, False),
        Flag('--full-range', 'use weights of 8 bits, for CPUs with VNNI and for NPUs; other CPUs overflow with '
             'more than 7', bool, False),
    )),
)


def parse(argv: Sequence[str]) -> Namespace:
    """Return the options.

    Raises:
        UserError: An unknown option, a value out of range, a missing file or folder.
    """
    args = parse_flags(FLAGS, argv, prog='onnx_quantize.py', description=(
        "Quantise an ONNX file of onnx_export.py to int8 with ONNX Runtime's tools, and measure the loss of accuracy."))
    args.model, args.output = Path(args.model), Path(args.output)
    wrong = [
        (not args.model.is_file(), f'{args.model}: no such file.'),
        (not args.calibration, '--calibration DIR is missing: name a folder of images such as the model will see.'),
        (not args.output.parent.is_dir(), f'cannot write {args.output}: there is no folder {args.output.parent}.'),
        (args.model.resolve() == args.output.resolve(), 'the int8 file would overwrite the float32 one.'),
    ]
    for is_wrong, text in wrong:
        if is_wrong:
            raise UserError(text)
    return args


def main(argv: Sequence[str]) -> int:
    """Calibrate, quantise, compare."""
    args = parse(argv)
    start_log()
    config = onnx.preprocessing(args.model)
    calibration = quantization.ModelInputs(args.calibration, config, args.on_bad_image)
    evaluation = (quantization.ModelInputs(args.evaluation, config, args.on_bad_image) if args.evaluation
                  else calibration.split())
    calibration.keep(args.images)
    evaluation.keep(args.evaluation_images)
    quantization.quantize(args.model, args.output, calibration, per_channel=not args.per_tensor,
                          reduce_range=not args.full_range, method=args.method)
    size, before = (path.stat().st_size / 1e6 for path in (args.output, args.model))
    _logger.info(f'{args.output}: {size:.1f} MB (float32: {before:.1f}), calibrated with {len(calibration)} images')
    loss = quantization.compare(args.model, args.output, evaluation)
    print(f'same answer as float32 on {100 * loss.agreement:.2f} % of {loss.images} images; '
          f'logits differ by {loss.error:.1e} (relative)')
    if loss.top1:
        before, after = (100 * share for share in loss.top1)
        print(f'top-1 {after:.2f} % (float32: {before:.2f} %), a loss of {before - after:.2f}')
    return 0


if __name__ == '__main__':
    sys.exit(run_script('onnx_quantize.py', main, sys.argv[1:]))

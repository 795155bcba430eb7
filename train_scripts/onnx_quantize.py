#!/usr/bin/env python3
"""An ONNX file of onnx_export.py in int8, with what that costs in accuracy.

    python train_scripts/onnx_quantize.py model.onnx model_int8.onnx --calibration FOLDER_OF_IMAGES

Activations get their ranges from the images of the calibration folder. The loss is measured on other images where
--evaluation names some, else on every second image of the calibration folder, which is then left out of calibration.
"""

import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from timm_npu_irv2.cli.parser import Flag, Group, parse_flags
from timm_npu_irv2.cli.script import run_script, start_log
from timm_npu_irv2.deploy import onnx, quantization
from timm_npu_irv2.errors import UserError

_logger = logging.getLogger('onnx_quantize')

FLAGS = (
    Group('Files', (
        Flag('model', 'what onnx_export.py has written', rest={'metavar': 'FILE.onnx'}),
        Flag('output', 'the file to write', rest={'metavar': 'INT8.onnx'}),
        Flag('--calibration', 'folder of images such as the model will see', default='', rest={'metavar': 'DIR'}),
        Flag('--evaluation', 'folder of images to compare int8 with float32 on; with a subfolder for each class the '
             'accuracy is told, too', default='', rest={'metavar': 'DIR'}),
    )),
    Group('Quantisation', (
        Flag('--images', 'take at most so many for calibration', int, 100, '[1, inf)', {'metavar': 'N'}),
        Flag('--evaluation-images', 'and for the comparison', int, 1000, '[1, inf)', {'metavar': 'N'}),
        Flag('--method', 'how ranges are found', default='minmax',
             rest={'choices': ('minmax', 'entropy', 'percentile')}),
        Flag('--per-tensor', 'one scale for all channels of a convolution', bool, False),
        Flag('--full-range', 'weights of 8 bits, for CPUs with VNNI and for NPUs; others overflow, so they get 7', bool,
             False),
    )),
)


def parse(argv: Sequence[str]) -> Namespace:
    """The options. Raises UserError for what is wrong with them, in one line."""
    args = parse_flags(FLAGS, argv, prog='onnx_quantize.py', description=(
        "Quantise an ONNX file of onnx_export.py to int8 with ONNX Runtime's tools, and tell the loss of accuracy."))
    args.model, args.output = Path(args.model), Path(args.output)
    wrong = [
        (not args.model.is_file(), f'{args.model}: no such file.'),
        (not args.calibration, '--calibration DIR is missing: a folder of images such as the model will see.'),
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
    calibration = quantization.Photographs(args.calibration, config)
    evaluation = quantization.Photographs(args.evaluation, config) if args.evaluation else calibration.split()
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

#!/usr/bin/env python3
"""Export Inception-ResNet-v2 as an ONNX file, with BatchNorm folded in, and check it with ONNX Runtime.

    python train_scripts/onnx_export.py model.onnx --checkpoint RUN/model_best.pth.tar
    python train_scripts/onnx_export.py model.onnx --model hf-hub:OWNER/NAME --atc --soc-version Ascend310P3

The options are those of timm's onnx_export.py. The script prints the commands of CANN's ATC that compile the file for
Ascend devices; --atc runs one of them.
"""

import timm_npu_irv2.cli.environment  # noqa: F401 - sets variables that torch reads when it is loaded

# isort: split
import sys

from timm_npu_irv2.cli.onnx_flags import ONNX_EXPORT
from timm_npu_irv2.cli.script import check_command_line

if __name__ == '__main__':
    check_command_line(ONNX_EXPORT, sys.argv[1:])  # before the imports below, which take seconds

# isort: split
import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from timm_npu_irv2 import hub
from timm_npu_irv2.cli.checks import check_image_size, check_output_file, check_rules
from timm_npu_irv2.cli.flags import OUR_MODEL
from timm_npu_irv2.cli.script import run_script, start_log
from timm_npu_irv2.deploy import InferenceNetwork, onnx, to_inference
from timm_npu_irv2.errors import UserError

_logger = logging.getLogger('onnx_export')

TOLERANCE = 1e-4  # relative error of ONNX Runtime's float32 outputs


def parse(argv: Sequence[str]) -> Namespace:
    """Parse the options.

    Raises:
        UserError: Unknown option, value out of range, or contradiction.
    """
    args = ONNX_EXPORT.parse(argv)
    check_output_file('FILE.onnx', args.output)
    args.output = Path(args.output)
    check_image_size(OUR_MODEL, (args.input_size or [])[1:])
    check_rules([
        (args.input_size and args.img_size, '--img-size and --input-size mean the same: leave one out.'),
        (args.checkpoint and not Path(args.checkpoint).is_file(), f'--checkpoint {args.checkpoint}: no such file.'),
        (args.dynamo and args.opset < 18, f'--dynamo does not support opset {args.opset}: leave it out, or use '
         '--opset 18, which ATC may not support.'),
        (args.dynamo and args.keep_init, '--keep-init is for the exporter without --dynamo.'),
        (args.atc and not args.soc_version, f'--atc needs a --soc-version, such as {", ".join(onnx.SOC_VERSIONS)}.'),
        (args.atc and args.dynamic_size, '--atc compiles for one size of images: leave out --dynamic-size.'),
    ])
    return args


def main(argv: Sequence[str]) -> int:
    """Export the network, check the file, and print or run the ATC commands."""
    args = parse(argv)
    start_log()
    for package in ('onnx', 'onnxruntime', *(['onnxscript'] if args.dynamo else [])):
        onnx.optional(package)  # an error now, and not after the export
    network = load_network(args)
    height, width = image_size(args, network)
    shape = (args.batch_size, network.in_chans, *((None, None) if args.dynamic_size else (height, width)))
    commands = [onnx.AtcCommand(args.output, name, shape, args.atc_batch_sizes)
                for name in ([args.soc_version] if args.soc_version else onnx.SOC_VERSIONS)]
    for command in commands if args.atc else ():
        command.check(args.force)  # before the export, which takes minutes
    onnx.export(
        network, args.output, uint8=args.uint8, batch_size=args.batch_size, img_size=(height, width),
        dynamic_size=args.dynamic_size, opset=args.opset, dynamo=args.dynamo, verbose=args.verbose,
        **({'keep_initializers_as_inputs': True} if args.keep_init else {}))
    error = onnx.check(network, args.output)
    _logger.info(f'{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, opset {args.opset}, '
                 f'{"uint8" if args.uint8 else "float32"} images; relative error against PyTorch {error:.1e}')
    if not error < TOLERANCE:
        args.output.unlink()
        raise UserError(f'relative error of ONNX Runtime against PyTorch {error:.1e}, above {TOLERANCE}: file removed.')
    for command in commands if not args.dynamic_size else ():
        print(command, flush=True)
        if args.atc:
            command.run(args.force)
    return 0


def load_network(args: Namespace) -> InferenceNetwork:
    """Return the folded network, on the CPU."""
    options = {'num_classes': args.num_classes, 'in_chans': (args.input_size or [None])[0]}
    model = hub.create_model(args.model, pretrained=not args.checkpoint, checkpoint_path=args.checkpoint, **options)
    return to_inference(model, device='cpu', mean=args.mean, std=args.std)


def image_size(args: Namespace, network: InferenceNetwork) -> tuple[int, int]:
    """Return the (height, width) of the options, or of the model."""
    if args.img_size:
        return args.img_size, args.img_size
    height, width = (args.input_size or network.pretrained_cfg['input_size'])[1:]
    return height, width


if __name__ == '__main__':
    sys.exit(run_script('onnx_export.py', main, sys.argv[1:]))

#!/usr/bin/env python3
"""Inception-ResNet-v2 as an ONNX file with nothing but convolutions in it, checked with ONNX Runtime.

    python train_scripts/onnx_export.py model.onnx --checkpoint RUN/model_best.pth.tar
    python train_scripts/onnx_export.py model.onnx --model hf-hub:OWNER/NAME --atc --soc-version Ascend310P3

The options are those of timm's onnx_export.py. It prints the commands that compile the file for Ascend's cards with
CANN's ATC; --atc runs one of them.
"""

import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from timm_npu_irv2 import hub
from timm_npu_irv2.cli.checks import check_image_size, check_rules
from timm_npu_irv2.cli.flags import INERT, OUR_MODEL
from timm_npu_irv2.cli.parser import Flag, Group, parse_flags
from timm_npu_irv2.cli.script import run_script, start_log
from timm_npu_irv2.deploy import InferenceNetwork, onnx, to_inference
from timm_npu_irv2.errors import UserError

_logger = logging.getLogger('onnx_export')

TOLERANCE = 1e-4  # of ONNX Runtime's float32 outputs, relative

FLAGS = (
    Group('Model', (
        Flag('output', 'the file to write', rest={'metavar': 'FILE.onnx'}),
        Flag('-m --model', "name of the model: this package's network or timm's inception_resnet_v2; "
             "'hf-hub:OWNER/NAME' or 'local-dir:FOLDER' for a published one", default=OUR_MODEL,
             rest={'metavar': 'NAME'}),
        Flag('--checkpoint', 'weights in any dialect, averaged ones first; without it the pretrained ones', default='',
             rest={'metavar': 'FILE'}),
        Flag('--num-classes', "size of the output (default: the weights')", int, within='[0, inf)',
             rest={'metavar': 'N'}),
    )),
    Group('Input', (
        Flag('--uint8', 'take uint8 images as they come from a file; the normalisation is in the first convolution',
             bool, False),
        Flag('-b --batch-size', 'a fixed number of images (default: any number)', int, within='[1, inf)',
             rest={'metavar': 'N'}),
        Flag('--img-size', "height and width (default: the model's)", int, within='[75, inf)', rest={'metavar': 'N'}),
        Flag('--input-size', 'the same as channels, height, width', int, within='[1, inf)',
             rest={'nargs': 3, 'metavar': ('C', 'H', 'W')}),
        Flag('--dynamic-size', 'images of any size', bool, False),
        Flag('--mean', "override the mean of uint8 images' channels", float, rest={'nargs': '+', 'metavar': 'X'}),
        Flag('--std', "override their standard deviation", float, within='(0, inf)',
             rest={'nargs': '+', 'metavar': 'X'}),
    )),
    Group('Format', (
        Flag('--opset', "version of ONNX's operators", int, onnx.OPSET, '[11, inf)', {'metavar': 'N'}),
        Flag('--dynamo', "torch's newer exporter, for opset 18 and above", bool, False),
        Flag('--keep-init', 'keep the weights as inputs, too', bool, False),
        Flag('--verbose', 'print the graph', bool, False),
    )),
    Group('Ascend', (
        Flag('--atc', "run CANN's ATC on the file", bool, False),
        Flag('--soc-version', "the card, as `npu-smi info` names it, with 'Ascend' before it", default=None,
             rest={'metavar': 'NAME'}),
        Flag('--atc-batch-sizes', 'batches to compile for, where the file takes any', int, [1, 2, 4, 8], '[1, inf)',
             {'nargs': '+', 'metavar': 'N'}),
        Flag('--force', 'overwrite an existing .om file', bool, False),
    )),
    INERT['onnx_export.py'],
)

UNSUPPORTED = {
    '--aten-fallback': 'this network needs none.',
    '--training': 'what is exported only infers; train with train.py.',
}


def parse(argv: Sequence[str]) -> Namespace:
    """The options. Raises UserError for what is wrong with them, in one line."""
    args = parse_flags(FLAGS, argv, prog='onnx_export.py', refused=UNSUPPORTED, description=(
        "Write Inception-ResNet-v2 as an ONNX file, for ONNX Runtime, OpenVINO and CANN's ATC. The options are those "
        "of timm's onnx_export.py. '-' and '_' in names are the same."))
    args.output = Path(args.output)
    check_image_size(OUR_MODEL, (args.input_size or [])[1:])
    check_rules([
        (args.input_size and args.img_size, '--img-size and --input-size say the same: leave one out.'),
        (not args.output.parent.is_dir(), f'cannot write {args.output}: there is no folder {args.output.parent}.'),
        (args.checkpoint and not Path(args.checkpoint).is_file(), f'--checkpoint {args.checkpoint}: no such file.'),
        (args.dynamo and args.opset < 18, f'--dynamo knows no opset below 18: leave it out, or add --opset 18 '
         f'(which ATC may not take), instead of {args.opset}.'),
        (args.dynamo and args.keep_init, '--keep-init is for the exporter without --dynamo.'),
        (args.atc and not args.soc_version, f'--atc needs a --soc-version, such as {", ".join(onnx.SOC_VERSIONS)}.'),
        (args.atc and args.dynamic_size, '--atc compiles for one size of images: leave out --dynamic-size.'),
    ])
    return args


def main(argv: Sequence[str]) -> int:
    """Fold, export, check; print or run ATC's command."""
    args = parse(argv)
    start_log()
    network = load_network(args)
    height, width = image_size(args, network)
    shape = (args.batch_size, network.in_chans, *((None, None) if args.dynamic_size else (height, width)))
    commands = [onnx.AtcCommand(args.output, name, shape, args.atc_batch_sizes)
                for name in ([args.soc_version] if args.soc_version else onnx.SOC_VERSIONS)]
    for command in commands if args.atc else ():
        command.check(args.force)  # before minutes are spent
    onnx.export(
        network, args.output, uint8=args.uint8, batch_size=args.batch_size, img_size=(height, width),
        dynamic_size=args.dynamic_size, opset=args.opset, dynamo=args.dynamo, verbose=args.verbose,
        **({'keep_initializers_as_inputs': True} if args.keep_init else {}))
    error = onnx.check(network, args.output)
    _logger.info(f'{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, opset {args.opset}, '
                 f'{"uint8" if args.uint8 else "float32"} images; differs from PyTorch by {error:.1e} (relative)')
    if not error < TOLERANCE:
        args.output.unlink()
        raise UserError(f'ONNX Runtime differs from PyTorch by {error:.1e}, more than {TOLERANCE}: file removed.')
    for command in commands if not args.dynamic_size else ():
        print(command, flush=True)
        if args.atc:
            command.run(args.force)
    return 0


def load_network(args: Namespace) -> InferenceNetwork:
    """The folded network, on the CPU."""
    options = {'num_classes': args.num_classes, 'in_chans': (args.input_size or [None])[0]}
    given = {key: value for key, value in options.items() if value is not None}
    if args.checkpoint and args.model == OUR_MODEL:
        model = hub.create(args.checkpoint, **given)
    else:
        model = hub.create_model(args.model, pretrained=not args.checkpoint, checkpoint_path=args.checkpoint, **given)
    return to_inference(model, device='cpu', mean=args.mean, std=args.std)


def image_size(args: Namespace, network: InferenceNetwork) -> tuple[int, int]:
    """(height, width) as asked for, or the model's."""
    if args.img_size:
        return args.img_size, args.img_size
    height, width = (args.input_size or network.pretrained_cfg['input_size'])[1:]
    return height, width


if __name__ == '__main__':
    sys.exit(run_script('onnx_export.py', main, sys.argv[1:]))

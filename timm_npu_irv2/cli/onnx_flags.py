"""The options of onnx_export.py and onnx_quantize.py as data."""

from .flags import INERT, OUR_MODEL, pick
from .parser import CommandLine, Flag, Group

__all__ = ['METHODS', 'ONNX_EXPORT', 'ONNX_QUANTIZE', 'OPSET']

# ATC supports all operators of this graph up to version 18; 13 is the lowest that allows quantisation per channel.
OPSET = 13
METHODS = ('minmax', 'entropy', 'percentile')  # of finding the range of an activation

_EXPORT = (
    Group('Model', (
        Flag('output', 'file to write', rest={'metavar': 'FILE.onnx'}),
        Flag('-m --model', "model name: this package's network or timm's inception_resnet_v2; 'hf-hub:OWNER/NAME' or "
             "'local-dir:FOLDER' for a published model", default=OUR_MODEL,
             rest={'metavar': 'NAME'}),
        Flag('--checkpoint', 'file of weights, preferring averaged ones (default: pretrained weights)', default='',
             rest={'metavar': 'FILE'}),
        Flag('--num-classes', "number of classes (default: that of the weights)", int, within='[0, inf)',
             rest={'metavar': 'N'}),
    )),
    Group('Input', (
        Flag('--uint8', 'take uint8 images; the normalisation becomes part of the first convolution',
             bool, False),
        Flag('-b --batch-size', 'fixed batch size (default: any batch size)', int, within='[1, inf)',
             rest={'metavar': 'N'}),
        Flag('--img-size', "height and width of the images (default: the model's)", int, within='[75, inf)',
             rest={'metavar': 'N'}),
        Flag('--input-size', 'image channels, height and width', int, within='[1, inf)',
             rest={'nargs': 3, 'metavar': ('C', 'H', 'W')}),
        Flag('--dynamic-size', 'take images of any size', bool, False),
        Flag('--mean', "pixel mean per channel, for --uint8 (default: the model's)", float,
             rest={'nargs': '+', 'metavar': 'X'}),
        Flag('--std', "pixel standard deviation per channel, for --uint8 (default: the model's)", float,
             within='(0, inf)', rest={'nargs': '+', 'metavar': 'X'}),
    )),
    Group('Format', (
        Flag('--opset', "version of the ONNX operators", int, OPSET, '[11, inf)', {'metavar': 'N'}),
        Flag('--dynamo', "use the newer exporter of torch, for opset 18 and above", bool, False),
        Flag('--keep-init', 'list the weights as inputs, too', bool, False),
        Flag('--verbose', 'print the graph', bool, False),
    )),
    Group('Ascend', (
        Flag('--atc', "compile the file with CANN's ATC", bool, False),
        Flag('--soc-version', "device type: the name that `npu-smi info` shows, with 'Ascend' before it", default=None,
             rest={'metavar': 'NAME'}),
        Flag('--atc-batch-sizes', 'batch sizes to compile for, if the file takes any', int, [1, 2, 4, 8], '[1, inf)',
             {'nargs': '+', 'metavar': 'N'}),
        Flag('--force', 'overwrite an existing .om file', bool, False),
    )),
    INERT['onnx_export.py'],
)

_UNSUPPORTED = {
    '--aten-fallback': 'this network does not need it.',
    '--training': 'the exported network is for inference only; train with train.py.',
}

ONNX_EXPORT = CommandLine('onnx_export.py', (
    "Write Inception-ResNet-v2 as an ONNX file, for ONNX Runtime, OpenVINO and CANN's ATC. The options are those of "
    "timm's onnx_export.py. '-' and '_' in names are the same."), _EXPORT, _UNSUPPORTED)

_QUANTIZE = (
    Group('Files', (
        Flag('model', 'ONNX file of onnx_export.py', rest={'metavar': 'FILE.onnx'}),
        Flag('output', 'file to write', rest={'metavar': 'INT8.onnx'}),
        Flag('--calibration', 'folder or tar file of images like those the model will see', default='',
             rest={'metavar': 'DIR'}),
        Flag('--evaluation', 'folder or tar file of images on which int8 is compared with float32; class folders give '
             'the accuracy, too', default='', rest={'metavar': 'DIR'}),
        *pick('on_bad_image'),
    )),
    Group('Quantisation', (
        Flag('--images', 'largest number of images for calibration', int, 100, '[1, inf)', {'metavar': 'N'}),
        Flag('--evaluation-images', 'largest number of images for the comparison', int, 1000, '[1, inf)',
             {'metavar': 'N'}),
        Flag('--method', 'method that finds the ranges of the activations; auto for the one with the smallest loss',
             default='auto', rest={'choices': ('auto', *METHODS)}),
        Flag('--max-loss', 'largest loss of top-1 in percentage points, or, where the classes of the images are not '
             'known, largest percentage of images with another answer (default: 1, or 5 without classes)', float,
             within='[0, 100]', rest={'metavar': 'X'}),
        Flag('--per-tensor', 'use one scale for all channels of a convolution', bool, False),
        Flag('--full-range', 'use weights of 8 bits, for CPUs with VNNI and for NPUs; other CPUs overflow with '
             'more than 7', bool, False),
    )),
)

ONNX_QUANTIZE = CommandLine('onnx_quantize.py', (
    "Quantise an ONNX file of onnx_export.py to int8 with ONNX Runtime's tools, and measure the loss of accuracy."),
    _QUANTIZE)

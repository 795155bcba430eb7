"""The options of validate.py as data, in timm's names."""

from .flags import DEVICE_SWITCHES, ENGINE_FLAGS, INERT, OUR_MODEL, REFUSED, TRAIN_FLAGS, pick
from .parser import CommandLine, Flag, Group

__all__ = ['VALIDATE']

_FLAGS = (
    Group('Data set', (
        *pick('data', 'data_dir', 'dataset', 'dataset_download', 'class_map', 'input_img_mode', 'input_key',
              'target_key', 'dataset_trust_remote_code', 'on_bad_image'),
        Flag('--split --val-split', 'split of the data set', default='validation', rest={'metavar': 'NAME'}),
        Flag('--num-samples --val-num-samples', 'samples in the split, for streams', int, within='[1, inf)',
             rest={'metavar': 'N'}),
        Flag('--real-labels', 'JSON file of the reassessed labels of ImageNet, which replace the original ones',
             default='', rest={'metavar': 'FILE'}),
        Flag('--valid-labels', 'file of the class indices that occur in the data set, one per line', default='',
             rest={'metavar': 'FILE'}),
    )),
    Group('Model', (
        Flag('-m --model', "model name; a pattern, 'all' or a file of names for several models", default=OUR_MODEL,
             rest={'metavar': 'NAME'}),
        Flag('--checkpoint --pth-path', "file of weights in any dialect, ONNX or .om file, folder of a deployed or an "
             "exported network, 'hf-hub:OWNER/NAME', or a folder of such files; several are compared in a table (the "
             "second name is Ascend ModelZoo's)", default=[], rest={'nargs': '+', 'metavar': 'FILE'}),
        Flag('--use-ema', 'use the averaged weights of the checkpoint', bool, False),
        Flag('--pretrained', 'use pretrained weights; implied without --checkpoint', bool, False),
        *pick('num_classes', 'gp', 'model_kwargs', 'fuser', 'fast_norm', 'torchscript', 'torchcompile',
              'torchcompile_mode'),
        Flag('--reparam', 'reparameterise the model for inference', bool, False),
        Flag('--test-pool', 'average over several positions of images that are larger than those of the training', bool,
             False),
    )),
    Group('Images', (
        *pick('img_size', 'in_chans', 'input_size', 'crop_pct', 'mean', 'std', 'interpolation', 'tta'),
        Flag('--use-train-size', 'use the image size of the training even if the model has another one for testing',
             bool, False),
        Flag('--crop-mode', "crop of the resized image (default: the model's)",
             rest={'choices': ('center', 'squash', 'border')}),
        Flag('--crop-border-pixels', 'number of pixels to cut off the border of each image', int, within='[0, inf)',
             rest={'metavar': 'N'}),
    )),
    Group('Device and precision', (
        *pick('device', 'device_modules', 'amp', 'amp_dtype', 'model_dtype', 'tuned', *DEVICE_SWITCHES,
              'dist_url', 'dist_backend'),
        *ENGINE_FLAGS,
    )),
    Group('Running and results', (
        Flag('-b --batch-size', 'batch size of a process', int, 256, '[1, inf)', {'metavar': 'N'}),
        *pick('workers', 'pin_mem', 'no_prefetcher', 'input_backend', 'seed'),
        Flag('--log-freq', 'batches from one log line to the next', int, 10, '[1, inf)', {'metavar': 'N'}),
        Flag('--retry', 'reduce the batch size until a batch fits into memory', bool, False),
        Flag('--metrics-avg', 'averaging of precision, recall and F1, which are added to the results (pip install '
             'scikit-learn)', rest={'choices': ('micro', 'macro', 'weighted')}),
        Flag('--results-file', 'file to write the results to', default='', rest={'metavar': 'FILE'}),
        Flag('--results-format', 'format of the results file', default='csv', rest={'choices': ('csv', 'json')}),
        Flag('--picture', 'PNG to draw some images and their predictions into', default='',
             rest={'metavar': 'FILE.png'}),
    )),
    INERT['validate.py'],
)

_NAMES = {name for group in _FLAGS for flag in group.flags for name in flag.names.split()}
_NAMES_IN_TRAINING = {name for group in TRAIN_FLAGS for flag in group.flags for name in flag.names.split()}

# Errors on the command line, ignored in a config, which may be the args.yaml of a training.
_UNSUPPORTED = {
    **dict.fromkeys(_NAMES_IN_TRAINING - _NAMES, 'it is an option of train.py.'),
    **REFUSED,
    '--tf-preprocessing': 'it needs TensorFlow; use --crop-pct and --interpolation.',
    '--aot-autograd': 'torch no longer supports it; use --torchcompile aot_eager.',
}

VALIDATE = CommandLine('validate.py', (
    "Validate Inception-ResNet-v2, or any timm model, on NPU, CUDA or CPU. The options are those of timm's "
    "validate.py. '-' and '_' in names are the same."), _FLAGS, _UNSUPPORTED)

"""The options of inference.py as data, in timm's names."""

from .flags import DEVICE_SWITCHES, ENGINE_FLAGS, INERT, OUR_MODEL, REFUSED, pick
from .parser import CommandLine, Flag, Group
from .table import EXTENSIONS

__all__ = ['INFERENCE']


def _column(name: str, content: str, default: str) -> Flag:
    return Flag(f'--{name}-col', f'column name of {content}', default=default, rest={'metavar': 'NAME'})


_FLAGS = (
    Group('Images', (
        Flag('data', "images, folders, tar files, WebDataset shards as in 'train-{0000..0009}.tar', or text files of "
             'paths', default=[], rest={'nargs': '*', 'metavar': 'IMAGE_OR_FOLDER'}),
        Flag('--data-dir', 'one more image or folder; with --dataset, the folder of the data set',
             rest={'metavar': 'DIR'}),
        *pick('dataset', 'dataset_download', 'class_map', 'input_img_mode', 'on_bad_image'),
        Flag('--split', 'split of --dataset', default='validation', rest={'metavar': 'NAME'}),
    )),
    Group('Model', (
        Flag('-m --model', "model name; 'hf-hub:OWNER/NAME' or 'local-dir:FOLDER' for a published model",
             default=OUR_MODEL, rest={'metavar': 'NAME'}),
        Flag('--checkpoint', 'file of weights in any dialect (averaged ones are preferred), ONNX or .om file, or '
             'folder of a deployed network', default='', rest={'metavar': 'FILE'}),
        Flag('--pretrained', 'use pretrained weights; implied without --checkpoint', bool, False),
        *pick('num_classes', 'model_kwargs', 'fuser', 'fast_norm', 'torchscript', 'torchcompile', 'torchcompile_mode'),
        Flag('--test-pool', 'average over several positions of images that are larger than those of the training', bool,
             False),
    )),
    Group('Preprocessing', (
        *pick('img_size', 'in_chans', 'input_size', 'crop_pct', 'mean', 'std', 'interpolation'),
        Flag('--use-train-size', 'use the image size of the training even if the model has another one for testing',
             bool, False),
        Flag('--crop-mode', "crop of the resized image (default: the model's)",
             rest={'choices': ('center', 'squash', 'border')}),
    )),
    Group('Device and precision', (
        *pick('device', 'device_modules', 'amp', 'amp_dtype', 'model_dtype', 'tuned', *DEVICE_SWITCHES, 'dist_url',
              'dist_backend'),
        Flag('--fast', 'use 16-bit weights and images where that is faster: float16, on some CPUs bfloat16', bool,
             False),
        *ENGINE_FLAGS,
        Flag('-b --batch-size', 'number of images in a batch', int, 256, '[1, inf)', {'metavar': 'N'}),
        Flag('-j --workers', 'number of threads that decode images', int, 2, '[0, inf)', {'metavar': 'N'}),
        Flag('--log-freq', 'batches from one log line to the next', int, 10, '[1, inf)', {'metavar': 'N'}),
    )),
    Group('Results', (
        Flag('--topk', 'number of classes per image, the most likely first; 0 for the outputs of all classes', int, 1,
             '[0, inf)', {'metavar': 'K'}),
        Flag('--picture', 'PNG to draw the images and their classes into', default='', rest={'metavar': 'FILE.png'}),
        Flag('--gradcam', 'show in the picture which regions speak for the most likely class', bool, False),
        Flag('--results-dir', 'folder to write the results into', default='', rest={'metavar': 'DIR'}),
        Flag('--results-file', 'file to write the results to (default: named after model and size, in --results-dir)',
             default='', rest={'metavar': 'FILE'}),
        Flag('--results-format', 'formats of the results (default: csv; parquet for shards)', default=[],
             rest={'nargs': '+', 'choices': tuple(EXTENSIONS)}),
        Flag('--results-shards', 'write the results as they come, into files in --results-dir with those of N images '
             'each (default: 1000 with several processes or --resume, otherwise one file at the end)', int,
             within='[1, inf)', rest={'metavar': 'N'}),
        Flag('--resume', 'continue an interrupted run: leave out the images whose shards are in --results-dir', bool,
             False),
        Flag('--results-separate-col', 'use a separate column for each of the K classes', bool, False),
        Flag('--fullname', 'write the paths of the images instead of their names', bool, False),
        _column('filename', 'the images', 'filename'),
        _column('index', 'the class indices', 'index'),
        _column('label', 'the labels', 'label'),
        _column('output', 'the outputs (default: --output-type)', ''),
        Flag('--output-type', 'type of the outputs', default='prob', rest={'choices': ('prob', 'logit')}),
        Flag('--label-type', 'type of the labels', default='description',
             rest={'choices': ('none', 'name', 'description', 'detail', 'detailed')}),
        Flag('--include-index', 'write the class indices, too', bool, False),
        Flag('--exclude-output', 'do not write probabilities or logits', bool, False),
        Flag('--no-console-results', 'do not print the results', bool, False),
    )),
    INERT['inference.py'],
)

_UNSUPPORTED = {
    **REFUSED,
    '--aot-autograd': 'torch no longer supports it; use --torchcompile aot_eager.',
}

INFERENCE = CommandLine('inference.py', (
    "Classify images with Inception-ResNet-v2, or any timm model, on NPU, CUDA or CPU. The options are those of timm's "
    "inference.py. '-' and '_' in names are the same."), _FLAGS, _UNSUPPORTED)

"""The options of train_scripts/train.py, as data: what each is called, its type, default, range and meaning.

Names, meanings and defaults are those of timm's train.py. Behind them, as further names of the same option, come those
of Ascend ModelZoo's script; in groups of their own, what the NPU and the zoo add.
"""

import re
from argparse import SUPPRESS
from typing import Any

from ..cli.parser import Flag, Group, key_values

__all__ = ['OUR_MODEL', 'REFUSED', 'TRAIN_FLAGS', 'loss_scale', 'model_name']

OUR_MODEL = 'inception_resnet_v2_npu'


def model_name(arch: str) -> str:
    """The zoo's --arch as a model's name: Inception-ResNet-v2 in any spelling is ours, anything else timm's."""
    squeezed = re.sub(r'[^a-z0-9]', '', arch.lower())
    return OUR_MODEL if squeezed in ('inceptionresnetv2', 'inceptionresnetv2npu') else arch


def loss_scale(text: str) -> float | str:
    """A number, or 'dynamic'."""
    return text if text == 'dynamic' else float(text)


def _flag(
        names: str,
        help: str,
        type: Any = str,
        default: Any = None,
        within: str = '(-inf, inf)',
        **rest: Any,
) -> Flag:
    return Flag(names, help, type, False if type is bool else default, within, rest)


def _switch(names: str, help: str) -> Flag:
    return Flag(names, help, bool, False)


NATURAL, POSITIVE, SHARE, ANY_SIZE = '[0, inf)', '[1, inf)', '[0, 1]', '(0, inf)'
INTERPOLATIONS = ('', 'random', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
HALVES = ('float16', 'bfloat16')

_data = Group('Data set', (
    _flag('data', 'path to the data set; the same as --data-dir', nargs='?', metavar='DIR'),
    _flag('--data-dir --data --data-path', 'folder with train/<class>/<image> and val/<class>/<image>', metavar='DIR'),
    _flag('--dataset', "timm's '<type>/<name>', empty for a folder or tar of images", default='', metavar='NAME'),
    _flag('--train-split', 'name of the training split', default='train', metavar='NAME'),
    _flag('--val-split', "name of the validation split, '' for none", default='validation', metavar='NAME'),
    _flag('--train-num-samples', 'samples in the training split, for iterable data sets', int, None, POSITIVE),
    _flag('--val-num-samples', 'samples in the validation split, for iterable data sets', int, None, POSITIVE),
    _switch('--dataset-download', 'let torch/ and tfds/ data sets be downloaded'),
    _flag('--class-map', 'file that maps class names to indices', default='', metavar='FILE'),
    _flag('--input-img-mode', "PIL mode of the images (default: RGB, or L for one channel)", metavar='MODE'),
    _flag('--input-key', 'key of the images in a data set of records'),
    _flag('--target-key', 'key of the labels in a data set of records'),
    _switch('--dataset-trust-remote-code', "let a Hugging Face data set run the code of its repository"),
    _flag('--on-bad-image', 'what to do with an image that cannot be read', default='stop', choices=('skip', 'stop')),
))

_model = Group('Model', (
    _flag('--model', 'name of the model', default=OUR_MODEL, metavar='NAME'),
    _flag('-a --arch', "the zoo's name for --model; inceptionresnetv2 in any spelling is our network", model_name,
          SUPPRESS, dest='model', metavar='NAME'),
    _switch('--pretrained', 'start from the pretrained weights'),
    _flag('--pretrained-path', 'load this file as if it were the pretrained weights, with adaptation', metavar='FILE'),
    _flag('--initial-checkpoint', 'load these weights after initialisation', default='', metavar='FILE'),
    _flag('--resume', "continue from this checkpoint; 'auto': from the newest one in the output folder",
          default='', metavar='FILE'),
    _switch('--no-resume-opt', 'resume the weights only, not optimizer, loss scale and random state'),
    _flag('--num-classes', "number of classes (default: the model's)", int, None, POSITIVE, metavar='N'),
    _flag('--gp', "global pool type: avg, max, avgmax, ... (default: the model's)", metavar='POOL'),
    _flag('--img-size', "size of the square images in pixels (default: the model's)", int, None, POSITIVE, metavar='N'),
    _flag('--in-chans', 'number of image channels (default: 3)', int, None, POSITIVE, metavar='N'),
    _flag('--input-size', "channels, height and width (default: the model's)", int, None, POSITIVE, nargs=3,
          metavar='N'),
    _flag('--crop-pct', 'part of the image that the centre crop of validation keeps', float, None, ANY_SIZE,
          metavar='PCT'),
    _flag('--mean', "mean of the pixels, per channel (default: the model's)", float, nargs='+'),
    _flag('--std', "standard deviation of the pixels, per channel (default: the model's)", float, None, ANY_SIZE,
          nargs='+'),
    _flag('--interpolation', "resize method of validation (default: the model's)", default='', choices=INTERPOLATIONS,
          metavar='NAME'),
    _flag('-b --batch-size', 'images a process takes in a step; with --multiprocessing-distributed, as in the zoo, '
          'those of all cards together', int, 128, POSITIVE, metavar='N'),
    _flag('-vb --validation-batch-size', 'the same for validation (default: --batch-size)', int, None, POSITIVE,
          metavar='N'),
    _switch('--channels-last', 'channels_last memory layout, where the device has it (it is chosen by itself there)'),
    _flag('--fuser', "TorchScript's fuser", default='', choices=('', 'te', 'old', 'nvfuser')),
    _flag('--grad-accum-steps', 'batches whose gradients make one update', int, 1, NATURAL, metavar='N'),
    _switch('--grad-checkpointing', 'recompute activations in the backward pass: less memory, more time'),
    _flag('--recompute', "what inception_resnet_v2_npu computes again in the backward pass: 'cheap' all but its "
          "convolutions (half of the memory), 'all' as --grad-checkpointing", choices=('cheap', 'all')),
    _switch('--fast-norm', "timm's experimental fast normalisation layers"),
    _flag('--model-kwargs', "further arguments of the model, as name=value", key_values, nargs='*', metavar='K=V'),
    _flag('--head-init-scale', "factor on the classifier's initial weights", float),
    _flag('--head-init-bias', "initial bias of the classifier", float),
    _switch('--torchscript', 'compile the model with torch.jit.script'),
    _flag('--torchcompile', 'compile with torch.compile and this backend (inductor if none is named)', nargs='?',
          const='inductor', metavar='BACKEND'),
    _flag('--torchcompile-mode', 'mode of torch.compile', metavar='MODE'),
))

_device = Group('Device and precision', (
    _flag('--device', 'npu, cuda or cpu, with or without an index (default: the best there is)', metavar='NAME'),
    _switch('--amp', 'mixed precision'),
    _flag('--amp-dtype', "its 16-bit type (default: the device's: float16, bfloat16 on a CPU)", choices=HALVES),
    _flag('--amp-impl', 'who does it: torch and torch_npu, or apex', default='native', choices=('native', 'apex')),
    _flag('--opt-level', 'O0: float32. O1: --amp. O2: half-precision weights, float32 BatchNorm and master weights '
          '(O1 and O2 switch --amp on)', choices=('O0', 'O1', 'O2')),
    _flag('--loss-scale', "a number, or 'dynamic' (default: dynamic for float16, none otherwise)", loss_scale, None,
          ANY_SIZE, metavar='N'),
    _flag('--model-dtype', 'type of weights and images without --amp (default: float32)', choices=('float32', *HALVES)),
    _flag('--grad-compress', 'send float32 gradients between cards in this type: half the traffic, some rounding',
          choices=('fp16', 'bf16')),
    _switch('--no-ddp-bb', 'no broadcast of buffers before each forward pass of DistributedDataParallel'),
    _switch('--synchronize-step', 'wait for the device at the end of each step'),
    _flag('--device-modules', 'Python modules to import first (other plugins)', nargs='+', metavar='MODULE'),
    _switch('--allow-internal-format', "NPU: private layouts for convolutions (the 910A's fast path)"),
    _switch('--jit-compile', 'NPU: compile operators for the shapes they meet instead of using ready-made ones'),
))

_processes = Group('Processes', (
    _switch('--multiprocessing-distributed',
          'start one process per card of --device-list (torchrun is not needed then)'),
    _flag('--device-list', "cards to use, e.g. '0,1,2,3' (default: all)", metavar='LIST'),
    _flag('--addr', "address of the machine that rank 0 runs on (default: this one)", metavar='HOST'),
    _flag('--dist-url', "where processes meet: tcp://host:port or env:// (default: torchrun's, or a free port)",
          metavar='URL'),
    _flag('--dist-backend', "collectives (default: the device's: hccl, nccl, gloo)", metavar='NAME'),
    _flag('--world-size', 'number of machines with --multiprocessing-distributed, else of processes', int, None,
          POSITIVE,
          metavar='N'),
    _flag('--rank', 'index of this machine, or of this process', int, None, NATURAL, metavar='N'),
    _flag('--local-rank', "torch.distributed.launch's; torchrun sets LOCAL_RANK instead", int, 0, NATURAL, metavar='N'),
))

_optimizer = Group('Optimizer', (
    _flag('--opt', "name of the optimizer; npufusedsgd and its sisters are the NPU's fused ones", default='sgd',
          metavar='NAME'),
    _flag('--opt-eps', "epsilon (default: the optimizer's)", float, None, NATURAL, metavar='EPS'),
    _flag('--opt-betas', "betas (default: the optimizer's)", float, None, SHARE, nargs='+', metavar='BETA'),
    _flag('--momentum --mom', 'momentum', float, 0.9, NATURAL, metavar='M'),
    _flag('--weight-decay --wd', 'weight decay', float, 2e-5, NATURAL, metavar='W'),
    _flag('--clip-grad', 'clip gradients to this norm, value or factor (default: not)', float, None, NATURAL,
          metavar='NORM'),
    _flag('--clip-mode', 'what --clip-grad means', default='norm', choices=('norm', 'value', 'agc')),
    _flag('--layer-decay', 'factor on the learning rate per layer from the top', float, None, ANY_SIZE),
    _flag('--layer-decay-min-scale', 'least factor of --layer-decay', float, 0.0, NATURAL),
    _flag('--layer-decay-no-opt-scale', 'layers with a smaller factor are frozen', float, None, NATURAL),
    _flag('--opt-kwargs', 'further arguments of the optimizer, as name=value', key_values, nargs='*', metavar='K=V'),
))

_schedule = Group('Learning rate schedule', (
    _flag('--sched', 'schedule of the learning rate', default='cosine',
          choices=('cosine', 'tanh', 'step', 'multistep', 'plateau', 'poly', 'wsd', 'none')),
    _switch('--sched-on-updates', 'change the learning rate at every update instead of every epoch'),
    _flag('--lr --learning-rate', 'learning rate (default: from --lr-base)', float, None, NATURAL, metavar='LR'),
    _flag('--lr-base', 'learning rate = this * global batch size / --lr-base-size', float, 0.1, NATURAL, metavar='LR'),
    _flag('--lr-base-size', 'batch size that --lr-base is meant for', int, 256, POSITIVE, metavar='N'),
    _flag('--lr-base-scale', "linear or sqrt in the batch size (default: by the optimizer)", default='',
          choices=('', 'linear', 'sqrt')),
    _flag('--lr-noise', 'add noise from this part of the epochs on (to that part)', float, None, SHARE, nargs='+',
          metavar='PCT'),
    _flag('--lr-noise-pct', 'limit of the noise', float, 0.67, NATURAL, metavar='PCT'),
    _flag('--lr-noise-std', 'standard deviation of the noise', float, 1.0, NATURAL, metavar='STD'),
    _flag('--lr-cycle-mul', 'each cycle is this many times longer', float, 1.0, ANY_SIZE, metavar='F'),
    _flag('--lr-cycle-decay', 'each cycle starts this much lower', float, 0.5, NATURAL, metavar='F'),
    _flag('--lr-cycle-limit', 'number of cycles', int, 1, POSITIVE, metavar='N'),
    _flag('--lr-k-decay', 'k-decay of cosine and poly', float, 1.0, ANY_SIZE, metavar='K'),
    _flag('--warmup-lr', 'learning rate that the warm-up starts from', float, 1e-5, NATURAL, metavar='LR'),
    _flag('--min-lr', 'learning rate at the end', float, 0.0, NATURAL, metavar='LR'),
    _flag('--epochs --epoch', 'number of epochs; 0 evaluates and stops', int, 300, NATURAL, metavar='N'),
    _flag('--epoch-repeats', 'passes over the data set per epoch', float, 0.0, NATURAL, metavar='N'),
    _flag('--start-epoch', "first epoch (default: the checkpoint's, else 0)", int, None, NATURAL, metavar='N'),
    _flag('--decay-milestones', 'epochs of the steps of multistep, increasing', int, [90, 180, 270], NATURAL, nargs='+',
          metavar='N'),
    _flag('--decay-epochs', 'epochs between the steps of step', float, 90.0, ANY_SIZE, metavar='N'),
    _flag('--warmup-epochs', 'epochs of warm-up', int, 5, NATURAL, metavar='N'),
    _switch('--warmup-prefix', 'the warm-up comes before the schedule instead of in it'),
    _flag('--cooldown-epochs', 'epochs at --min-lr after the schedule', int, 0, NATURAL, metavar='N'),
    _flag('--patience-epochs', 'epochs without progress before plateau lowers the rate', int, 10, NATURAL, metavar='N'),
    _flag('--decay-rate --dr', 'factor of each step', float, 0.1, NATURAL, metavar='F'),
))

_augmentation = Group('Augmentation and regularisation', (
    _switch('--no-aug', 'no augmentation at all, whatever the others say'),
    _flag('--train-crop-mode', 'rrc, rkrc or rkrr', choices=('rrc', 'rkrc', 'rkrr')),
    _flag('--scale', 'range of the crop, as part of the area', float, [0.08, 1.0], ANY_SIZE, nargs='+', metavar='PCT'),
    _flag('--ratio', "range of the crop's aspect ratio", float, [3 / 4, 4 / 3], ANY_SIZE, nargs='+', metavar='RATIO'),
    _flag('--hflip', 'probability of a horizontal flip', float, 0.5, SHARE, metavar='P'),
    _flag('--vflip', 'probability of a vertical flip', float, 0.0, SHARE, metavar='P'),
    _flag('--color-jitter', 'strength of the colour jitter', float, 0.4, NATURAL, metavar='F'),
    _flag('--color-jitter-prob', 'its probability', float, None, SHARE, metavar='P'),
    _flag('--grayscale-prob', 'probability of turning grey', float, None, SHARE, metavar='P'),
    _flag('--gaussian-blur-prob', 'probability of a blur', float, None, SHARE, metavar='P'),
    _flag('--aa', "AutoAugment policy: 'v0', 'original', 'rand-m9-mstd0.5', 'augmix-...'", metavar='NAME'),
    _flag('--aug-repeats', 'repeats of each sample, distributed only', float, 0.0, NATURAL, metavar='N'),
    _flag('--aug-splits', 'augmentation splits: 0, or at least 2', int, 0, NATURAL, metavar='N'),
    _switch('--jsd-loss', 'Jensen-Shannon divergence and cross entropy; needs --aug-splits'),
    _switch('--bce-loss', 'binary cross entropy'),
    _switch('--bce-sum', 'sum over the classes in it'),
    _flag('--bce-target-thresh', 'threshold that makes its targets binary', float, None, SHARE, metavar='P'),
    _flag('--bce-pos-weight', 'weight of its positive targets', float, None, NATURAL, metavar='W'),
    _flag('--reprob', 'probability of random erasing', float, 0.0, SHARE, metavar='P'),
    _flag('--remode', 'what is erased with', default='pixel', choices=('const', 'rand', 'pixel')),
    _flag('--recount', 'rectangles erased', int, 1, POSITIVE, metavar='N'),
    _switch('--resplit', 'do not erase in the first, clean split'),
    _flag('--mixup', 'alpha of mixup, on if above 0', float, 0.0, NATURAL, metavar='A'),
    _flag('--cutmix', 'alpha of cutmix, on if above 0', float, 0.0, NATURAL, metavar='A'),
    _flag('--cutmix-minmax', 'least and largest side of cutmix; switches it on', float, None, SHARE, nargs='+',
          metavar='F'),
    _flag('--mixup-prob', 'probability of either', float, 1.0, SHARE, metavar='P'),
    _flag('--mixup-switch-prob', 'probability of cutmix where both are on', float, 0.5, SHARE, metavar='P'),
    _flag('--mixup-mode', 'one choice for a batch, a pair or each image', default='batch', choices=('batch', 'pair',
          'elem')),
    _flag('--mixup-off-epoch', 'switch mixup off from this epoch on, 0: never', int, 0, NATURAL, metavar='N'),
    _flag('--smoothing --label-smoothing', 'label smoothing', float, 0.1, '[0, 1)', metavar='F'),
    _flag('--train-interpolation', 'resize method of training', default='random', choices=INTERPOLATIONS,
          metavar='NAME'),
    _flag('--drop', 'dropout rate', float, 0.0, '[0, 1)', metavar='P'),
    _flag('--drop-connect', 'the old name of --drop-path', float, SUPPRESS, '[0, 1)', dest='drop_path', metavar='P'),
    _flag('--drop-path', 'drop path rate, for models that have it', float, None, '[0, 1)', metavar='P'),
    _flag('--drop-block', 'drop block rate, for models that have it', float, None, '[0, 1)', metavar='P'),
))

_batch_norm = Group('Batch normalisation', (
    _flag('--bn-momentum', "momentum (default: the model's)", float, None, SHARE, metavar='M'),
    _flag('--bn-eps', "epsilon (default: the model's)", float, None, ANY_SIZE, metavar='EPS'),
    _switch('--sync-bn', 'statistics over all processes'),
    _flag('--dist-bn', "share running statistics after each epoch: 'reduce', 'broadcast' or ''", default='reduce',
          choices=('reduce', 'broadcast', '')),
    _switch('--split-bn', 'statistics for each augmentation split'),
))

_ema = Group('Moving average of the weights', (
    _switch('--model-ema', 'keep an exponential moving average of the weights, and evaluate it'),
    _switch('--model-ema-force-cpu', 'keep it in host memory; it is not evaluated then'),
    _flag('--model-ema-decay', 'decay per update', float, 0.9998, SHARE, metavar='F'),
    _switch('--model-ema-warmup', 'let the decay grow at the beginning'),
))

_misc = Group('Running, logging and saving', (
    _flag('--seed', 'random seed', int, 42, '[0, 4294967295]', metavar='S'),
    _flag('--worker-seeding', "'all' or 'part': which generators a worker seeds; results do not depend on it",
          default='all',
          choices=('all', 'part')),
    _flag('-p --log-interval --print-freq', 'updates between two lines of the log', int, 50, POSITIVE, metavar='N'),
    _flag('--val-interval', 'epochs between validations and checkpoints', int, 1, POSITIVE, metavar='N'),
    _flag('--recovery-interval', 'updates between recovery checkpoints, 0: none', int, 0, NATURAL, metavar='N'),
    _flag('--checkpoint-hist', 'number of best checkpoints to keep', int, 10, POSITIVE, metavar='N'),
    _flag('-j --workers', 'processes that load images, per training process', int, 4, NATURAL, metavar='N'),
    _switch('--save-images', 'save a batch of training images at each line of the log'),
    _switch('--pin-mem', 'page-locked memory for batches on their way to the device'),
    _switch('--no-prefetcher', 'normalise on the host instead of on the device'),
    _flag('--output', 'folder of the experiments (default: ./output/train)', default='', metavar='DIR'),
    _flag('--experiment', 'subfolder of this one (default: date, model and image size)', default='', metavar='NAME'),
    _flag('--eval-metric', 'what the best checkpoint is chosen by', default='top1', choices=('top1', 'top5', 'loss')),
    _flag('--tta', 'average the logits of this many views in a row in validation, 0: none', int, 0, NATURAL,
          metavar='N'),
    _switch('--use-multi-epochs-loader', 'keep the loading processes from one epoch to the next'),
    _switch('--log-wandb', 'log to Weights & Biases (pip install wandb)'),
    _flag('--wandb-project', 'its project', metavar='NAME'),
    _flag('--wandb-tags', 'its tags', default=[], nargs='+', metavar='TAG'),
    _flag('--wandb-resume-id', 'its run to continue, with --resume', default='', metavar='ID'),
    _flag('--push-to-hub', 'publish the best weights as this repository of the Hugging Face Hub at the end', default='',
          metavar='OWNER/NAME'),
))

_sizes = Group('Training with several image sizes', (
    _flag('--train-img-sizes', 'sizes to choose from, batch by batch', int, None, POSITIVE, nargs='+', metavar='N'),
    _flag('--train-batch-sizes', 'batch size of each (default: --batch-size)', int, None, POSITIVE, nargs='+',
          metavar='N'),
    _flag('--train-size-probs', 'weight of each (default: equal)', float, None, NATURAL, nargs='+', metavar='P'),
    _flag('--train-size-schedule', 'constant, or progressive from the first to the last', default='constant',
          choices=('constant', 'progressive')),
    _flag('--train-size-schedule-spread', 'width of the progressive choice, in sizes', float, 0.65, NATURAL,
          metavar='F'),
    _flag('--train-size-random-mix', 'part of the progressive choice that is uniform', float, 0.1, SHARE, metavar='P'),
    _flag('--train-batches-per-epoch --train-steps-per-epoch', 'batches in an epoch (default: what the data gives)',
          int,
          None, POSITIVE, metavar='N'),
    _flag('--variable-batch-loss-scale', 'weight of a batch by its size, against the average one', default='none',
          choices=('none', 'sqrt', 'linear')),
))

_distillation = Group('Distillation', (
    _flag('--kd-model-name', 'name of the teacher, pretrained', metavar='NAME'),
    _flag('--kd-distill-type', "what is matched; 'token' is for models with a distillation head", default='logit',
          choices=('logit', 'feature', 'token')),
    _flag('--kd-loss-type', 'loss on the logits', default='kl', choices=('kl',)),
    _flag('--distill-loss-weight', 'weight of the distillation loss', float, None, NATURAL, metavar='W'),
    _flag('--task-loss-weight', "weight of the classes' loss; alone, the other's is 1 minus it", float, None, NATURAL,
          metavar='W'),
    _flag('--kd-temperature', 'temperature of the softmax', float, 4.0, ANY_SIZE, metavar='T'),
    _flag('--kd-student-feature-dim', "width of the student's features (default: found out)", int, None, POSITIVE,
          metavar='N'),
    _flag('--kd-teacher-feature-dim', "width of the teacher's features (default: found out)", int, None, POSITIVE,
          metavar='N'),
    _flag('--kd-token-distill-type', 'soft or hard targets of token distillation', default='soft', choices=('soft',
          'hard')),
))

TRAIN_FLAGS: tuple[Group, ...] = (
    _data, _model, _device, _processes, _optimizer, _schedule, _augmentation, _batch_norm, _ema, _misc, _sizes,
    _distillation,
)

# timm has these; this script refuses them, and says why.
REFUSED: dict[str, str] = dict.fromkeys((
    '--naflex-loader', '--naflex-train-seq-lens', '--naflex-max-seq-len', '--naflex-patch-sizes',
    '--naflex-patch-size-probs', '--naflex-loss-scale', '--naflex-patchify-channels-first',
), 'NaFlex loaders feed sequences of patches to vision transformers, and Inception-ResNet-v2 is a convolutional '
   "network. Use --img-size or --train-img-sizes, or timm's own train.py for a transformer.")

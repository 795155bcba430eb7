"""The options of train.py as data: name, type, default, range and meaning. The other scripts share many of them.

Names, meanings and defaults are those of timm's train.py. Ascend ModelZoo's names of the same options follow as further
spellings. What the NPU and the ModelZoo add has groups of its own.
"""

from argparse import SUPPRESS, Namespace
from typing import Any

from .parser import CommandLine, Flag, Group, key_values
from .types import OUR_MODEL, auto_augment, loss_scale, model_name, module_name

__all__ = ['DEVICE_SWITCHES', 'ENGINE_FLAGS', 'INERT', 'OUR_MODEL', 'RECIPE', 'REFUSED', 'TRAIN', 'TRAIN_FLAGS',
           'device_switches', 'pick']


def _flag(
        names: str,
        help: str,
        type: Any = str,
        default: Any = None,
        within: str = '(-inf, inf)',
        recipe: bool = False,
        **rest: Any,
) -> Flag:
    return Flag(names, help, type, False if type is bool else default, within, rest, recipe)


def _switch(names: str, help: str, recipe: bool = False) -> Flag:
    return Flag(names, help, bool, False, recipe=recipe)


def _three_state(names: str, help: str) -> Flag:
    return Flag(names, help, bool, None)


NATURAL, POSITIVE, SHARE = '[0, inf)', '[1, inf)', '[0, 1]'
SIZE, BATCH, EPOCHS = '[1, 4096]', '[1, 100000]', '[0, 100000]'
INTERPOLATIONS = ('', 'random', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
HALVES = ('float16', 'bfloat16')
DEVICE_SWITCHES = ('allow_internal_format', 'jit_compile', 'allow_hf32', 'deterministic')

_data = Group('Data set', (
    _flag('data', 'data set folder; same as --data-dir', nargs='?', metavar='DIR'),
    _flag('--data-dir --data --data-path', 'folder with train/<class>/<image> and val/<class>/<image>', metavar='DIR'),
    _flag('--dataset', "'<type>/<name>' (torch, hfds, hfids, tfds, wds); empty for a folder or tar of images",
          default='', metavar='NAME'),
    _flag('--train-split', 'training split', default='train', metavar='NAME'),
    _flag('--val-split', "validation split, '' for none", default='validation', metavar='NAME'),
    _flag('--train-num-samples', 'samples in an epoch, for streams and wds/', int, None, POSITIVE,
          metavar='N'),
    _flag('--val-num-samples', 'samples in the validation split, for streams', int, None, POSITIVE,
          metavar='N'),
    _switch('--dataset-download', 'download the data set, for torch/, hfids/ and tfds/'),
    _flag('--class-map', 'file that maps class names to indices', default='', metavar='FILE'),
    _flag('--input-img-mode', 'PIL mode of the images (default: RGB, or L for one channel)', metavar='MODE'),
    _flag('--input-key', 'key of the images in a data set of records', metavar='KEY'),
    _flag('--target-key', 'key of the labels in a data set of records', metavar='KEY'),
    _switch('--dataset-trust-remote-code', 'allow a Hugging Face data set to run the code of its repository'),
    _flag('--on-bad-image', 'reaction to an unreadable image: stop the run, or skip the image', default='stop',
          choices=('skip', 'stop')),
))

_model = Group('Model', (
    _flag('--model', 'model name', default=OUR_MODEL, recipe=True, metavar='NAME'),
    _flag('-a --arch', "ModelZoo's name of --model; inceptionresnetv2 in any spelling is this package's network",
          model_name, SUPPRESS, dest='model', metavar='NAME'),
    _switch('--pretrained', 'start from pretrained weights', recipe=True),
    _flag('--pretrained-path', 'file to load instead of the pretrained weights; the classifier is adapted',
          metavar='FILE'),
    _flag('--initial-checkpoint', 'file of weights to load after initialisation; it decides the number of classes',
          default='', metavar='FILE'),
    _flag('--resume', "checkpoint to continue from; 'auto': the newest one in the output folder", default='',
          metavar='FILE'),
    _switch('--allow-changed-data', 'resume although the data set is not that of the checkpoint'),
    _switch('--no-resume-opt', 'resume the weights only, not the optimizer, loss scale and random state'),
    _flag('--num-classes', "number of classes (default: the model's)", int, None, '[1, 100000]', recipe=True,
          metavar='N'),
    _flag('--gp', "global pooling: avg, max, avgmax, ... (default: the model's)", recipe=True, metavar='POOL'),
    _flag('--img-size', "height and width of the images in pixels (default: the model's)", int, None, SIZE,
          recipe=True, metavar='N'),
    _flag('--in-chans', 'number of image channels (default: 3)', int, None, '[1, 4]', recipe=True, metavar='N'),
    _flag('--input-size', "image channels, height and width (default: the model's)", int, None, SIZE, recipe=True,
          nargs=3, metavar='N'),
    _flag('--crop-pct', 'part of the resized validation image that the centre crop keeps', float, None, '[0.1, 1]',
          recipe=True, metavar='PCT'),
    _flag('--mean', "pixel mean per channel, of pixels from 0 to 1 (default: the model's)", float, None, '[0, 1]',
          recipe=True,
          nargs='+', metavar='X'),
    _flag('--std', "pixel standard deviation per channel, of pixels from 0 to 1 (default: the model's)", float, None,
          '[0.001, 10]', recipe=True, nargs='+', metavar='X'),
    _flag('--interpolation', "resize method of validation (default: the model's)", default='', recipe=True,
          choices=INTERPOLATIONS, metavar='NAME'),
    _flag('-b --batch-size', 'batch size of a process; with --multiprocessing-distributed, as in the ModelZoo, batch '
          'size of all devices together', int, 128, BATCH, recipe=True, metavar='N'),
    _flag('-vb --validation-batch-size', 'validation batch size (default: --batch-size)', int, None, BATCH,
          metavar='N'),
    _flag('--fuser', 'fuser of TorchScript', default='', choices=('', 'te', 'old', 'nvfuser')),
    _flag('--grad-accum-steps', 'number of batches whose gradients are accumulated for one update', int, 1,
          '[0, 100000]', recipe=True, metavar='N'),
    _switch('--grad-checkpointing', 'recompute activations in the backward pass: less memory, more time'),
    _flag('--recompute', "part of inception_resnet_v2_npu to recompute in the backward pass: 'cheap' for all but its "
          "convolutions (half of the memory), 'all' for the same as --grad-checkpointing", choices=('cheap', 'all')),
    _switch('--fast-norm', "timm's experimental fast normalisation layers"),
    _flag('--model-kwargs', 'further arguments of the model, as name=value', key_values, recipe=True, nargs='*',
          metavar='K=V'),
    _flag('--head-init-scale', 'factor on the initial weights of the classifier', float, None, '[-1000000, 1000000]',
          metavar='F'),
    _flag('--head-init-bias', 'initial bias of the classifier', float, None, '[-1000000, 1000000]', metavar='F'),
    _switch('--torchscript', 'compile the model with torch.jit.script'),
    _flag('--torchcompile', 'compile the model with torch.compile and this backend (inductor if none is given)',
          nargs='?', const='inductor', metavar='BACKEND'),
    _flag('--torchcompile-mode', 'mode of torch.compile', choices=(
        'default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')),
))

_device = Group('Device and precision', (
    _flag('--device', 'npu, cuda or cpu, with or without an index (default: the best one available)', metavar='NAME'),
    _switch('--amp', 'mixed precision', recipe=True),
    _flag('--amp-dtype', '16-bit type of mixed precision (default: float16, on a CPU bfloat16)', recipe=True,
          choices=HALVES),
    _flag('--amp-impl', 'implementation of mixed precision: native (torch and torch_npu) or apex', default='native',
          recipe=True, choices=('native', 'apex')),
    _flag('--opt-level', 'O0: float32. O1: autocast. O2: half-precision weights with float32 BatchNorm and float32 '
          'master weights. O1 and O2 imply --amp', recipe=True, choices=('O0', 'O1', 'O2')),
    _flag('--loss-scale', "loss scale: a number, or 'dynamic' (default: dynamic for float16, none otherwise)",
          loss_scale, None, '(0, 1e30]', recipe=True, metavar='N'),
    _flag('--model-dtype', 'type of weights and images without --amp (default: float32)', choices=('float32', *HALVES)),
    _flag('--grad-compress', 'type in which float32 gradients travel between devices: half the traffic, some rounding',
          choices=('fp16', 'bf16')),
    _switch('--no-ddp-bb', 'do not broadcast buffers before each forward pass of DistributedDataParallel'),
    _switch('--synchronize-step', 'wait for the device at the end of each step'),
    _flag('--device-modules', 'Python modules to import first, such as other plugins', module_name, nargs='+',
          metavar='MODULE'),
    _three_state('--allow-internal-format', "NPU: allow private layouts for convolutions (default: torch_npu's choice "
                 'for the chip)'),
    _three_state('--jit-compile', 'NPU: compile operators for the shapes they meet instead of using prebuilt ones '
                 "(default: torch_npu's choice for the chip)"),
    _three_state('--allow-hf32', "NPU: round float32 to HF32 in convolutions and products (default: torch_npu's "
                 'choice: convolutions only)'),
    _flag('--tuned', 'settings that `benchmark.py tune` measured: auto for those of exactly this device, batch size, '
          'image size and precision (none with --deterministic), off for none, or a file', default='auto',
          metavar='auto|off|FILE'),
    _switch('--deterministic', 'use deterministic algorithms: the same bits in every run, in more time', recipe=True),
))

_processes = Group('Processes', (
    _switch('--multiprocessing-distributed', 'start one process per device of --device-list, without torchrun'),
    _flag('--device-list --gpu --npu', "indices of the devices, such as '0,1,2,3' (default: all)", metavar='LIST'),
    _flag('--addr', 'address of the machine of rank 0 (default: this one)', metavar='HOST'),
    _flag('--dist-url', "address at which processes meet: tcp://host:port or env:// (default: torchrun's, or a free "
          'port)', metavar='URL'),
    _flag('--dist-backend', "backend of torch.distributed (default: the device's: hccl, nccl, gloo)", metavar='NAME'),
    _flag('--world-size', 'number of machines with --multiprocessing-distributed, otherwise number of processes', int,
          None, '[1, 65536]', metavar='N'),
    _flag('--rank', 'index of this machine with --multiprocessing-distributed, otherwise of this process', int, None,
          '[0, 65536)', metavar='N'),
    _switch('--elastic', 'continue with any number of processes: choose batch size and accumulation for the '
            "checkpoint's images in an update; needs --resume auto"),
))

_optimizer = Group('Optimizer', (
    _flag('--opt', 'optimizer; npufusedsgd, npufusedadam, npufusedadamw, ... are the fused ones of the NPU',
          default='sgd', recipe=True, metavar='NAME'),
    _flag('--opt-eps', "epsilon of the optimizer (default: the optimizer's)", float, None, '[0, 1]', recipe=True,
          metavar='EPS'),
    _flag('--opt-betas', "betas of the optimizer (default: the optimizer's)", float, None, '[0, 1)', recipe=True,
          nargs='+', metavar='BETA'),
    _flag('--momentum --mom', 'momentum', float, 0.9, '[0, 1)', recipe=True, metavar='M'),
    _flag('--weight-decay --wd', 'weight decay', float, 2e-5, '[0, 100]', recipe=True, metavar='W'),
    _flag('--clip-grad', 'limit of the gradient clipping (default: no clipping)', float, None, NATURAL, recipe=True,
          metavar='NORM'),
    _flag('--clip-mode', 'gradient clipping by norm, by value, or adaptive (agc)', default='norm', recipe=True,
          choices=('norm', 'value', 'agc')),
    _flag('--layer-decay', 'factor on the learning rate from each layer to the one below it', float, None, '(0, 1]',
          recipe=True, metavar='F'),
    _flag('--layer-decay-min-scale', 'smallest learning rate factor of --layer-decay', float, 0.0, '[0, 1]',
          metavar='F'),
    _flag('--layer-decay-no-opt-scale', 'learning rate factor of --layer-decay below which layers are frozen', float,
          None, '[0, 1]', metavar='F'),
    _flag('--opt-kwargs', 'further arguments of the optimizer, as name=value', key_values, recipe=True, nargs='*',
          metavar='K=V'),
))

_schedule = Group('Learning rate schedule', (
    _flag('--sched', 'learning rate schedule', default='cosine', recipe=True,
          choices=('cosine', 'tanh', 'step', 'multistep', 'plateau', 'poly', 'wsd', 'none')),
    _switch('--sched-on-updates', 'change the learning rate at every update instead of every epoch', recipe=True),
    _flag('--lr --learning-rate', 'learning rate (default: computed from --lr-base)', float, None, NATURAL, recipe=True,
          metavar='LR'),
    _flag('--lr-base', 'base learning rate: lr = lr_base * global batch size / --lr-base-size', float, 0.1, NATURAL,
          recipe=True, metavar='LR'),
    _flag('--lr-base-size', 'batch size for which --lr-base is meant', int, 256, POSITIVE, recipe=True, metavar='N'),
    _flag('--lr-base-scale', 'growth of the learning rate with the batch size (default: by the optimizer)', default='',
          choices=('', 'linear', 'sqrt')),
    _flag('--lr-noise', 'part of the epochs at which learning rate noise starts, and optionally ends', float, None,
          SHARE, nargs='+', metavar='PCT'),
    _flag('--lr-noise-pct', 'limit of the learning rate noise, as part of the rate', float, 0.67, '[0.01, 10]',
          metavar='PCT'),
    _flag('--lr-noise-std', 'standard deviation of the learning rate noise', float, 1.0, '[0, 10]', metavar='STD'),
    _flag('--lr-cycle-mul', 'factor on the length of each next learning rate cycle', float, 1.0, '[1, 100]',
          metavar='F'),
    _flag('--lr-cycle-decay', 'factor on the learning rate of each next cycle', float, 0.5, '[0, 1]', metavar='F'),
    _flag('--lr-cycle-limit', 'number of learning rate cycles', int, 1, '[1, 10000]', metavar='N'),
    _flag('--lr-k-decay', 'k of k-decay, for cosine and poly', float, 1.0, '[0.01, 100]', metavar='K'),
    _flag('--warmup-lr', 'initial learning rate of the warm-up', float, 1e-5, NATURAL, recipe=True, metavar='LR'),
    _flag('--min-lr', 'lowest learning rate', float, 0.0, NATURAL, recipe=True, metavar='LR'),
    _flag('--epochs --epoch', 'number of epochs; 0 only evaluates', int, 300, EPOCHS, recipe=True, metavar='N'),
    _flag('--epoch-repeats', 'passes over the data set per epoch, 0 for one', float, 0.0, '[0, 1000]', metavar='N'),
    _flag('--start-epoch', "first epoch (default: the checkpoint's, otherwise 0)", int, None, EPOCHS, metavar='N'),
    _flag('--decay-milestones', 'epochs at which multistep lowers the learning rate, increasing', int, [90, 180, 270],
          EPOCHS, recipe=True, nargs='+', metavar='N'),
    _flag('--decay-epochs', 'epochs from one decay of the step schedule to the next', float, 90.0, '[0.01, 100000]',
          recipe=True, metavar='N'),
    _flag('--warmup-epochs', 'epochs of warm-up (default: 5, or half of --epochs if it is at most 5)', int, None,
          EPOCHS, recipe=True, metavar='N'),
    _switch('--warmup-prefix', 'warm up before the schedule instead of within it'),
    _flag('--cooldown-epochs', 'epochs at --min-lr after the schedule', int, 0, EPOCHS, recipe=True, metavar='N'),
    _flag('--patience-epochs', 'epochs without improvement after which plateau lowers the learning rate', int, 10,
          EPOCHS, metavar='N'),
    _flag('--decay-rate --dr', 'factor on the learning rate at each decay', float, 0.1, '[0, 100]', recipe=True,
          metavar='F'),
))

_augmentation = Group('Augmentation and regularisation', (
    _switch('--no-aug', 'disable all augmentation, whatever other options say', recipe=True),
    _flag('--train-crop-mode', 'random crop of training images: resized (rrc), or with the ratio kept and a centre '
          '(rkrc) or random (rkrr) crop', recipe=True, choices=('rrc', 'rkrc', 'rkrr')),
    _flag('--scale', 'smallest and largest area of the random crop, as part of the image', float, [0.08, 1.0],
          '[0.001, 2]',
          recipe=True, nargs='+', metavar='PCT'),
    _flag('--ratio', 'smallest and largest aspect ratio of the random crop', float, [3 / 4, 4 / 3], '[0.1, 10]',
          recipe=True, nargs='+', metavar='RATIO'),
    _flag('--hflip', 'probability of a horizontal flip', float, 0.5, SHARE, recipe=True, metavar='P'),
    _flag('--vflip', 'probability of a vertical flip', float, 0.0, SHARE, recipe=True, metavar='P'),
    _flag('--color-jitter', 'strength of the colour jitter', float, 0.4, '[0, 10]', recipe=True, metavar='F'),
    _flag('--color-jitter-prob', 'probability of the colour jitter (default: always)', float, None, SHARE, metavar='P'),
    _flag('--grayscale-prob', 'probability of conversion to greyscale', float, None, SHARE, metavar='P'),
    _flag('--gaussian-blur-prob', 'probability of a Gaussian blur', float, None, SHARE, metavar='P'),
    _flag('--aa', "AutoAugment policy: 'v0', 'original', 'rand-m9-mstd0.5', 'augmix-m3', ...", auto_augment,
          recipe=True,
          metavar='NAME'),
    _flag('--aug-repeats', 'number of times each sample is repeated, for several processes', float, 0.0, '[0, 100]',
          recipe=True, metavar='N'),
    _flag('--aug-splits', 'augmentation splits: 0, or at least 2', int, 0, '[0, 16]', metavar='N'),
    _switch('--jsd-loss', 'Jensen-Shannon divergence plus cross entropy; needs --aug-splits'),
    _switch('--bce-loss', 'binary cross entropy', recipe=True),
    _switch('--bce-sum', 'sum the binary cross entropy over the classes instead of averaging it'),
    _flag('--bce-target-thresh', 'threshold that makes the targets of the binary cross entropy 0 or 1', float, None,
          SHARE, metavar='P'),
    _flag('--bce-pos-weight', 'weight of positive targets in the binary cross entropy', float, None, '[0, 1000000]',
          metavar='W'),
    _flag('--reprob', 'probability of random erasing', float, 0.0, SHARE, recipe=True, metavar='P'),
    _flag('--remode', 'fill of random erasing: zeros (const), one colour (rand) or noise (pixel)', default='pixel',
          recipe=True, choices=('const', 'rand', 'pixel')),
    _flag('--recount', 'largest number of rectangles of random erasing', int, 1, '[1, 100]', recipe=True, metavar='N'),
    _switch('--resplit', 'do not erase in the first, clean augmentation split'),
    _flag('--mixup', 'alpha of Mixup; 0 disables it', float, 0.0, '[0, 100]', recipe=True, metavar='A'),
    _flag('--cutmix', 'alpha of CutMix; 0 disables it', float, 0.0, '[0, 100]', recipe=True, metavar='A'),
    _flag('--cutmix-minmax', 'smallest and largest side of the CutMix rectangle, as part of the image; enables CutMix',
          float, None, SHARE, nargs='+', metavar='F'),
    _flag('--mixup-prob', 'probability of Mixup or CutMix', float, 1.0, SHARE, recipe=True, metavar='P'),
    _flag('--mixup-switch-prob', 'probability of CutMix instead of Mixup where both are enabled', float, 0.5, SHARE,
          metavar='P'),
    _flag('--mixup-mode', 'unit that Mixup and CutMix draw parameters for: batch, pair of images, or image',
          default='batch', choices=('batch', 'pair', 'elem')),
    _flag('--mixup-off-epoch', 'first epoch without Mixup and CutMix, 0 for never', int, 0, EPOCHS, recipe=True,
          metavar='N'),
    _flag('--smoothing --label-smoothing', 'label smoothing', float, 0.1, '[0, 1)', recipe=True, metavar='F'),
    _flag('--train-interpolation', 'resize method of training', default='random', recipe=True, choices=INTERPOLATIONS,
          metavar='NAME'),
    _flag('--drop', 'dropout rate', float, 0.0, '[0, 1)', recipe=True, metavar='P'),
    _flag('--drop-connect', 'old name of --drop-path', float, SUPPRESS, '[0, 1)', dest='drop_path', metavar='P'),
    _flag('--drop-path', 'drop path rate, for models that support it', float, None, '[0, 1)', recipe=True, metavar='P'),
    _flag('--drop-block', 'drop block rate, for models that support it', float, None, '[0, 1)', metavar='P'),
))

_batch_norm = Group('Batch normalisation', (
    _flag('--bn-momentum', "BatchNorm momentum (default: the model's)", float, None, SHARE, recipe=True, metavar='M'),
    _flag('--bn-eps', "BatchNorm epsilon (default: the model's)", float, None, '(0, 1]', recipe=True, metavar='EPS'),
    _switch('--sync-bn', 'compute BatchNorm statistics over all processes', recipe=True),
    _flag('--dist-bn', "way to share running statistics after each epoch: 'reduce', 'broadcast', or '' for none",
          default='reduce', choices=('reduce', 'broadcast', '')),
    _switch('--split-bn', 'compute separate BatchNorm statistics for each augmentation split'),
))

_ema = Group('Moving average of the weights', (
    _switch('--model-ema', 'keep an exponential moving average of the weights, and evaluate it', recipe=True),
    _switch('--model-ema-force-cpu', 'keep the average of the weights in host memory, without evaluating it'),
    _flag('--model-ema-decay', 'decay of the average per update', float, 0.9998, SHARE, recipe=True, metavar='F'),
    _switch('--model-ema-warmup', 'start with a smaller decay of the average'),
))

_misc = Group('Running, logging and saving', (
    _flag('--seed', 'random seed', int, 42, '[0, 4294967295]', recipe=True, metavar='S'),
    _flag('-p --log-interval --print-freq', 'updates from one log line to the next', int, 50, POSITIVE, metavar='N'),
    _flag('--val-interval', 'epochs from one validation and checkpoint to the next', int, 1, POSITIVE, metavar='N'),
    _flag('--recovery-interval', 'updates from one recovery checkpoint to the next, 0 for none', int, 0, NATURAL,
          metavar='N'),
    _flag('--checkpoint-hist', 'number of best checkpoints to keep', int, 10, '[1, 1000]', metavar='N'),
    _flag('-j --workers', 'loading processes per training process', int, 4, NATURAL, metavar='N'),
    _flag('--worker-seeding', 'seeding of loading processes, for streams; other data sets do not depend on it',
          default='all', choices=('all', 'part')),
    _switch('--pin-mem', 'page-locked memory for the batches of streams; other data sets use it where it helps'),
    _switch('--no-prefetcher', 'normalise images on the host instead of on the device'),
    _flag('--input-backend', 'way from an image file to pixels: pillow, or fast, for RGB images, with the same '
          'augmentation up to rounding', default='pillow', recipe=True, choices=('pillow', 'fast')),
    _switch('--save-images', 'save a batch of training images at each log line'),
    _flag('--output', 'folder of all experiments (default: ./output/train)', default='', metavar='DIR'),
    _flag('--experiment', 'subfolder of this experiment (default: date, model and image size)', default='',
          metavar='NAME'),
    _flag('--eval-metric', 'metric that selects the best checkpoint', default='top1',
          choices=('top1', 'top5', 'loss')),
    _flag('--tta', 'number of views in validation: 2 averages the logits of each image and its mirror image', int, 0,
          NATURAL, metavar='N'),
    _switch('--use-multi-epochs-loader', 'keep the loading processes busy from one epoch to the next'),
    _switch('--log-tensorboard', "log to TensorBoard, in the run's folder (pip install tensorboard)"),
    _switch('--log-wandb', 'log to Weights & Biases (pip install wandb)'),
    _flag('--wandb-project', 'project at Weights & Biases', metavar='NAME'),
    _flag('--wandb-tags', 'tags of the run at Weights & Biases', default=[], nargs='+', metavar='TAG'),
    _flag('--wandb-resume-id', 'run at Weights & Biases to continue; needs --resume', default='', metavar='ID'),
    _flag('--push-to-hub', 'repository of the Hugging Face Hub that the best weights are published to at the end',
          default='', metavar='OWNER/NAME'),
))

_sizes = Group('Training with several image sizes', (
    _flag('--train-img-sizes', 'image sizes, one of which is drawn for each batch', int, None, SIZE, nargs='+',
          metavar='N'),
    _flag('--train-batch-sizes', 'batch size for each image size (default: --batch-size)', int, None, BATCH,
          nargs='+', metavar='N'),
    _flag('--train-size-probs', 'weight of each image size in the draw (default: equal)', float, None, '[0, 1000000]',
          nargs='+', metavar='P'),
    _flag('--train-size-schedule', 'draw of the image size: constant, or progressive from the first to the last',
          default='constant', choices=('constant', 'progressive')),
    _flag('--train-size-schedule-spread', 'width of the progressive draw, in sizes', float, 0.65, '[0.01, 100]',
          metavar='F'),
    _flag('--train-size-random-mix', 'uniform part of the progressive draw', float, 0.1, SHARE, metavar='P'),
    _flag('--train-batches-per-epoch --train-steps-per-epoch', 'batches in an epoch (default: as the data gives)', int,
          None, '[1, 10000000]', metavar='N'),
    _flag('--variable-batch-loss-scale', 'growth of the loss with the batch size, relative to the average one',
          default='none', choices=('none', 'sqrt', 'linear')),
))

_distillation = Group('Distillation', (
    _flag('--kd-model-name', 'pretrained model that is the teacher', metavar='NAME'),
    _flag('--kd-distill-type', "output of the teacher to match; 'token' is for models with a distillation head",
          default='logit', choices=('logit', 'feature', 'token')),
    _flag('--kd-loss-type', 'distillation loss on logits', default='kl', choices=('kl',)),
    _flag('--distill-loss-weight', 'weight of the distillation loss', float, None, '[0, 1000000]', metavar='W'),
    _flag('--task-loss-weight', 'weight of the classification loss; if given alone, the distillation loss gets 1 minus '
          'this', float, None, '[0, 1000000]', metavar='W'),
    _flag('--kd-temperature', 'softmax temperature of distillation', float, 4.0, '[0.01, 1000]', metavar='T'),
    _flag('--kd-student-feature-dim', 'feature width of the student (default: detected)', int, None, '[1, 100000]',
          metavar='N'),
    _flag('--kd-teacher-feature-dim', 'feature width of the teacher (default: detected)', int, None, '[1, 100000]',
          metavar='N'),
    _flag('--kd-token-distill-type', 'targets of token distillation', default='soft', choices=('soft', 'hard')),
))

_COMPATIBILITY = 'Accepted for compatibility, without effect'

# Options of timm's scripts that have no effect here, by script.
INERT = {
    'train.py': Group(_COMPATIBILITY, (
        _switch('--channels-last', 'memory layout; the best one of the device is used in any case'),
        _flag('--local-rank', 'index of this process on its machine; torchrun sets LOCAL_RANK instead', int, 0, NATURAL,
              metavar='N'),
    )),
    'validate.py': Group(_COMPATIBILITY, (
        _switch('--channels-last', 'memory layout; the best one of the device is used in any case'),
        _flag('--num-gpu', 'number of devices, 1; torchrun starts more processes', int, 1, POSITIVE, metavar='N'),
    )),
    'onnx_export.py': Group(_COMPATIBILITY, (
        _switch('--reparam', 'reparameterisation; this network has nothing to reparameterise'),
        _switch('--check-forward', 'comparison with PyTorch; always done where onnxruntime is installed'),
    )),
}
INERT['inference.py'] = INERT['validate.py']

TRAIN_FLAGS: tuple[Group, ...] = (
    _data, _model, _device, _processes, _optimizer, _schedule, _augmentation, _batch_norm, _ema, _misc, _sizes,
    _distillation, INERT['train.py'],
)

# Names of the options that determine the result of a training, for model cards. None of them holds a path.
RECIPE = tuple(flag.dest for group in TRAIN_FLAGS for flag in group.flags if flag.recipe)

# Options of timm's train.py that are refused, with the reason.
REFUSED: dict[str, str] = dict.fromkeys((
    '--naflex-loader', '--naflex-train-seq-lens', '--naflex-max-seq-len', '--naflex-patch-sizes',
    '--naflex-patch-size-probs', '--naflex-loss-scale', '--naflex-patchify-channels-first',
), 'NaFlex loaders feed sequences of patches to vision transformers, and Inception-ResNet-v2 is a convolutional '
   "network. Use --img-size or --train-img-sizes, or timm's own train.py for a transformer.")


TRAIN = CommandLine('train.py', (
    "Train Inception-ResNet-v2, or any timm model, on NPU, CUDA or CPU. The options are those of timm's train.py; "
    "where two names are given, the second is Ascend ModelZoo's. '-' and '_' in names are the same."),
    TRAIN_FLAGS, REFUSED)

# Options that validate.py and inference.py share.
ENGINE_FLAGS = (
    Flag('--engine', 'runtime for the folded network: torch, openvino, onnxruntime, om, or auto for the fastest one as '
         'measured on this machine (default: the network as it was trained)', rest={'metavar': 'NAME'}),
    Flag('--calibration', 'folder of images; with --engine openvino or onnxruntime, compute in int8 with the ranges of '
         'these images', default='', rest={'metavar': 'DIR'}),
)


def device_switches(args: Namespace) -> dict[str, bool | None]:
    """Return the options that ``device.configure`` takes, for a script that has all of them."""
    return {name: getattr(args, name) for name in DEVICE_SWITCHES}


def pick(*names: str) -> tuple[Flag, ...]:
    """Return options of train.py by the names of their attributes, for a script that shares them."""
    known = {flag.dest: flag for group in TRAIN_FLAGS for flag in group.flags if flag.default is not SUPPRESS}
    return tuple(known[name] for name in names)

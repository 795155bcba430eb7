"""Options: timm's names and defaults, the zoo's names for them, YAML, and one line for whatever is wrong."""

import re

import pytest

from timm_npu_irv2.cli.flags import REFUSED, TRAIN_FLAGS
from timm_npu_irv2.cli.parser import as_yaml
from timm_npu_irv2.errors import UserError
from timm_npu_irv2.training.options import parse_args

# The options of timm 1.0.31's train.py.
TIMM_FLAGS = """
--aa --amp --amp-dtype --aug-repeats --aug-splits --batch-size --bce-loss --bce-pos-weight --bce-sum
--bce-target-thresh --bn-eps --bn-momentum --channels-last --checkpoint-hist --class-map --clip-grad --clip-mode
--color-jitter --color-jitter-prob --config --cooldown-epochs --crop-pct --cutmix --cutmix-minmax --data-dir --dataset
--dataset-download --dataset-trust-remote-code --decay-epochs --decay-milestones --decay-rate --device
--device-modules --dist-bn --distill-loss-weight --dr --drop --drop-block --drop-connect --drop-path --epoch-repeats
--epochs --eval-metric --experiment --fast-norm --fuser --gaussian-blur-prob --gp --grad-accum-steps
--grad-checkpointing --grayscale-prob --head-init-bias --head-init-scale --hflip --img-size --in-chans
--initial-checkpoint --input-img-mode --input-key --input-size --interpolation --jsd-loss --kd-distill-type
--kd-loss-type --kd-model-name --kd-student-feature-dim --kd-teacher-feature-dim --kd-temperature
--kd-token-distill-type --layer-decay --layer-decay-min-scale --layer-decay-no-opt-scale --log-interval --log-wandb
--lr --lr-base --lr-base-scale --lr-base-size --lr-cycle-decay --lr-cycle-limit --lr-cycle-mul --lr-k-decay --lr-noise
--lr-noise-pct --lr-noise-std --mean --min-lr --mixup --mixup-mode --mixup-off-epoch --mixup-prob --mixup-switch-prob
--model --model-dtype --model-ema --model-ema-decay --model-ema-force-cpu --model-ema-warmup --model-kwargs --momentum
--naflex-loader --naflex-loss-scale --naflex-max-seq-len --naflex-patch-size-probs --naflex-patch-sizes
--naflex-patchify-channels-first --naflex-train-seq-lens --no-aug --no-ddp-bb --no-prefetcher --no-resume-opt
--num-classes --opt --opt-betas --opt-eps --opt-kwargs --output --patience-epochs --pin-mem --pretrained
--pretrained-path --ratio --recount --recovery-interval --remode --reprob --resplit --resume --save-images --scale
--sched --sched-on-updates --seed --smoothing --split-bn --start-epoch --std --sync-bn --synchronize-step --target-key
--task-loss-weight --torchcompile --torchcompile-mode --torchscript --train-batch-sizes --train-batches-per-epoch
--train-crop-mode --train-img-sizes --train-interpolation --train-num-samples --train-size-probs
--train-size-random-mix --train-size-schedule --train-size-schedule-spread --train-split --train-steps-per-epoch --tta
--use-multi-epochs-loader --val-interval --val-num-samples --val-split --validation-batch-size
--variable-batch-loss-scale --vflip --wandb-project --wandb-resume-id --wandb-tags --warmup-epochs --warmup-lr
--warmup-prefix --weight-decay --worker-seeding --workers -b -c -j -vb
""".split()
# What the zoo's script takes, and what an NPU needs.
ZOO_FLAGS = """
--data --addr --arch --workers --epoch --epochs --batch-size --lr --learning-rate --mom --momentum --weight_decay --amp
--loss-scale --opt-level --multiprocessing-distributed --device-list --seed --print-freq --label-smoothing --dist-url
--dist-backend --world-size --rank --device --data_path --amp-impl --allow-internal-format --jit-compile --on-bad-image
""".split()
# timm's defaults of the options that decide how a network is trained.
TIMM_DEFAULTS = {
    'batch_size': 128, 'opt': 'sgd', 'momentum': 0.9, 'weight_decay': 2e-5, 'sched': 'cosine', 'lr': None,
    'lr_base': 0.1,
    'lr_base_size': 256, 'warmup_lr': 1e-5, 'warmup_epochs': 5, 'min_lr': 0, 'epochs': 300,
    'decay_milestones': [90, 180, 270],
    'decay_epochs': 90, 'decay_rate': 0.1, 'scale': [0.08, 1.0], 'ratio': [3 / 4, 4 / 3], 'hflip': 0.5, 'vflip': 0.0,
    'color_jitter': 0.4, 'aa': None, 'smoothing': 0.1, 'train_interpolation': 'random', 'reprob': 0.0, 'recount': 1,
    'remode': 'pixel', 'mixup': 0.0, 'cutmix': 0.0, 'mixup_prob': 1.0, 'mixup_switch_prob': 0.5, 'drop': 0.0,
    'dist_bn': 'reduce', 'model_ema': False, 'model_ema_decay': 0.9998, 'seed': 42, 'log_interval': 50, 'workers': 4,
    'checkpoint_hist': 10, 'eval_metric': 'top1', 'train_split': 'train', 'val_split': 'validation', 'amp': False,
    'clip_grad': None, 'clip_mode': 'norm', 'lr_cycle_decay': 0.5, 'patience_epochs': 10, 'kd_temperature': 4.0,
    'model_kwargs': {}, 'opt_kwargs': {}, 'grad_accum_steps': 1, 'val_interval': 1, 'recovery_interval': 0,
}  # fmt: skip

SPELLINGS = {name for group in TRAIN_FLAGS for flag in group.flags for name in flag.names.split()} | {'-c', '--config'}


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_args(words)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_every_option_of_timm_is_known_and_only_naflex_is_refused():
    assert {name for name in TIMM_FLAGS if name not in SPELLINGS | REFUSED.keys()} == set()
    assert all(name.startswith('--naflex') for name in REFUSED)


def test_every_parameter_of_the_zoo_is_known():
    assert {name for name in ZOO_FLAGS if name.replace('_', '-') not in SPELLINGS} == set()


def test_no_spelling_belongs_to_two_options():
    names = [name for group in TRAIN_FLAGS for flag in group.flags for name in flag.names.split()]
    assert len(names) == len(set(names))


def test_defaults_are_those_of_timm():
    args = vars(parse_args([]))
    assert {name: args[name] for name in TIMM_DEFAULTS} == TIMM_DEFAULTS


def test_defaults_that_differ_from_timm_follow_the_device():
    args = parse_args([])
    assert (args.model, args.device, args.amp_dtype) == ('inception_resnet_v2_npu', None, None)


@pytest.mark.parametrize(('words', 'attribute', 'value'), [
    ('--data x', 'data_dir', 'x'), ('--data_path=x', 'data_dir', 'x'), ('x', 'data_dir', 'x'),
    ('--epoch 3', 'epochs', 3), ('--learning-rate 0.6', 'lr', 0.6), ('--mom 0.8', 'momentum', 0.8),
    ('--weight_decay 1e-4', 'weight_decay', 1e-4), ('--print-freq 7', 'log_interval', 7),
    ('--label-smoothing 0.2', 'smoothing', 0.2), ('--dr 0.5', 'decay_rate', 0.5),
    ('--drop-connect 0.1', 'drop_path', 0.1),
    ('--train-steps-per-epoch 9', 'train_batches_per_epoch', 9), ('-vb 3', 'validation_batch_size', 3),
    ('-j 0', 'workers', 0),
    ('--loss-scale dynamic', 'loss_scale', 'dynamic'), ('--amp --loss-scale 128', 'loss_scale', 128.0),
    ('--arch inceptionresnetv2', 'model', 'inception_resnet_v2_npu'),
    ('--arch Inception-ResNet-v2', 'model', 'inception_resnet_v2_npu'),
    ('--arch inception_resnet_v2', 'model', 'inception_resnet_v2_npu'),
    ('--model inception_resnet_v2', 'model', 'inception_resnet_v2'),
    ('--arch resnet50', 'model', 'resnet50'), ('--opt-level O2', 'amp', True), ('--amp --opt-level O0', 'amp', False),
    ('--torchcompile', 'torchcompile', 'inductor'), ('--grad-accum-steps 0', 'grad_accum_steps', 1),
    ('--opt-kwargs a=1 b=(1,2) c=x', 'opt_kwargs', {'a': 1, 'b': (1, 2), 'c': 'x'}),
])  # fmt: skip
def test_names_and_values_arrive_where_timm_has_them(words, attribute, value):
    words = words.split() + (['--amp'] if words == '--loss-scale dynamic' else [])
    assert getattr(parse_args(words), attribute) == value


@pytest.mark.parametrize(('words', 'said'), [
    ('--batch-size 0', '--batch-size 0: must be at least 1'), ('--workers -1', '--workers -1: must be at least 0'),
    ('--img-size 74', '75'), ('--input-size 3 75 74', '75'), ('--train-img-sizes 75 64', '75'),
    ('--lr nan', '--lr'), ('--lr inf', '--lr'), ('--momentum -0.1', '--momentum'), ('--smoothing 1', 'less than 1'),
    ('--hflip 1.5', 'at most 1'), ('--scale 0.5 0.1', '--scale'), ('--scale 0.5', '--scale'),
    ('--opt-betas 0.9 2', '--opt-betas'),
    ('--std 0', '--std'), ('--mean 0.5 0.5', '--mean'), ('--seed 4294967296', '--seed'),
    ('--loss-scale 0 --amp', '--loss-scale'),
    ('--loss-scale fast --amp', '--loss-scale'), ('--batch-size many', 'many'), ('--sched foo', 'cosine'),
    ('--momentumm 1', 'Did you mean --momentum?'), ('--model-kwargs x', 'x'), ('a b', 'b'),
    ('--lr', 'expected one argument'),
    ('--naflex-loader', 'vision transformers'), ('--naflex-patch-sizes=16', 'vision transformers'),
    ('--torchscript --torchcompile', 'exclude'),
    ('--torchscript --kd-model-name x', 'exclude'), ('--torchscript --sync-bn', '--sync-bn'),
    ('--sync-bn --split-bn --resplit', 'exclude'),
    ('--jsd-loss', '--aug-splits'), ('--aug-splits 1', 'at least 2'), ('--split-bn', '--aug-splits'),
    ('--mixup 0.1 --aug-splits 2', '--aug-splits'), ('--jsd-loss --bce-loss --aug-splits 2', 'exclude'),
    ('--amp --model-dtype bfloat16', 'leave one out'), ('--amp-impl apex', '--amp'), ('--loss-scale 128', '--amp'),
    ('--device-list 0,0 --multiprocessing-distributed', "'0,0'"), ('--device-list 0,x', "'0,x'"),
    ('--device-list 0,1', '--multiprocessing-distributed'), ('--rank 2 --world-size 2', '--rank 2'),
    ('--dist-url tcp://host', 'tcp://host:port'), ('--resume auto', '--experiment'),
    ('--wandb-resume-id x', '--resume'),
    ('--decay-milestones 5 3', 'increasing'), ('--train-size-probs 1', '--train-img-sizes'),
    ('--train-img-sizes 75 96 --train-batch-sizes 4', 'each'),
    ('--train-size-schedule progressive', '--train-img-sizes'),
    ('--img-size 75 --input-size 3 96 96', 'different'), ('--in-chans 1 --input-size 3 96 96', 'different'),
    ('--distill-loss-weight 1', '--kd-model-name'),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(words, said):
    assert said in refusal(*words.split())


def test_every_number_has_a_range_that_leaves_out_nan():
    for group in TRAIN_FLAGS:
        for flag in group.flags:
            if flag.type is float:
                name = next(name for name in flag.names.split() if name.startswith('--'))
                count = flag.rest.get('nargs')
                assert 'nan' in refusal(name, *['nan'] * (count if isinstance(count, int) else 1)), name


def test_help_names_every_option_once_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(['--help'])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name in TIMM_FLAGS:
        if name not in REFUSED:
            assert re.search(rf'(^|\s){name}[\s,]', text), name
    assert re.search(r'--hflip P\s+probability of a horizontal flip \(default: 0.5\)', text)


# YAML


def config(tmp_path, text: str) -> list[str]:
    path = tmp_path / 'config.yaml'
    path.write_text(text)
    return ['-c', str(path)]


def test_a_config_takes_hyphens_underscores_and_the_zoos_names(tmp_path):
    args = parse_args(
        config(
            tmp_path,
            'batch-size: 8\nweight_decay: 1e-4\nepoch: 3\narch: inceptionresnetv2\ndata: /x\n'
            'amp: true\nscale: [0.2, 1]\nopt-kwargs: {nesterov: false}\nlr: null\n',
        )
    )
    assert (args.batch_size, args.weight_decay, args.epochs, args.data_dir) == (8, 1e-4, 3, '/x')
    assert (args.model, args.amp, args.scale) == ('inception_resnet_v2_npu', True, [0.2, 1.0])
    assert (args.opt_kwargs, args.lr) == ({'nesterov': False}, None)


def test_the_command_line_wins_over_the_config(tmp_path):
    words = config(tmp_path, 'model: resnet50\nlr: 0.1\ndata-dir: /config\nscale: [0.2, 1]\nopt-level: O2\n')
    args = parse_args([*words, '/line', '--lr', '0.2', '--arch', 'Inception-ResNet-v2', '--opt-level', 'O0'])
    assert (args.lr, args.data_dir, args.model, args.scale) == (0.2, '/line', 'inception_resnet_v2_npu', [0.2, 1.0])
    assert not args.amp


def test_options_written_as_yaml_come_back_the_same(tmp_path):
    words = (
        '/d --amp --scale 0.1 0.9 --opt-kwargs a=1 b=text --experiment -x --resume r --wandb-tags a b --lr-noise 0.4 '
        '--loss-scale 128 --torchcompile --cutmix-minmax 0.2 0.8'
    ).replace('--experiment -x', '--experiment=-x')
    args = parse_args(words.split())
    assert parse_args(config(tmp_path, as_yaml(args))) == args


@pytest.mark.parametrize(('text', 'said'), [
    ('momentumm: 1', "unknown key 'momentumm'. Did you mean --momentum?"), ('config: x', "unknown key 'config'"),
    ('amp: 1', 'expected true or false'), ('lr: fast', 'fast'), ('lr: [1, 2]', "'lr' cannot be [1, 2]"),
    ('lr: true', "'lr'"),
    ('batch-size: 0', 'at least 1'), ('- a', 'option: value'), ('a: [', 'cannot read'), ('sched: foo', 'cosine'),
    ('naflex_loader: true', 'vision transformers'), ('batch_size: 2.5', '2.5'),
])  # fmt: skip
def test_a_wrong_config_is_named_in_one_line(tmp_path, text, said):
    assert said in refusal(*config(tmp_path, text))


def test_a_config_without_end_is_not_read_whole(tmp_path):
    """As that of /dev/zero, for which no memory would be enough."""
    (tmp_path / 'c.yaml').write_text('# comment\n' * 110_000)
    with pytest.raises(UserError, match=r'c\.yaml: it has more than 1048576 bytes'):
        parse_args(['-c', str(tmp_path / 'c.yaml')])


def test_a_missing_config_is_named(tmp_path):
    assert 'nowhere.yaml' in refusal('-c', str(tmp_path / 'nowhere.yaml'))


def test_timms_own_args_yaml_is_taken(tmp_path):
    """timm writes all its defaults, those of NaFlex among them."""
    args = parse_args(
        config(tmp_path, 'naflex_loader: false\nnaflex_train_seq_lens: [128]\nmodel: resnet50\naa: null\n')
    )
    assert args.model == 'resnet50'

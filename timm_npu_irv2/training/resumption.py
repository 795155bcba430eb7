"""What may change between a checkpoint and the run that continues it: options and data."""

import hashlib
from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..escaping import printable

__all__ = ['APPLIED', 'DIVIDED', 'FREE', 'REFUSED', 'changed_options', 'check_data', 'check_options', 'describe_data',
           'order_classes']

# Every option of train.py is in one of these, by its attribute in the parsed namespace.
# FREE: it does not concern the training's results, or only its beginning.
FREE = frozenset('''
    data_dir train_split class_map dataset_download dataset_trust_remote_code allow_changed_data
    resume no_resume_opt start_epoch pretrained pretrained_path initial_checkpoint head_init_scale head_init_bias
    device_modules elastic device_list addr dist_url dist_backend world_size rank local_rank
    workers worker_seeding pin_mem use_multi_epochs_loader validation_batch_size channels_last synchronize_step
    grad_checkpointing recompute log_interval recovery_interval checkpoint_hist save_images output experiment
    log_tensorboard log_wandb wandb_project wandb_tags wandb_resume_id push_to_hub
'''.split())
# APPLIED: a new value takes effect from the checkpoint on, and the log says so.
APPLIED = frozenset('''
    epochs sched sched_on_updates lr lr_base lr_base_size lr_base_scale lr_noise lr_noise_pct lr_noise_std lr_cycle_mul
    lr_cycle_decay lr_cycle_limit lr_k_decay warmup_lr min_lr decay_milestones decay_epochs warmup_epochs warmup_prefix
    cooldown_epochs patience_epochs decay_rate
    momentum weight_decay opt_eps opt_betas clip_grad clip_mode
    img_size input_size crop_pct mean std interpolation input_img_mode on_bad_image
    no_aug train_crop_mode scale ratio hflip vflip color_jitter color_jitter_prob grayscale_prob gaussian_blur_prob aa
    aug_splits reprob remode recount resplit mixup cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode
    mixup_off_epoch train_interpolation no_prefetcher input_backend
    smoothing jsd_loss bce_loss bce_sum bce_target_thresh bce_pos_weight variable_batch_loss_scale
    drop drop_path drop_block bn_momentum bn_eps sync_bn dist_bn no_ddp_bb grad_compress
    model_ema model_ema_force_cpu model_ema_decay model_ema_warmup
    device amp amp_dtype amp_impl opt_level loss_scale model_dtype allow_internal_format allow_hf32 jit_compile
    tuned deterministic fuser fast_norm torchscript torchcompile torchcompile_mode
    kd_loss_type kd_temperature kd_token_distill_type distill_loss_weight task_loss_weight
    val_split val_num_samples val_interval tta
'''.split())
# DIVIDED: with the number of processes they say how an update is divided, see layout.py. Its images must stay the same.
DIVIDED = frozenset('batch_size grad_accum_steps multiprocessing_distributed'.split())
# REFUSED: the position in the epoch, the optimizer's state or the best metric would lose their meaning.
REFUSED = frozenset('''
    seed epoch_repeats aug_repeats train_batches_per_epoch
    train_img_sizes train_batch_sizes train_size_probs train_size_schedule train_size_schedule_spread
    train_size_random_mix train_num_samples dataset input_key target_key
    model num_classes in_chans gp model_kwargs split_bn kd_model_name kd_distill_type kd_student_feature_dim
    kd_teacher_feature_dim opt opt_kwargs layer_decay layer_decay_min_scale layer_decay_no_opt_scale eval_metric
'''.split())


def changed_options(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of the options of a checkpoint that have other values now, but for those of ``FREE``."""
    return sorted(name for name in then.keys() & now.keys() - FREE if then[name] != now[name])


def check_options(path: Any, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return a line about the options that have changed and take effect from now on; '' if there are none.

    Args:
        path: Checkpoint, for the message.
        then: Options of the checkpoint.
        now: Options of the run that continues it.

    Raises:
        UserError: An option has changed that may not.
    """
    changed = changed_options(then, now)
    refused = [name for name in changed if name in REFUSED]
    if refused:
        differences = ', '.join(f'{_option(name)} {_value(then[name])}, not {_value(now[name])}' for name in refused)
        raise UserError(f'{path} belongs to a run with {differences}: resume it with the same options, or use '
                        '--no-resume-opt, which starts a new optimizer from its weights.')
    return ', '.join(f'{_option(name)} {_value(now[name])} (before: {_value(then[name])})' for name in changed)


def _option(name: str) -> str:
    return '--' + name.replace('_', '-')


def _value(value: Any) -> str:
    text = ' '.join(map(str, value)) if isinstance(value, list) else str(value)
    return printable(text)[:200] or "''"


def describe_data(samples: Any, class_to_idx: Mapping[str, int] | None) -> dict[str, Any]:
    """Return the fingerprint of a data set.

    Args:
        samples: timm's or torchvision's data set.
        class_to_idx: Class indices by name; None where the data set does not know them.

    Returns:
        'classes' in the order of their indices, the 'count' of samples, and 'names', a hash of the samples' names in
        their order. None stands for what the data set does not know, such as the length of a stream.
    """
    classes = None if class_to_idx is None else order_classes(class_to_idx)
    names = None
    reader: Any = getattr(samples, 'reader', None)
    if hasattr(reader, 'hash_names'):
        names = reader.hash_names()
    elif hasattr(reader, 'samples'):  # readers of timm's that know all names
        names = hashlib.sha256('\0'.join(samples.filenames()).encode(errors='surrogateescape')).hexdigest()
    return {'classes': classes, 'count': len(samples) if hasattr(samples, '__len__') else None, 'names': names}


def order_classes(class_to_idx: Mapping[str, int]) -> list[str]:
    """Return the names of the classes in the order of their indices."""
    return sorted(class_to_idx, key=lambda name: (class_to_idx[name], name))


def check_data(path: Any, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError if the data sets {split: fingerprint} are not those of a checkpoint, with what has changed."""
    for split in then.keys() & now.keys():
        before, after = ({key: data[split].get(key) for key in ('classes', 'count', 'names')} for data in (then, now))
        changes = [_class_change(before['classes'], after['classes']), _count_change(before['count'], after['count'])]
        changes = [change for change in changes if change]
        if not changes and None not in (before['names'], after['names']) and before['names'] != after['names']:
            changes = ['files were renamed or replaced']
        if changes:
            raise UserError(f'the {split} data is not that of {path}: {"; ".join(changes)}. Restore it, or use '
                            '--allow-changed-data to continue with it as it is.')


def _class_change(then: list[str] | None, now: list[str] | None) -> str:
    if then is None or now is None or then == now:
        return ''
    removed, added = sorted(set(then) - set(now)), sorted(set(now) - set(then))
    parts = [f'class {", ".join(names[:3])}{" ..." if len(names) > 3 else ""} {what}'
             for names, what in ((removed, 'is missing'), (added, 'is new')) if names]
    return ', '.join(parts) or 'the classes have other indices (--class-map names them)'


def _count_change(then: int | None, now: int | None) -> str:
    return '' if None in (then, now) or then == now else f'{now} samples, not {then}'

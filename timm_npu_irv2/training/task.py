"""The training task: the model with its loss, and with a teacher for distillation."""

from argparse import Namespace
from typing import Any

import torch
from timm.loss import create_classification_loss
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn

from ..cli.checks import name_option
from ..distributed import World
from .loaders import mixup_active

__all__ = ['build_task']


def build_task(model: nn.Module, args: Namespace, world: World) -> TrainingTask:
    """Return timm's task: the model with the training loss, and with a teacher for --kd-model-name.

    Raises:
        UserError: The model cannot be distilled with --kd-distill-type, or there is no such teacher.
    """
    common: dict[str, Any] = {'criterion': _training_loss(args), 'device': world.device, 'verbose': world.is_primary}
    if args.kd_model_name is None:
        return ClassificationTask(model, **common)
    common |= {
        'student_model': model, 'teacher_model': args.kd_model_name,
        'distill_loss_weight': args.distill_loss_weight, 'task_loss_weight': args.task_loss_weight}
    task: TrainingTask
    with name_option(f'--kd-model-name {args.kd_model_name}'):
        if args.kd_distill_type == 'feature':
            task = FeatureDistillationTask(
                **common,
                student_feature_dim=args.kd_student_feature_dim,
                teacher_feature_dim=args.kd_teacher_feature_dim,
            )
        elif args.kd_distill_type == 'logit':
            task = LogitDistillationTask(**common, loss_type=args.kd_loss_type, temperature=args.kd_temperature)
        else:
            task = TokenDistillationTask(
                **common, distill_type=args.kd_token_distill_type, temperature=args.kd_temperature)
    teacher: Any = task.teacher
    for parameter in teacher.parameters():
        parameter.requires_grad = False
    _fix_teacher_normalization(teacher, task.student_mean, task.student_std)
    return task


def _fix_teacher_normalization(teacher: Any, mean: Any, std: Any) -> None:
    """Decide once if the teacher needs other images than the student; timm asks the device in every step."""
    pairs = (mean, teacher.mean_kd), (std, teacher.std_kd)
    alike = all(torch.equal(student.cpu(), own.cpu()) for student, own in pairs)

    def normalize_input(images: torch.Tensor, *_: Any) -> torch.Tensor:
        return images if alike else (images * std + mean - teacher.mean_kd) / teacher.std_kd

    teacher.normalize_input = normalize_input


def _training_loss(args: Namespace) -> nn.Module:
    soft = mixup_active(args)
    if args.jsd_loss:
        return create_classification_loss('jsd', smoothing=args.smoothing, jsd_splits=args.aug_splits)
    if args.bce_loss:
        return create_classification_loss(
            'bce', smoothing=args.smoothing, soft_targets=soft, bce_target_thresh=args.bce_target_thresh,
            bce_sum=args.bce_sum, pos_weight=args.bce_pos_weight)
    return create_classification_loss('ce', smoothing=args.smoothing, soft_targets=soft)

"""Checks of options that several scripts share."""

from collections.abc import Iterable
from typing import Any

from timm.models import get_pretrained_cfg

from ..errors import UserError
from .flags import OUR_MODEL

__all__ = ['check_image_size', 'check_rules']


def check_rules(rules: Iterable[tuple[Any, str]]) -> None:
    """Raise UserError with the message of the first rule that is broken.

    Args:
        rules: Pairs of a condition, true if the rule is broken, and a message.
    """
    for broken, message in rules:
        if broken:
            raise UserError(message)


def check_image_size(model: str, sizes: Iterable[int]) -> None:
    """Raise UserError if an image is too small for Inception-ResNet-v2.

    Args:
        model: Name of the model; other models are not checked.
        sizes: Heights and widths in pixels.
    """
    smallest = get_pretrained_cfg(OUR_MODEL).to_dict()['min_input_size'][-1]  # type: ignore[union-attr]  # it exists
    size = min(sizes, default=smallest)
    if model.startswith('inception_resnet_v2') and size < smallest:
        raise UserError(f'image size {size}: Inception-ResNet-v2 needs at least {smallest} pixels.')

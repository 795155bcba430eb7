"""Types of options: functions from the text of an argument to its value, for argparse."""

import re
from argparse import ArgumentTypeError

__all__ = ['OUR_MODEL', 'auto_augment', 'loss_scale', 'model_name', 'module_name']

OUR_MODEL = 'inception_resnet_v2_npu'


def model_name(arch: str) -> str:
    """Return the model that the ModelZoo's --arch names: ours for any spelling of Inception-ResNet-v2."""
    squeezed = re.sub(r'[^a-z0-9]', '', arch.lower())
    return OUR_MODEL if squeezed in ('inceptionresnetv2', 'inceptionresnetv2npu') else arch


def loss_scale(text: str) -> float | str:
    """Return a number, or 'dynamic'.

    Raises:
        ArgumentTypeError: Neither.
    """
    try:
        return text if text == 'dynamic' else float(text)
    except ValueError as error:
        raise ArgumentTypeError(f"expected a number or 'dynamic', not '{text}'.") from error


def auto_augment(text: str) -> str:
    """Return a policy that timm's AutoAugment, RandAugment or AugMix accepts.

    Raises:
        ArgumentTypeError: Unknown policy, or a number in it that is out of range.
    """
    from timm.data import auto_augment as policies  # noqa: PLC0415 - takes a second to import

    kinds = {'rand': policies.rand_augment_transform, 'augmix': policies.augment_and_mix_transform}
    limits = {'mstd': 1000.0, 'mmax': 100.0}
    try:
        for name, number in re.findall(r'-([a-z]+)([\d.]+)', text):
            if float(number) > limits.get(name, 30.0):
                raise ValueError
        if text:
            if text.partition('-')[0] in kinds and not all(re.search(r'^t|\d', part) for part in text.split('-')[1:]):
                raise ValueError  # timm would leave such a part out
            kinds.get(text.partition('-')[0], policies.auto_augment_transform)(text, {'img_mean': (128, 128, 128)})
    except Exception as error:  # whatever the parsers of timm raise
        raise ArgumentTypeError(
            f"'{text}' is not an AutoAugment policy: use v0, original, 3a, rand-m9-mstd0.5, augmix-m3.") from error
    return text


def module_name(text: str) -> str:
    """Return the name of a Python module.

    Raises:
        ArgumentTypeError: Not the form of a name.
    """
    if not all(part.isidentifier() for part in text.split('.')):
        raise ArgumentTypeError(f"'{text}' is not the name of a Python module.")
    return text

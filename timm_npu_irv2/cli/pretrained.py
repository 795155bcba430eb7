"""A check of published weights before torch is loaded, so that a missing network is told at once."""

from argparse import Namespace
from collections.abc import Iterator

from .types import OUR_MODEL

__all__ = ['check_pretrained']


def check_pretrained(args: Namespace) -> None:
    """Raise UserError if weights that the options ask for are neither on the hub nor in its cache.

    Models of timm are left to the script, which finds them in timm's registry.

    Args:
        args: Options of train.py, validate.py, inference.py or onnx_export.py.
    """
    if names := sorted(set(_wanted(args))):
        from ..published import (  # noqa: PLC0415 - takes half a second, for a few command lines only
            CONFIG,
            REPOSITORIES,
            WEIGHTS,
            check_available,
            split_revision,
            translate_hub_errors,
        )

        for name in names:
            with translate_hub_errors(name):
                if name.startswith('hf-hub:'):
                    check_available(*split_revision(name.removeprefix('hf-hub:')), CONFIG)
                else:
                    tag = name.partition('.')[2] or next(iter(REPOSITORIES))
                    if tag in REPOSITORIES:
                        check_available(REPOSITORIES[tag], None, WEIGHTS)


def _wanted(args: Namespace) -> Iterator[str]:
    """Yield this network's name if its published weights are wanted, and 'hf-hub:…' of other published models."""
    options = vars(args)
    model, places = options.get('model', ''), options.get('checkpoint', ())
    places = [places] if isinstance(places, str) and places else places
    if 'checkpoint' in options:
        is_pretrained = not places
    else:
        is_pretrained = bool(options.get('pretrained')) and not options['pretrained_path']
    if is_pretrained and model.partition('.')[0] == OUR_MODEL:
        yield model
    for name in (model, *(places if len(places) == 1 else ())):  # of several networks, validate.py skips those
        if name.startswith('hf-hub:'):
            yield name

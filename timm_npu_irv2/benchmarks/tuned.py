"""``--tuned`` of the benchmarks: this network is measured with the settings that ``benchmark.py tune`` chose."""

from typing import Any

import torch

from .. import device as devices
from ..tuning import apply_settings, describe_outdated, resolve_tuned

__all__ = ['train_precision', 'tuned_settings']


def train_precision(device: torch.device, half: bool) -> str:
    """Return the precision of the training steps of the benchmarks, in the words of a result."""
    return f'O2 {str(devices.half_dtype(device)).removeprefix("torch.")}' if half else 'float32'


def tuned_settings(choice: str, device: torch.device, **workload: Any) -> dict[str, Any]:
    """Apply the settings of --tuned that hold for the process, say so in one line, and return all of them.

    Args:
        choice: Value of the option.
        device: Device of the workload.
        **workload: Arguments of :func:`.tuning.find_tuned`.

    Raises:
        UserError: The file is not a result, or is one for another workload.
    """
    tuned = resolve_tuned(choice, device, **workload)
    if tuned is None:
        if choice == 'auto' and (line := describe_outdated(device, **workload)):
            print(line)
        return {}
    apply_settings(tuned.chosen, device)
    print(tuned.describe(tuned.chosen), flush=True)
    return dict(tuned.chosen)

"""Facts about chips, for those who must not import torch: published ones of Ascend (``ascend.json``), and this CPU."""

import functools
import importlib.resources
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ['cpu_name', 'find_generation', 'load_facts']


@functools.cache
def load_facts() -> Mapping[str, Any]:
    """Return the facts, each part with its source."""
    return json.loads(importlib.resources.files('timm_npu_irv2').joinpath('ascend.json').read_text(encoding='utf-8'))


def find_generation(chip: str) -> str | None:
    """Return the generation of a chip by the name that its driver gives it; None for one that is not known."""
    generations = load_facts()['generations'].items()
    return next((generation for generation, fact in generations if re.fullmatch(fact['names'], chip)), None)


def cpu_name() -> str:
    """Return the name of the CPU as Linux shows it, elsewhere that of its architecture."""
    name = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.exists():
        lines = info.read_text(encoding='utf-8', errors='replace').splitlines()
        name = next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), name)
    return name

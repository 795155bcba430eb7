"""Published facts about CANN and Ascend chips (``ascend.json``), for those who must not import torch."""

import functools
import importlib.resources
import json
import re
from collections.abc import Mapping
from typing import Any

__all__ = ['find_generation', 'load_facts']


@functools.cache
def load_facts() -> Mapping[str, Any]:
    """Return the facts, each part with its source."""
    return json.loads(importlib.resources.files('timm_npu_irv2').joinpath('ascend.json').read_text(encoding='utf-8'))


def find_generation(chip: str) -> str | None:
    """Return the generation of a chip by the name that its driver gives it; None for one that is not known."""
    generations = load_facts()['generations'].items()
    return next((generation for generation, fact in generations if re.fullmatch(fact['names'], chip)), None)

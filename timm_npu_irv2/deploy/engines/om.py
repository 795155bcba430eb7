"""CANN's runtime for compiled models (.om), on Ascend's inference cards.

ATC compiles the network for the card at hand, and ``ais_bench`` of Ascend's tools runs it. Both come from Ascend and
are not on PyPI. This engine has been tested with a double of ``ais_bench``'s documented interface, not on a card:
https://gitee.com/ascend/tools/tree/master/ais-bench_workload/tool/ais_bench
"""

import logging
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from ...errors import UserError
from .. import onnx as graph
from .base import Engine, Session, Size

__all__ = ['OM']

_logger = logging.getLogger(__name__)

BATCHES = (1, 2, 4, 8)  # that the model is compiled for; others are filled up or divided
PRECISION_MODES = {'float16': 'force_fp16', 'float32': 'must_keep_origin_dtype'}
INSTALL = "source CANN's set_env.sh, and install aclruntime and ais_bench from https://gitee.com/ascend/tools"


class OM(Engine):
    """CANN's offline models, through ``ais_bench``."""

    name = 'om'
    model_file = 'model.om'
    dynamic_size = False

    def dtypes(self) -> tuple[str, ...]:
        """Return float16, and float32, which some cards refuse."""
        _interface()
        return 'float16', 'float32'

    def build(self, exported: Path, model: Path, dtype: str) -> None:
        """Compile for the card at hand with ATC."""
        name = graph.optional('acl', install=INSTALL).get_soc_name()
        if not name:
            raise UserError("engine 'om': CANN finds no card here; check `npu-smi info`.")
        images = graph.optional('onnx').load(str(exported)).graph.input[0]
        shape = [axis.dim_value or None for axis in images.type.tensor_type.shape.dim]
        command = graph.AtcCommand(exported, name, shape, BATCHES)
        command.words.append(f'--precision_mode={PRECISION_MODES[dtype]}')
        command.run()
        command.output.replace(model)

    def resolve_device(self, device: torch.device | str | None) -> str | None:
        """Return the index of a card, as in 'npu:1', which torch need not know."""
        kind, _, index = str(device or '').partition(':')
        if kind == 'cpu':
            raise UserError("engine 'om' runs on an Ascend card: leave out device='cpu', or use engine='openvino'.")
        return index or None

    def open(self, model: Path, dtype: str, device: str | None = None, size: Size | None = None) -> Session:
        """Load the model onto the card, whose index ``device`` is."""
        _logger.warning("engine 'om' has not been tried on a card: compare its logits with those of engine 'torch'.")
        session, lock = _interface().InferSession(int(device or 0), str(model)), threading.Lock()

        def run(images: np.ndarray) -> np.ndarray:
            parts = []
            for start in range(0, max(len(images), 1), BATCHES[-1]):
                part = images[start:start + BATCHES[-1]]
                size = next(each for each in BATCHES if each >= len(part))
                filled = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
                with lock:
                    (logits,) = session.infer([filled], mode='dymbatch')
                parts.append(np.asarray(logits, np.float32).reshape(size, -1)[:len(part)])
            return np.concatenate(parts)

        return run


def _interface() -> ModuleType:
    return graph.optional('ais_bench.infer.interface', install=INSTALL)

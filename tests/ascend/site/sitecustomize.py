"""Lets the torchvision that belongs to another build of torch be imported: Python imports this module by itself
when the folder is on PYTHONPATH.

torchvision registers shape functions for `torchvision::nms` and `qnms` when it is imported, and fails if its own C++
extension, built for the torch it came with, could not define them. Its transforms need neither operator.
"""

import importlib.abc
import importlib.machinery
import sys

SCHEMA = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'


class _DefineOperatorsBeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing: acts once, when torchvision is about to be imported, and leaves finding it to the others."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == 'torchvision':
            sys.meta_path.remove(self)
            import torch  # noqa: PLC0415 - at the top it would be loaded by every Python process

            library = torch.library.Library('torchvision', 'DEF')
            for name in ('nms', 'qnms'):
                library.define(name + SCHEMA)
            torch._ascend_standin_torchvision_library = library  # the definitions live as long as this object


sys.meta_path.insert(0, _DefineOperatorsBeforeTorchvision())

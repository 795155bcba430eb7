"""Registration without an import: the plugin is imported right after ``timm.models``, by whomever and whenever.

PyTorch calls :func:`register` at the end of ``import torch`` (entry point group ``torch.backends``). It must be light,
silent and unable to fail: it only puts a finder in front of Python's own, which waits for ``timm.models``.
"""

import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence

__all__ = ['register']

_AWAITED = 'timm.models'


def register() -> None:
    """Register with timm now if it is imported, else as soon as it is."""
    if _AWAITED in sys.modules and not getattr(sys.modules[_AWAITED].__spec__, '_initializing', False):
        _import_plugin()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _import_plugin() -> None:
    try:
        from . import device as devices  # noqa: PLC0415 - heavy, and needs timm

        devices.load_backends()
        # They register what they define at their end; one of them may be half imported now, if it is what imports timm.
        importlib.import_module('.model', __package__)
        importlib.import_module('.optim', __package__)
    except Exception as error:  # timm must stay usable, whatever is wrong with us
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        warnings.warn(f'timm_npu_irv2 could not register its models with timm ({reason})', stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds ``timm.models`` where Python would, and has its loader import the plugin when it is done."""

    def find_spec(
            self,
            fullname: str,
            path: Sequence[str] | None,
            target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """None for every module but the awaited one, which is found once."""
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """A loader that imports the plugin after its module; in all else it is the module's own."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        """As the module's own loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        """As the module's own loader, which is put back; then the plugin."""
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _import_plugin()

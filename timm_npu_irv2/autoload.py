"""Registration without an import: the plugin is imported right after ``timm.models``, whoever imports that.

PyTorch calls :func:`register` at the end of ``import torch`` (entry point group ``torch.backends``). It must be fast
and silent and must not fail, so it only puts a finder in front of Python's own, which waits for ``timm.models``.
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
        layers = sys.modules.get(f'{__package__}.layers')
        if getattr(getattr(layers, '__spec__', None), '_initializing', False):
            # Its import is what imports timm. The network needs all of it: a second copy, which takes its place.
            del sys.modules[f'{__package__}.layers']
        # They register what they define at their end; one of them may be half imported now, if it is what imports timm.
        importlib.import_module('.model', __package__)
        importlib.import_module('.optim', __package__)
    except Exception as error:  # timm must stay usable, whatever is wrong here
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        warnings.warn(f'timm_npu_irv2 could not register its models with timm ({reason})', stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    """A finder of ``timm.models`` whose loader imports the plugin afterwards."""

    def find_spec(
            self,
            fullname: str,
            path: Sequence[str] | None,
            target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for the awaited module, once, and None for every other module."""
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The loader of a module that imports the plugin afterwards."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        """Create the module with its own loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        """Put the module's own loader back, execute the module, then import the plugin."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _import_plugin()

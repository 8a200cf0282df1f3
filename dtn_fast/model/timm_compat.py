"""Import of timm that also works with a CPU-only torch, and that registers this package's models."""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from dtn_fast.packages import require


@functools.cache
def import_timm() -> Any:
    """Imports the timm package.  Raises UsageError when it is not installed."""
    _prepare_torchvision()
    return require("timm")


def register_models() -> None:
    """Registers this package's models in timm's registry: now if timm is imported, or else once it is, because its
    import takes seconds."""
    if sys.modules.get("timm"):
        importlib.import_module(REGISTRY)
    else:
        sys.meta_path.insert(0, _TimmFinder())


REGISTRY = "dtn_fast.model.timm_registry"


class _TimmFinder(importlib.abc.MetaPathFinder):
    """Finds timm as Python does, and has :data:`REGISTRY` imported after it.  Others only look whether timm is there
    (``importlib.util.find_spec``), so it stays until timm is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        place = sys.meta_path.index(self)
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(place, self)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                _prepare_torchvision()
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                importlib.import_module(REGISTRY)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _prepare_torchvision() -> None:
    """Makes torchvision importable.

    timm needs it, and PyPI's is built for CUDA: with a CPU-only torch its import fails, because it describes two
    operators that then do not exist.  Declaring them first is enough; nothing here calls them.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass  # reported by the import of timm
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        _declare_torchvision_operators()


_torchvision_library: torch.library.Library | None = None
"""Library object that keeps the declarations alive."""


def _declare_torchvision_operators() -> None:
    global _torchvision_library
    _torchvision_library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _torchvision_library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

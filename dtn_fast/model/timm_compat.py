"""Import of timm that also works with a CPU-only torch."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from dtn_fast.packages import require


@functools.cache
def import_timm() -> Any:
    """Imports the timm package.  Raises UsageError when it is not installed.

    timm needs torchvision, and PyPI's torchvision is built for CUDA: with a CPU-only torch its import fails, because it
    describes two operators that then do not exist.  Declaring them first is enough; nothing here calls them.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass  # reported by the import of timm
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        _declare_torchvision_operators()
    return require("timm")


_torchvision_library: torch.library.Library | None = None
"""Library object that keeps the declarations alive."""


def _declare_torchvision_operators() -> None:
    global _torchvision_library
    _torchvision_library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _torchvision_library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

"""Import of optional packages where they are used, with one error text for a missing package."""

from __future__ import annotations

import importlib
from typing import Any

from dtn_fast.errors import UsageError

EXTRAS = {
    "cli": ("jinja2", "markdown", "matplotlib", "rich", "sklearn", "tensorboard", "tyro"),
    "data": ("albumentations", "av", "dlib", "huggingface_hub", "lmdb"),
    "demo": ("skimage",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "gpu": ("triton",),
    "heic": ("pillow_heif",),
    "mnn": ("MNN",),
    "openvino": ("openvino",),
    "serve": ("prometheus_client", "python_multipart", "starlette", "uvicorn"),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx",),
    "timm": ("timm",),
    "triton-client": ("tritonclient",),
}
"""Modules by the extra of pyproject.toml that installs them."""
_EXTRA_OF = {module: extra for extra, modules in EXTRAS.items() for module in modules}


def installed_by(module: str) -> str:
    """Argument of ``pip install`` that installs a module of EXTRAS, quoted for a shell: ``'dtn-fast[data]'``."""
    return f"'dtn-fast[{_EXTRA_OF[module]}]'"


def require(module: str, install: str = "") -> Any:
    """Imports ``module``.  Raises UsageError naming the missing package and the ``pip install`` command for it.

    install: the argument of ``pip install`` for a module that is not in EXTRAS.
    """
    try:
        importlib.import_module(module.partition(".")[0])  # a submodule may be loaded although its package is blocked
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        absent = getattr(error, "name", None) in (None, package, module)
        reason = "is not installed" if absent else f"cannot be imported ({error})"
        raise UsageError(f"{package} {reason}; run: pip install {install or installed_by(package)}") from error

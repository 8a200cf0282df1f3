"""Optional packages, imported where they are used, with one error text for all that are missing."""

from __future__ import annotations

import importlib
from typing import Any

from dtn_fast.errors import UsageError


def require(module: str, install: str) -> Any:
    """The imported ``module``.  Raises UsageError naming what is missing and the ``pip install`` words that add it.

    install: a package such as ``lmdb`` or an extra of this one such as ``dtn-fast[serve]``.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        absent = getattr(error, "name", None) in (None, package, module)
        reason = "is not installed" if absent else f"cannot be imported ({error})"
        quoted = f"'{install}'" if any(sign in install for sign in "[<>=") else install
        raise UsageError(f"{package} {reason}; run: pip install {quoted}") from error

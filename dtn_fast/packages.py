"""Import of optional packages where they are used, with one error text for a missing package."""

from __future__ import annotations

import importlib
from typing import Any

from dtn_fast.errors import UsageError


def require(module: str, install: str) -> Any:
    """Imports ``module``.  Raises UsageError naming the missing package and the ``pip install`` command for it.

    install: the argument of ``pip install``, a package such as ``lmdb`` or an extra such as ``dtn-fast[serve]``.
    """
    try:
        importlib.import_module(module.partition(".")[0])  # a submodule may be loaded although its package is blocked
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        absent = getattr(error, "name", None) in (None, package, module)
        reason = "is not installed" if absent else f"cannot be imported ({error})"
        quoted = f"'{install}'" if any(sign in install for sign in "[<>=") else install
        raise UsageError(f"{package} {reason}; run: pip install {quoted}") from error

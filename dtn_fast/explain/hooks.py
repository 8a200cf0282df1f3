"""Hooks on a model."""

from __future__ import annotations

import threading

_HOOKED = threading.Lock()
"""Hooks belong to a model: two threads must not meet on one."""

"""Temporary forward hooks on a model in eval mode; the model is restored afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Hook = tuple[nn.Module, Callable[..., Any]]
_ONE = threading.Lock()
"""Lock that keeps two threads from setting hooks on one model at the same time."""


@contextmanager
def hooked(model: nn.Module, after: Iterable[Hook] = (), before: Iterable[Hook] = ()) -> Iterator[nn.Module]:
    """Yields ``model`` in eval mode with forward hooks ``after`` and ``before`` its modules; removes them at the end.

    A hook in ``after`` is called with (module, inputs, output), one in ``before`` with (module, inputs).  One thread at
    a time.
    """
    with _ONE:
        was_training = model.training
        handles = [module.register_forward_hook(hook) for module, hook in after]
        handles += [module.register_forward_pre_hook(hook) for module, hook in before]
        try:
            yield model.eval()
        finally:
            for handle in handles:
                handle.remove()
            model.train(was_training)

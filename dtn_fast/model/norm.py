"""BN's running statistics where a kernel computes the batch's, and where the forward pass is computed twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def trains(norm: nn.Module) -> bool:
    """Whether ``norm`` is a BN in training as it is built: by the batch's statistics, of which it keeps running ones.

    A BN that was frozen by ``norm.eval()``, that keeps no running statistics, or whose momentum was set to None (their
    plain mean) or 1 (the last batch's) is not.
    """
    if not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) or not norm.training or norm.running_mean is None:
        return False
    return norm.momentum is not None and norm.momentum < 1


def update_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Updates a BN's running statistics from a batch of ``count`` values per channel, as torch does in training."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (count / max(count - 1, 1)), norm.momentum)


def recomputed(function: Callable[[Tensor], Tensor], parts: Iterable[nn.Module], x: Tensor) -> Tensor:
    """function(x), of which the backward computes the insides again in place of keeping them (gradient checkpointing,
    Chen et al., 2016).  The BNs in ``parts`` update their running statistics the first time alone."""
    norms = [module for part in parts for module in part.modules() if isinstance(module, _NormBase)]
    again = lambda: (contextlib.nullcontext(), _statistics_kept(norms))
    return checkpoint(function, x, use_reentrant=False, context_fn=again)


@contextlib.contextmanager
def _statistics_kept(norms: list[_NormBase]) -> Iterator[None]:
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
            norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked

"""Update of BN running statistics where a kernel computes the batch statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

"""Update of BN running statistics where a kernel computes the batch statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

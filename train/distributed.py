"""Training by several processes: ranks, collective operations and synchronised BN (torchrun, NCCL or gloo)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from dtn_fast.errors import DtnError, UsageError
from dtn_fast.model.timm_compat import import_timm


class Ranks(NamedTuple):
    """Rank of this process and number of processes."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def ranks() -> Ranks:
    """Rank of this process and number of processes; 0 and 1 outside :func:`connect`."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()


@contextmanager
def connect(device: str) -> Iterator[str]:
    """Connects the processes that torchrun started and yields this process's device; without torchrun, ``device``.

    Ends the process afterwards when several were connected: threads of the communication library that outlive the
    interpreter would abort it, and torchrun would report a finished run as failed.  Raises UsageError when there are
    more processes than GPUs, DtnError when another process is lost.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield device
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UsageError(f"process {local} has no GPU of its own; start {torch.cuda.device_count()} per machine")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    kind = "nccl" if device.startswith("cuda") else "gloo"
    # torchrun keeps its store after a restart: without a prefix, processes would find the addresses of ended ones
    store, rank, world = next(rendezvous("env://"))
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # long, because validation and saving can take minutes
    dist.init_process_group(kind, store=store, rank=rank, world_size=world, timeout=timedelta(minutes=30))
    try:
        yield device  # after an exception, do not wait for the other processes
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise DtnError(f"process {rank} lost another process; see that process's message ({error})") from error
        raise
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def mean(tensor: Tensor) -> Tensor:
    """Averages ``tensor`` over all processes, in place."""
    if (world := ranks().world) > 1:
        dist.all_reduce(tensor)
        tensor /= world
    return tensor


def largest(tensor: Tensor) -> Tensor:
    """Replaces ``tensor`` by its maximum over all processes, in place."""
    if ranks().world > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gather(mine: NDArray) -> list[NDArray]:
    """The arrays of all processes in the order of ranks, unchanged."""
    here = ranks()
    if here.world == 1:
        return [mine]
    parts: list[NDArray] = [np.empty(0)] * here.world
    dist.all_gather_object(parts, mine)
    return parts


def interleave(parts: list[NDArray]) -> NDArray:
    """Joins the parts ``whole[rank::world]`` of all ranks."""
    whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def synchronise_bn(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` with BN statistics over all processes' images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if device.type == "cuda":
        if any(hasattr(module, "act") for module in norms):  # timm's BatchNormAct2d, whose act torch would drop
            return import_timm().layers.convert_sync_batchnorm(model)
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in norms:
        module.__class__ = CpuSyncBatchNorm2d  # the same parameters and buffers
    return model


class _Sum(torch.autograd.Function):
    """Sum over all processes; the gradient is summed too, because every process's loss depends on the sum."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return _Sum.forward(ctx, grad)


class CpuSyncBatchNorm2d(nn.BatchNorm2d):
    """Synchronised BN for processes on CPUs, which torch's SyncBatchNorm does not support."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        x = self._synchronised(x) if self.training else super().forward(x)
        for name in ("drop", "act"):  # of timm's BatchNormAct2d
            x = getattr(self, name, nn.Identity())(x)
        return x

    def _synchronised(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        wide = x.float()
        count = ranks().world * x.numel() / x.shape[1]
        mean = _Sum.apply(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

"""The training recipe: one frozen dataclass whose defaults are the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dtn_fast.data.augment import PresetName
from dtn_fast.errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """How to train.  Defaults are the paper's; *choice* marks what it leaves open."""

    epochs: int = 30
    """Epochs of the initial training and of each generation (*choice*)."""
    batch_size: int = 32
    lr: float = 1e-4
    """Adam's learning rate."""
    weight_decay: float = 1e-4
    lr_step: int = 15
    """Epochs between drops of the learning rate by ten."""
    weights: tuple[float, float, float] = (4.0, 0.4, 0.6)
    """DSD weights of CE, KD and Ct-c (Eq. 7; that they come in this order is a *choice*)."""
    temperature: float = 2.0
    """Of the softened probabilities in the KD loss (*choice*)."""
    delta: float = 1.0
    """Added to the denominator of Ct-c (Eq. 3)."""
    real_repeat: int = 0
    """How often an epoch shows each real, differently augmented; the paper 4, 0: as often as balances the classes."""
    methods: tuple[str, ...] = ()
    """Forgeries to train and select on; none: every one in the data."""
    generations: int = 5
    """At most this many students; the chain stops when validation AUC no longer improves."""
    min_generations: int = 0
    """Students to train even when AUC does not improve."""
    patience: int = 0
    """Stop a generation after this many epochs without a better validation AUC; 0: never."""
    augment: PresetName = "forensic"
    """none; light: for small, clean sets; forensic: geometry, light, blur, noise and JPEG."""
    augment_on: Literal["auto", "device", "cpu"] = "auto"
    """device: one batched pipeline where the model is; cpu: albumentations, as the paper; auto: device on a GPU."""
    self_blend: bool = False
    """Leave the data's fakes out and train on self-blended copies of its reals instead (*choice*)."""
    resident: bool = False
    """Keep the training crops in the device's memory."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware computes in it, fp16 with a loss scaler on older GPUs, fp32 on other CPUs."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr_step", "temperature", "delta", "lr"):
            if getattr(self, name) <= 0:
                raise UsageError(f"Recipe.{name} is {getattr(self, name)}; it must be positive")
        for name in ("weight_decay", "real_repeat", "generations", "min_generations", "patience"):
            if getattr(self, name) < 0:
                raise UsageError(f"Recipe.{name} is {getattr(self, name)}; it must not be negative")


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast on ``device``; float32 means none.

    A CPU without bf16 instructions gets float32 from ``auto``: autocast to bf16 is about ten times slower there.
    """
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    known: dict[str, object] = dict(getattr(torch.cpu, "get_capabilities", dict)())
    return torch.bfloat16 if known.get("avx512_bf16") or known.get("amx_bf16") else torch.float32

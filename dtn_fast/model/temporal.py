"""The temporal head: features of the frames of a clip, in temporal order -> logits of the clip, by MAS over the frames.

Frames are scored one by one as without it.  The head adds to the mean of their logits a term that begins at zero, so
that an untrained head is mean pooling.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dtn_fast.errors import UsageError
from dtn_fast.model.config import DTNConfig
from dtn_fast.model.levt import ScaledAttention

WIDTH, HEADS, DEPTH = 128, 4, 2
"""Width, attention heads and blocks of every temporal head (*choice*: heads of 32 channels are the kernels'
narrowest)."""


class TemporalBlock(nn.Module):
    """X + LC(Attention(LN(X))), then X + MLP(LN(X)): [B, T, WIDTH] -> the same.

    As an LEVT block: heads are scaled (Eq. 20), and the local connection (Eq. 23), here over three frames in a row,
    shows what changes from one to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = ScaledAttention(WIDTH, HEADS, True, DTNConfig.mas_init)
        self.local = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.local(self.attention(self.norm1(x)).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(self.norm2(x))


class TemporalHead(nn.Module):
    """Features [B, T, C] and logits [B, T, classes] of T frames in temporal order -> logits [B, classes] of the clip.

    frames: T.  features: C, standardised by the constants that :meth:`standardise` sets.
    """

    mean: Tensor
    scale: Tensor
    step: Tensor
    """Median number of the video's frames from a clip's frame to the next in training, float32; 0: unknown."""

    def __init__(self, frames: int, features: int, classes: int) -> None:
        super().__init__()
        self.frames, self.features, self.classes = frames, features, classes
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("step", torch.zeros(()))
        self.project = nn.Linear(features, WIDTH)
        self.positions = nn.Parameter(torch.empty(1, frames, WIDTH))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.blocks = nn.Sequential(*(TemporalBlock() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, classes)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Takes mean and standard deviation of each feature from those of the training frames, [n, C]."""
        self.mean.copy_(features.mean(0))
        self.scale.copy_(1 / features.std(0).clamp_min(1e-6))

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        if features.shape[1:] != (self.frames, self.features):
            raise ValueError(
                f"features: got {list(features.shape)}; the head takes [B, {self.frames}, {self.features}]"
            )
        x = self.project((features - self.mean) * self.scale) + self.positions
        return logits.mean(1) + self.out(self.norm(self.blocks(x)).mean(1))


class WithFeatures(nn.Module):
    """A detector whose output has its features as further columns: images [B, 3, S, S] -> [B, columns + C] float32.

    layers: its classifiers, whose inputs are the features.  Raises UsageError when they are no vectors.
    """

    def __init__(self, net: nn.Module, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.detector = net
        self._inputs: list[Tensor] = []
        for layer in layers:
            layer.register_forward_pre_hook(lambda _module, inputs: self._inputs.append(inputs[0]))

    def forward(self, images: Tensor) -> Tensor:
        self._inputs.clear()
        columns = self.detector(images)
        found = list(self._inputs)
        self._inputs.clear()
        if not found or any(features.dim() != 2 for features in found):
            shapes = [list(features.shape) for features in found]
            raise UsageError(f"the temporal head needs one feature vector per picture; the classifier gets {shapes}")
        return torch.cat([columns.float(), *(features.float() for features in found)], 1)

"""Novelty: how unlike the training data an input is, a distance in the model's feature space.

The features are the means of each channel over the four quarters of a map some way into the network, where inputs that
differ in texture, light or layout still differ; the last maps hold only what tells fakes from reals, and take noise or
a photograph for either.  The distance is Mahalanobis' (Lee et al., 2018), with the covariance of the training crops.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtn_fast.errors import UsageError
from dtn_fast.files import write_whole

FILE = "novelty.safetensors"
"""File of a checkpoint folder."""


REMEDY = "delete card.json beside it, then run dtn-fast calibrate"


class Novelty(NamedTuple):
    """Mean and whitening of the features of the training crops."""

    mean: Tensor
    """[F] float32."""
    whiten: Tensor
    """[F, F] float32; (x - mean) @ whiten has the identity as its covariance."""

    @classmethod
    def fit(cls, features: NDArray[np.float64]) -> Novelty:
        """From features [n, F] of training crops, their covariance shrunk (Ledoit and Wolf, 2004)."""
        from sklearn.covariance import ledoit_wolf

        mean = features.mean(0)
        covariance, _ = ledoit_wolf(features - mean, assume_centered=True)
        values, vectors = np.linalg.eigh(covariance)
        whiten = vectors / np.sqrt(np.maximum(values, values[-1] * 1e-9 + 1e-12))
        return cls(torch.from_numpy(mean).float(), torch.from_numpy(whiten).float())

    def save(self, folder: Path) -> None:
        from safetensors.torch import save

        write_whole(folder / FILE, save({name: t.cpu().contiguous() for name, t in self._asdict().items()}))

    @classmethod
    def load(cls, folder: Path) -> Novelty:
        """Reads the file of a checkpoint folder.  Raises UsageError when it is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = folder / FILE
        try:
            stored = load_file(path)
            made = cls(stored["mean"], stored["whiten"])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise UsageError(f"{path}: missing or damaged ({error}); {REMEDY}") from error
        count = made.mean.numel()
        good = made.mean.shape == (count,) and made.whiten.shape == (count, count)
        if not good or any(t.dtype != torch.float32 or not t.isfinite().all() for t in made):
            raise UsageError(f"{path}: tensors of another shape or dtype, or not finite; {REMEDY}")
        return made


class WithNovelty(nn.Module):
    """A detector whose output has a further column, the novelty: images [B, 3, S, S] -> [B, classes + 1] float32.

    Novelty is the root mean square of the whitened features: about 1 for inputs like the training data.
    """

    mean: Tensor
    whiten: Tensor

    def __init__(self, net: nn.Module, layer: nn.Module, novelty: Novelty) -> None:
        super().__init__()
        self.detector = net
        device = next(net.parameters()).device
        self.register_buffer("mean", novelty.mean.to(device))
        self.register_buffer("whiten", novelty.whiten.to(device))
        self._map: list[Tensor] = []
        layer.register_forward_hook(lambda _module, _inputs, output: self._map.append(output))

    def forward(self, images: Tensor) -> Tensor:
        self._map.clear()
        logits = self.detector(images)
        features = pooled(self._map.pop())
        if features.shape[1] != self.mean.shape[0]:
            raise UsageError(f"the novelty statistics are of {self.mean.shape[0]} features, the model has "
                             f"{features.shape[1]}; {REMEDY}")  # fmt: skip
        distance = ((features - self.mean) @ self.whiten).square().mean(1, keepdim=True).sqrt()
        return torch.cat((logits.float(), distance), 1)


def pooled(features: Tensor) -> Tensor:
    """Channel means float32 over the quarters of a map [B, C, h, w]: [B, 4 C]; or over tokens [B, N, C]: [B, C].

    Quarters of an odd side overlap by a row or column.
    """
    x = features.float()
    if x.dim() == 3:
        return x.mean(1)
    h, w = (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2
    quarters = (x[:, :, :h, :w], x[:, :, :h, -w:], x[:, :, -h:, :w], x[:, :, -h:, -w:])
    return torch.cat([quarter.mean((2, 3)) for quarter in quarters], 1)

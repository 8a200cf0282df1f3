"""Internals of a detector as arrays: attention maps, head scales, attention collapse, features, soft labels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtn_fast.model.detector import Detector, device_of
from dtn_fast.model.hooks import hooked
from dtn_fast.model.levt import ScaledAttention
from dtn_fast.model.mas import HeadScale
from dtn_fast.model.preprocess import normalise

BATCH = 64
"""Number of crops that are run at once."""


# ------------------------------------------------------------------------------------------------ attention


def attentions(model: nn.Module) -> list[nn.Module]:
    """The modules of a model whose ``maps`` method returns attention maps, in a DTN or a baseline."""
    return [module for module in model.modules() if callable(getattr(module, "maps", None))]


def attention_maps(model: Detector, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The gated attention maps sigmoid(s_h) softmax(Q K^T / sqrt(D)) of every block and head: [L, B, H, N, N].

    crops: [B, S, S, 3] uint8.  The reference operator computes them during an ordinary pass, as the fast path has no
    maps.  Re-attention, which has no s_h, gives its mixed maps.  Without any attention [0, B, 0, 0, 0].
    """
    kept: list[Tensor] = []
    look = lambda module, given, _output: kept.append(module.maps(given[0]))
    with hooked(model, [(block, look) for block in attentions(model)]), torch.inference_mode():
        model(normalise(crops, model.config, device_of(model)))
    if not kept:
        return np.zeros((0, len(crops), 0, 0, 0), np.float32)
    return torch.stack(kept).float().cpu().numpy()


def head_scales(model: nn.Module) -> NDArray[np.float32]:
    """sigmoid(s_h) of every block and head, [L, H], of any model with MAS (also by ``with_mas``); ones without MAS.

    Raises ValueError when its blocks have different numbers of heads.
    """
    kinds = (ScaledAttention, HeadScale)
    scales = [m.head_scale.detach().sigmoid().float().cpu() for m in model.modules() if isinstance(m, kinds)]
    if len({len(row) for row in scales}) > 1:
        raise ValueError(f"{type(model).__name__}: blocks of different numbers of heads")
    return torch.stack(scales).numpy() if scales else np.zeros((0, 0), np.float32)


def collapse(maps: NDArray[np.float32]) -> NDArray[np.float64]:
    """Similarity of a block's heads: mean cosine over pairs of heads and images, [L]; 1: all the same.

    maps: [L, B, H, N, N].  The paper's "attention collapse" as a number ("attention maps across heads tend to resemble
    each other with the number of blocks increasing", Figure 1c); a head's scale changes nothing in it.
    """
    blocks, batch, heads = maps.shape[:3]
    if heads < 2:
        return np.full(blocks, np.nan)
    flat = maps.reshape(blocks, batch, heads, -1).astype(np.float64)
    flat /= np.linalg.norm(flat, axis=3, keepdims=True).clip(1e-30)
    cosines = flat @ flat.swapaxes(2, 3)  # [L, B, H, H]
    pairs = np.triu_indices(heads, 1)
    return cosines[:, :, pairs[0], pairs[1]].mean((1, 2))


def regions(maps: NDArray[np.float32]) -> NDArray[np.float64]:
    """Share of the tokens that a block's heads look at, mean over heads and images, [L]: 1 all alike, 1 / N a single
    one.

    maps: [L, B, H, N, N].  exp(entropy) / N of a head's attention to each token, over all its queries: the other half
    of collapse ("the attention map of each head in a deeper block focused on fewer regions", Figure 1c).  A head's
    scale changes nothing in it; of Re-attention's mixed weights, which may be negative, the magnitudes count.
    """
    looks = np.abs(maps.astype(np.float64)).mean(3)  # [L, B, H, N]
    looks /= looks.sum(3, keepdims=True).clip(1e-30)
    entropy = -(looks * np.log(looks.clip(1e-30))).sum(3)
    return np.exp(entropy).mean((1, 2)) / maps.shape[4]


# ------------------------------------------------------------------------------------------------ features


def features(model: Detector, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Input of the classifier, [B, C]: the inputs of the model's ``classifiers``, concatenated.

    Raises ValueError when the model has no classifier layer.
    """
    layers = model.classifiers()
    if not layers:
        raise ValueError(f"{type(model).__name__}: no linear layer whose input is the features")
    kept: list[list[Tensor]] = [[] for _ in layers]
    keep = lambda into: lambda _module, given: into.append(given[0].float().flatten(1).cpu())
    before = [(layer, keep(into)) for layer, into in zip(layers, kept, strict=True)]
    with hooked(model, before=before), torch.inference_mode():
        for start in range(0, len(crops), BATCH):
            model(normalise(crops[start : start + BATCH], model.config, device_of(model)))
    return torch.cat([torch.cat(parts) for parts in kept], 1).numpy()


def soft_labels(model: Detector, crops: NDArray[np.uint8], temperature: float) -> NDArray[np.float32]:
    """A teacher's soft label of each crop: softmax(logits / temperature), [B, 2]: real, fake."""
    with hooked(model), torch.inference_mode():
        logits = model(normalise(crops, model.config, device_of(model)))
    return (logits.float() / temperature).softmax(1).cpu().numpy()

"""Adaptation of pretrained transformers by few trained parameters, merged into plain weights for inference.

LoRA (Hu et al., 2022) adds a trained product of low rank to frozen weights.  Effort (Yan et al., 2025) freezes the
principal part of a weight's singular value decomposition and trains the rest of it.  Both are one layer here, because
some of timm's attention modules read ``layer.weight`` in place of calling the layer (EVA, BEiT): adapters that wrap the
layer, such as peft's, change nothing there, and say nothing.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtn_fast.errors import tell
from dtn_fast.model.config import Adaptation
from dtn_fast.model.detector import Detector
from dtn_fast.model.mas import HeadScale


class AdaptedLinear(nn.Module):
    """A frozen linear layer plus a trained product of rank r: x (base + left diag(scale) right)^T + bias.

    Each square block of the weight has its own factors, so that the queries', keys' and values' projections, which timm
    stores as one, are adapted each by itself.  left: [k, O / k, r], scale: [k, r], right: [k, r, I].
    """

    scale: Tensor

    def __init__(self, source: nn.Linear, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = source.in_features, source.out_features, rank
        blocks = max(self.out_features // self.in_features, 1)
        new = lambda *shape: nn.Parameter(source.weight.new_zeros(blocks, *shape))
        self.base = nn.Parameter(source.weight.detach(), requires_grad=False)
        self.bias = None if source.bias is None else nn.Parameter(source.bias.detach(), requires_grad=False)
        self.left, self.right = new(self.out_features // blocks, rank), new(rank, self.in_features)
        self.register_buffer("scale", source.weight.new_ones(blocks, rank), persistent=False)

    def initialise(self) -> None:
        """Draws ``right`` as torch draws a layer's weight; ``left`` is 0, so that the layer computes what it did."""
        nn.init.uniform_(self.right, -(self.in_features**-0.5), self.in_features**-0.5)

    @property
    def residual(self) -> Tensor:
        """The trained part of the weight [O, I]."""
        return ((self.left * self.scale[:, None]) @ self.right).flatten(0, 1)

    @property
    def weight(self) -> Tensor:
        """The weight [O, I]."""
        return self.base + self.residual

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        low = F.linear(x, self.right.flatten(0, 1)).unflatten(-1, self.scale.shape)  # [..., k, r]
        added = torch.einsum("...kr,kor->...ko", low * self.scale.to(low.dtype), self.left.to(low.dtype))
        return F.linear(x, self.base, self.bias) + added.flatten(-2)

    def merged(self) -> nn.Linear:
        """The same as a plain layer, its weight rounded once."""
        made = nn.Linear(self.in_features, self.out_features, self.bias is not None).to(self.base)
        product = (self.left.double() * self.scale.double()[:, None]) @ self.right.double()
        with torch.no_grad():
            made.weight.copy_(self.base.double() + product.flatten(0, 1))
            if self.bias is not None:
                made.bias.copy_(self.bias)
        return made


class EffortLinear(AdaptedLinear):
    """The r smallest singular values of each block and their directions are trained, the rest is frozen.

    Raises ValueError when the weight is not made of square blocks.
    """

    start_left: Tensor
    start_right: Tensor
    start_norm: Tensor

    def __init__(self, source: nn.Linear, rank: int) -> None:
        super().__init__(source, rank)
        if self.out_features % self.in_features:
            raise ValueError(f"a weight [{self.out_features}, {self.in_features}] is not made of squares")
        del self.scale
        self.scale = nn.Parameter(source.weight.new_zeros(len(self.left), rank))
        self.register_buffer("start_left", torch.zeros_like(self.left))
        self.register_buffer("start_right", torch.zeros_like(self.right))
        self.register_buffer("start_norm", source.weight.new_zeros(len(self.left)))

    @torch.no_grad()
    def initialise(self) -> None:
        """Splits the weight; what the rounded factors leave stays in ``base``, so that the sum is the weight again."""
        whole = self.base.unflatten(0, (len(self.scale), -1))  # [k, I, I]
        left, values, right = torch.linalg.svd(whole.float())
        for own, found in ((self.left, left[..., -self.rank :]), (self.scale, values[:, -self.rank :]),
                           (self.right, right[:, -self.rank :])):  # fmt: skip
            own.copy_(found)
        self.start_left.copy_(self.left)
        self.start_right.copy_(self.right)
        self.start_norm.copy_(whole.square().sum((1, 2)))
        product = (self.left.double() * self.scale.double()[:, None]) @ self.right.double()
        self.base.copy_(self.base.double() - product.flatten(0, 1))

    def penalty(self) -> Tensor:
        """The mean over blocks of how far the directions are from orthonormal, to one another and to the frozen ones,
        plus how far the weight's squared norm is from the original one (Effort's two losses, both squared norms of the
        deviation but for the last, an absolute value; float32, a scalar).

        The frozen directions are the complement of the original ones in a square block, so none of them is stored.
        """
        left, right, scale = self.left.float().mT, self.right.float(), self.scale.float()  # [k, r, I]
        apart = sum(
            _deviation(now, start) for now, start in ((left, self.start_left.mT), (right, self.start_right))
        )  # [k]
        base = self.base.float().unflatten(0, (len(scale), -1))
        across = ((right @ base.mT) * left * scale[..., None]).sum((1, 2))  # <base, residual>
        grams = (left @ left.mT) * (right @ right.mT) * scale[:, :, None] * scale[:, None]
        norm = base.square().sum((1, 2)) + 2 * across + grams.sum((1, 2))
        return (apart + (norm - self.start_norm).abs()).mean()


def _deviation(now: Tensor, start: Tensor) -> Tensor:
    """Squared Frobenius norm of A A^T - 1, A the frozen directions with the rows of ``now`` [k, r, I]: [k]."""
    outside = now - (now @ start.float().mT) @ start.float()
    own = now @ now.mT - torch.eye(now.shape[1], device=now.device)
    return 2 * outside.square().sum((1, 2)) + own.square().sum((1, 2))


LARGE = 50_000_000
"""Number of weights to split from which on a person is told of it."""
KINDS: dict[str, type[AdaptedLinear]] = {"lora": AdaptedLinear, "effort": EffortLinear}


def adapt(net: nn.Module, how: Adaptation, trained: list[nn.Module]) -> None:
    """Freezes a timm transformer in place but for ``trained`` and head scales, and adapts the linear layers of its
    attention.

    Call :func:`initialise` before it is trained.  Raises ValueError when it has no attention, or not one that ``how``
    fits.
    """
    net.requires_grad_(False)
    found = 0
    for module in [m for m in net.modules() if isinstance(getattr(m, "num_heads", None), int)]:
        for name, layer in list(module.named_children()):
            scale, inner = _parts(layer)
            if not isinstance(inner, nn.Linear) or inner in trained:
                continue
            made = KINDS[how.adapt](inner, how.rank_of(inner.in_features))
            setattr(module, name, made if scale is None else nn.Sequential(scale, made))
            found += 1
    if not found:
        raise ValueError("it has no attention whose projections are linear layers")
    for layer in trained:
        layer.requires_grad_(True)
    for module in net.modules():
        if isinstance(module, HeadScale):
            module.requires_grad_(True)


def initialise(model: nn.Module) -> None:
    """Gives adapted layers their initial factors, by which the model computes what it did before it was adapted."""
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    if sum(layer.base.numel() for layer in layers if isinstance(layer, EffortLinear)) > LARGE:
        tell(f"Effort: computing the singular values of {len(layers)} layers, for a ViT-L minutes on a CPU")
    for layer in layers:
        layer.initialise()


def effort_penalty(model: nn.Module) -> Tensor | None:
    """The mean of Effort's losses over its layers, a scalar; None: the model has none of them."""
    found = [module.penalty() for module in model.modules() if isinstance(module, EffortLinear)]
    return torch.stack(found).mean() if found else None


def merged(model: Detector) -> Detector:
    """A copy whose adapted layers are plain ones, and whose head scales are in the weights behind them."""
    made = copy.deepcopy(model)
    for module in list(made.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, AdaptedLinear):
                setattr(module, name, child.merged())
    for module in list(made.modules()):
        for name, child in list(module.named_children()):
            scale, layer = _parts(child)
            if scale is not None and isinstance(layer, nn.Linear):
                gates = scale.head_scale.detach().double().sigmoid()
                gates = gates.repeat_interleave(layer.in_features // len(gates))
                layer.weight.data.copy_(layer.weight.double() * gates)
                setattr(module, name, layer)
    return made


def _parts(layer: nn.Module) -> tuple[HeadScale | None, nn.Module]:
    """The head scales before a layer, None without them, and the layer itself."""
    if isinstance(layer, nn.Sequential) and len(layer) == 2 and isinstance(scale := layer[0], HeadScale):
        return scale, layer[1]
    return None, layer

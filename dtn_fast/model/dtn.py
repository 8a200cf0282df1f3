"""The detector: backbone, MoE gate, LEVT blocks, head (paper Eq. 8)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtn_fast.errors import UsageError
from dtn_fast.model.backbone import Backbone, TimmBackbone, build_backbone
from dtn_fast.model.config import STRIDE, DTNConfig
from dtn_fast.model.detector import Depth, Detector
from dtn_fast.model.levt import LEVTBlock
from dtn_fast.model.mask_head import MaskHead
from dtn_fast.model.moe_gate import MoEGate


class DTN(Detector):
    """Distilled transformer network: images [B, 3, H, W] (normalised RGB, H and W multiples of 32) -> logits [B, 2].

    Logit 0 is real, 1 is fake.  Raises ValueError for another shape or a non-floating dtype.
    """

    config_class = DTNConfig
    fits_meta = True
    global_pool = "avg"
    in_chans = 3

    def __init__(self, config: DTNConfig | None = None) -> None:
        config = config or DTNConfig()
        super().__init__(config)
        self.num_classes, self.num_features = config.num_classes, config.channels[-1]
        side = config.image_size // STRIDE
        self.backbone: nn.Sequential = build_backbone(config)
        self.gate: nn.Module = MoEGate(config) if config.num_experts else nn.Identity()
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_features, side, side))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        last = max(config.depth - 1, 1)
        self.blocks = nn.Sequential(*(
            LEVTBlock(config, config.drop_path_rate * place / last) for place in range(config.depth)
        ))  # fmt: skip
        self.head: nn.Module = nn.Linear(self.num_features, config.num_classes)
        self.mask_head = None
        if config.mask_head:
            fine = self.mask_layers()[0]
            if isinstance(self.backbone, Backbone):
                self.backbone.read = list(self.backbone).index(fine)
            width = config.channels[2] if isinstance(fine, nn.MaxPool2d) else self.num_features
            self.mask_head = MaskHead((width, self.num_features))
        self.add_temporal()

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> the last block's map [B, C, H / 32, W / 32]."""
        x = self.gate(self.backbone(checked(images, self.in_chans)))
        return self.blocks(placed(x, self.pos_embed))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Global average pool, then the classifier: [B, C, h, w] -> [B, 2]; with ``pre_logits`` the pooled [B, C]."""
        pooled = features.mean((2, 3)) if self.global_pool else features
        if self.config.drop_rate:
            pooled = F.dropout(pooled, self.config.drop_rate, self.training)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def save_pretrained(self, folder: str | Path) -> None:
        """As :meth:`Detector.save_pretrained`.  Raises UsageError when the model has no classifier of two classes or
        more, or takes other images than RGB."""
        if self.num_classes != self.config.num_classes or self.in_chans != DTN.in_chans:
            raise UsageError(f"a DTN of {self.num_classes} classes and {self.in_chans} channels is no detector; store "
                             "its state_dict")  # fmt: skip
        super().save_pretrained(folder)

    def cam_layers(self) -> dict[Depth, nn.Module]:
        """The layers of Grad-CAM, a map of each part of Eq. 8 (*choice*: the paper does not name its layer).

        backbone: the last ReLU at 1/16 of the input, the finest map with the deepest features, or a timm backbone's
        last map.  gate: F' (Eq. 12); without a gate, the map that it would scale.  last-block: what the last block's
        scaled attention and local connection add to its input (Eq. 22 and 23); absent without blocks.  head: the map
        that is pooled for the classifier (Eq. 25), where Grad-CAM is the class activation map itself, because only a
        mean and a linear layer follow.
        """
        layers: dict[Depth, nn.Module] = {"backbone": self.backbone[-2], "gate": self.gate}
        for last in self.blocks[-1:].children():
            assert isinstance(last, LEVTBlock)
            layers["last-block"] = last.local
        layers["head"] = self.blocks
        return layers

    def novelty_layer(self) -> nn.Module | None:
        """The fourth group's pool, or a timm backbone."""
        return self._pool(3)

    def mask_layers(self) -> list[nn.Module]:
        """The third group's pool, at 1/8 of the input, or a timm backbone; and the last block."""
        return [self._pool(2), self.blocks]

    def _pool(self, group: int) -> nn.Module:
        pools = [layer for layer in self.backbone if isinstance(layer, nn.MaxPool2d)]
        return pools[group] if len(pools) == 5 else self.backbone

    # ---------------------------------------------------------------- what timm asks of a model, by timm's names

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels, stride and module of each map that :meth:`forward_intermediates` gives."""
        maps = [{"num_chs": self.num_features, "reduction": STRIDE, "module": "blocks"}]
        if not isinstance(self.backbone, Backbone):
            return maps
        places = [str(place) for place, layer in enumerate(self.backbone) if isinstance(layer, nn.MaxPool2d)]
        groups = zip(self.config.channels[:-1], places[:-1], strict=True)
        return [
            {"num_chs": width, "reduction": 2 ** (group + 1), "module": f"backbone.{place}"}
            for group, (width, place) in enumerate(groups)
        ] + maps

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> Any:  # fmt: skip
        """[B, 3, H, W] -> the last block's map and a list of the maps at ``indices`` of ``feature_info``, or the list
        alone.

        indices: a number means the last so many maps, None all.  stop_early: leave out what comes after the last one.
        Raises ValueError on an index out of range, another format than NCHW, or wrong images.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt}: a DTN's maps are NCHW")
        wanted, found = self._taken(indices), list[Tensor]()
        x = checked(x, self.in_chans)
        last = len(self.feature_info) - 1
        if isinstance(self.backbone, Backbone):
            for place, group in enumerate(self.backbone.groups()):
                x = self.backbone.run(group, x)
                if place in wanted and place < last:
                    found.append(x)
                if stop_early and place == max(wanted) < last:
                    return found if intermediates_only else (x, found)
        else:
            x = self.backbone(x)
        x = self.blocks(placed(self.gate(x), self.pos_embed))
        found += [x] * (last in wanted)
        return found if intermediates_only else (x, found)

    def _taken(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.feature_info)
        chosen = range(-(count if indices is None else indices), 0) if not isinstance(indices, Sequence) else indices
        if not chosen or not all(-count <= index < count for index in chosen):
            raise ValueError(f"indices {indices}: the model has the maps 0 to {count - 1}")
        return sorted({index % count for index in chosen})

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the layers after the last of the wanted maps, and with ``prune_head`` the classifier; the wanted
        maps' indices from the first on."""
        wanted = self._taken(indices)
        if prune_head:
            self.reset_classifier(0)
        if wanted[-1] < len(self.feature_info) - 1:
            self.gate, self.blocks = nn.Identity(), nn.Sequential()
        return wanted

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a new one; 0 classes: the model gives the pooled features, or with ``global_pool`` ""
        the map [B, C, h, w].  Raises ValueError on another pool than avg, or classes without one."""
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("avg", "") or (num_classes and not pool):
            raise ValueError(f"global_pool {pool!r}: it must be 'avg', or '' without classes")
        self.num_classes, self.global_pool = num_classes, pool
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if num_classes > 1:
            self.config = dataclasses.replace(self.config, num_classes=num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes the insides of each convolution group and block again in the backward, in place of keeping them."""
        for module in (self.backbone, *self.blocks):
            if isinstance(module, Backbone | TimmBackbone | LEVTBlock):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone, besides those of one dimension."""
        return {"pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters by depth, for learning rates by layer; coarse: fewer groups."""
        groups = self.backbone.groups() if isinstance(self.backbone, Backbone) and not coarse else [list(self.backbone)]
        begins = [0, *itertools.accumulate(map(len, groups))]
        parts = [
            (rf"^backbone\.(?:{'|'.join(map(str, range(*span)))})\.", (place,))
            for place, span in enumerate(itertools.pairwise(begins))
        ]
        return {"stem": parts, "gate": r"^gate|^pos_embed", "blocks": r"^blocks" if coarse else r"^blocks\.(\d+)"}


def checked(images: Tensor, channels: int) -> Tensor:
    """``images``.  Raises ValueError unless they are floating [B, channels, H, W], H and W multiples of 32."""
    if images.dim() != 4 or images.shape[1] != channels or not images.is_floating_point():
        wanted = f"floating [B, {channels}, H, W]"
        raise ValueError(f"images: got {tuple(images.shape)} {images.dtype}; DTN takes {wanted}")
    height, width = images.shape[-2:]
    if height % STRIDE or width % STRIDE or not height or not width:
        raise ValueError(f"images: got {height}x{width} pixels; both sides must be multiples of {STRIDE}")
    return images


def placed(x: Tensor, pos_embed: Tensor) -> Tensor:
    """A map [B, C, h, w] plus the position embedding [1, C, h', w'], interpolated to its size."""
    if x.shape[-2:] != pos_embed.shape[-2:]:
        pos_embed = F.interpolate(pos_embed, x.shape[-2:], mode="bicubic", align_corners=False)
    return x + pos_embed.to(x.dtype)

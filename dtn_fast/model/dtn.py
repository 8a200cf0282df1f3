"""The detector: backbone, MoE gate, LEVT blocks, head (paper Eq. 8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtn_fast.model.backbone import Backbone, build_backbone
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

    def __init__(self, config: DTNConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DTNConfig()
        self.num_classes, self.num_features = config.num_classes, config.channels[-1]
        side = config.image_size // STRIDE
        self.backbone: nn.Sequential = build_backbone(config)
        self.gate: nn.Module = MoEGate(config) if config.num_experts else nn.Identity()
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_features, side, side))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.Sequential(*(LEVTBlock(config) for _ in range(config.depth)))
        self.head = nn.Linear(self.num_features, config.num_classes)
        self.mask_head = None
        if config.mask_head:
            fine = self.mask_layers()[0]
            if isinstance(self.backbone, Backbone):
                self.backbone.read = list(self.backbone).index(fine)
            width = config.channels[2] if isinstance(fine, nn.MaxPool2d) else self.num_features
            self.mask_head = MaskHead((width, self.num_features))

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> the last block's map [B, C, H / 32, W / 32]."""
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images: got {tuple(images.shape)} {images.dtype}; DTN takes floating [B, 3, H, W]")
        height, width = images.shape[-2:]
        if height % STRIDE or width % STRIDE or not height or not width:
            raise ValueError(f"images: got {height}x{width} pixels; both sides must be multiples of {STRIDE}")
        x = self.gate(self.backbone(images))
        return self.blocks(x + self._positions(height // STRIDE, width // STRIDE).to(x.dtype))

    def _positions(self, height: int, width: int) -> Tensor:
        if (height, width) == tuple(self.pos_embed.shape[-2:]):
            return self.pos_embed
        return F.interpolate(self.pos_embed, (height, width), mode="bicubic", align_corners=False)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Global average pool, then the classifier: [B, C, h, w] -> [B, 2]; with ``pre_logits`` the pooled [B, C]."""
        pooled = features.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

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

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head by a new one for another number of classes (timm's convention)."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes)

"""The detector: backbone, MoE gate, LEVT blocks, head (paper Eq. 8); loading and saving."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtn_fast.backbone import build_backbone
from dtn_fast.config import STRIDE, DTNConfig
from dtn_fast.errors import UsageError
from dtn_fast.levt import LEVTBlock
from dtn_fast.moe import MoEGate

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class DTN(nn.Module):
    """Distilled transformer network: images [B, 3, H, W] (normalised RGB, H and W multiples of 32) -> logits [B, 2].

    Logit 0 is real, 1 is fake.  Raises ValueError on another shape or a non-floating dtype.
    """

    def __init__(self, config: DTNConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DTNConfig()
        self.num_classes, self.num_features = config.num_classes, config.channels[-1]
        self.notice = ""  # what every report of this model must say, such as that it was trained on synthetic faces
        side = config.image_size // STRIDE
        self.backbone = build_backbone(config)
        self.gate: nn.Module = MoEGate(config) if config.num_experts else nn.Identity()
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_features, side, side))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.Sequential(*(LEVTBlock(config) for _ in range(config.depth)))
        self.head = nn.Linear(self.num_features, config.num_classes)

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

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh head for another number of classes (timm's convention)."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model.safetensors and config.json into ``folder``, each whole or not at all."""
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        weights = save(state, metadata={"notice": self.notice})
        for name, data in ((WEIGHTS, weights), (CONFIG, self.config.to_json().encode())):
            partial = folder / f".{name}.partial"
            partial.write_bytes(data)
            partial.replace(folder / name)

    @classmethod
    def from_pretrained(cls, path: str | Path, config: DTNConfig | None = None) -> DTN:
        """Reads a folder written by :meth:`save_pretrained`, in eval mode; ``config`` replaces the stored one.

        Raises UsageError when the folder, a file or a tensor is missing, or the weights are of another shape.
        """
        from safetensors import SafetensorError, safe_open

        folder = Path(path)
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise UsageError(f"{folder}: no {name} there; give a folder written by training or save_pretrained")
        if config is None:
            config = DTNConfig.from_json((folder / CONFIG).read_text(encoding="utf-8"), str(folder / CONFIG))
        model = cls(config)
        try:
            with safe_open(folder / WEIGHTS, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                model.notice = (file.metadata() or {}).get("notice", "")
        except (SafetensorError, OSError, ValueError) as error:
            raise UsageError(f"{folder / WEIGHTS}: not a safetensors file ({error})") from error
        check_state(model, state, str(folder / WEIGHTS))
        model.load_state_dict(state)
        return model.eval()


def check_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Raises UsageError naming ``where`` and the first tensor that does not fit ``model``."""
    own = model.state_dict()
    for name in [*own, *state]:
        got, want = (tuple(s[name].shape) if name in s else None for s in (state, own))
        if got != want:
            raise UsageError(
                f"{where}: {name} is {got or 'absent'}, the model wants {want or 'no such tensor'}; "
                "the checkpoint belongs to another preset or configuration"
            )

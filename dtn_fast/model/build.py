"""Building and loading of any detector: the DTN, or a model of timm's registry with two logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtn_fast.errors import UsageError
from dtn_fast.model.config import CropPolicy, DTNConfig, TimmConfig, read_config
from dtn_fast.model.detector import CONFIG, Detector, check_folder, device_of
from dtn_fast.model.dtn import DTN
from dtn_fast.model.hooks import hooked
from dtn_fast.model.timm_compat import import_timm


class TimmDetector(Detector):
    """A timm model as a detector.  Raises UsageError when timm is missing or does not know the name."""

    config_class = TimmConfig

    def __init__(self, config: TimmConfig, pretrained: bool = False) -> None:
        super().__init__()
        timm = import_timm()
        from dtn_fast.model import timm_registry  # noqa: F401  (it registers this package's own models)

        self.config, self.num_classes = config, config.num_classes
        known = _published(config.timm)
        # a model with positions for one image size only, as ViTs, is made for the crops' size
        size = {"img_size": config.image_size} if known and known.fixed_input_size else {}
        try:
            self.net = timm.create_model(config.timm, pretrained=pretrained, num_classes=config.num_classes, **size)
        except Exception as error:  # timm and the hub raise RuntimeError, ValueError, OSError, their own ...
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(f"{config.timm}: timm cannot make it ({reason}); see timm.list_models()") from error

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, num_classes]
        return self.net(images)

    def classifiers(self) -> list[nn.Module]:
        """The layers that the model itself names, or else the last linear one."""
        own = getattr(self.net, "classifiers", None)
        return own() if own is not None else super().classifiers()

    def cam_layer(self) -> nn.Module | None:
        """The last layer that timm names as a feature map; None where its output is not [B, C, h, w], as in a ViT."""
        info = getattr(self.net, "feature_info", None)
        last = info[-1] if isinstance(info, list) and info else {}
        layer = dict(self.net.named_modules()).get(last.get("module"))
        if layer is None:
            return None
        widths: list[int] = []
        look = lambda _module, _inputs, output: widths.append(
            output.shape[1] if isinstance(output, Tensor) and output.dim() == 4 else 0
        )
        side = self.config.image_size
        with hooked(self, [(layer, look)]), torch.no_grad():
            self(torch.zeros(1, 3, side, side, device=device_of(self)))
        return layer if widths == [last.get("num_chs")] else None


def own_size(name: str) -> int:
    """Side of the pictures that timm's published weights of a model take; our default where there are none."""
    known = _published(name)
    return known.input_size[-1] if known else TimmConfig.image_size


def timm_config(name: str, image_size: int, crop: CropPolicy | None = None) -> TimmConfig:
    """Configuration of a timm model, with the mean and standard deviation of its published weights; our defaults where
    there are none."""
    known = _published(name)
    if known is None or len(known.mean) != 3 or len(known.std) != 3:
        return TimmConfig(name, image_size, crop=crop)
    return TimmConfig(name, image_size, mean=tuple(known.mean), std=tuple(known.std), crop=crop)


def _published(name: str) -> Any:
    """timm's record of a model's published weights, None where it has none."""
    try:
        return import_timm().get_pretrained_cfg(name)
    except RuntimeError:
        return None


def build_detector(config: DTNConfig | TimmConfig, pretrained: bool = False) -> Detector:
    """A detector with fresh weights, or with timm's published ones."""
    return DTN(config) if isinstance(config, DTNConfig) else TimmDetector(config, pretrained)


def load_detector(folder: Path) -> Detector:
    """Reads a folder that ``save_pretrained`` wrote, in eval mode.  Raises UsageError as ``from_pretrained`` does."""
    check_folder(folder)
    config = read_config(folder / CONFIG)
    kind = DTN if isinstance(config, DTNConfig) else TimmDetector
    return kind.from_pretrained(folder, config)

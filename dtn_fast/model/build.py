"""Building and loading of any detector: the DTN, or a model of timm's registry with two logits."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dtn_fast.errors import UsageError
from dtn_fast.model.adapt import adapt, initialise
from dtn_fast.model.config import CropPolicy, DTNConfig, TimmConfig, read_config
from dtn_fast.model.detector import CONFIG, Depth, Detector, check_folder, device_of, patch_side, weights_checksum
from dtn_fast.model.dtn import DTN
from dtn_fast.model.hooks import hooked
from dtn_fast.model.mas import with_mas
from dtn_fast.model.mask_head import MaskHead
from dtn_fast.model.pretrained import Files, create_model, weights_of
from dtn_fast.model.timm_compat import import_timm


class TimmDetector(Detector):
    """A timm model as a detector, with fresh weights or, if ``pretrained``, those in ``files`` or else on timm's hub.

    Raises UsageError when timm is missing or does not know the name, a file does not hold the weights, or the model has
    no attention that is adapted, or no map for the mask head that it should have.
    """

    config_class = TimmConfig

    def __init__(self, config: TimmConfig, pretrained: bool = False, files: Files = MappingProxyType({})) -> None:
        super().__init__(config)
        timm = import_timm()
        self.num_classes = config.num_classes
        known = _published(config.timm)
        # a model with positions for one image size only, as ViTs, is made for the crops' size
        size = {"img_size": config.image_size} if known and known.fixed_input_size else {}
        inside = {"weights": files} if pretrained and weights_of(config.timm) != config.timm else {}
        try:
            self.net = create_model(
                timm, config.timm, pretrained, files, num_classes=config.num_classes, **size, **inside
            )
        except UsageError:
            raise
        except Exception as error:  # timm and the hub raise RuntimeError, ValueError, OSError, their own ...
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            remedy = f"give its weights by --pretrained-from {weights_of(config.timm)}=FILE, or " * pretrained
            raise UsageError(
                f"{config.timm}: timm cannot make it ({reason}); {remedy}see timm.list_models()"
            ) from error
        try:
            if config.adaptation.mas:
                with_mas(self.net)
            if config.adaptation.adapt != "none":
                adapt(self.net, config.adaptation, self.classifiers())
        except ValueError as error:
            raise UsageError(f"{config.timm}: cannot be adapted so: {error}; choose a ViT, or leave --adapt and --mas "
                             "out") from error  # fmt: skip
        self.mask_head = None
        if config.mask_head:
            if not (layers := self.mask_layers()):
                raise UsageError(f"{config.timm}: has no feature map for a mask head; train it without --mask-weight")
            shapes = map(self._output_of, layers)
            self.mask_head = MaskHead([shape[0] if len(shape) == 3 else shape[1] for shape in shapes])
        self.add_temporal()

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, num_classes]
        return self.net(images)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable and any(isinstance(module, _NormBase) for module in self.net.modules()):
            raise UsageError(f"{self.config.timm}: has BN, whose running statistics timm's gradient checkpointing "
                             "updates twice; leave --grad-checkpointing out")  # fmt: skip
        try:
            self.net.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError):
            name = self.config.timm
            raise UsageError(f"{name}: has no gradient checkpointing; leave --grad-checkpointing out") from None

    def classifiers(self) -> list[nn.Module]:
        """The layers that the model itself or timm names, which may be several, or else the last linear one."""
        own = getattr(self.net, "classifiers", None)
        if own is not None:
            return own()
        names = (getattr(self.net, "pretrained_cfg", None) or {}).get("classifier") or ()
        layers = dict(self.net.named_modules())
        named = [layers.get(name) for name in ((names,) if isinstance(names, str) else names)]
        return [layer for layer in named if isinstance(layer, nn.Linear)] or super().classifiers()

    def cam_layers(self) -> dict[Depth, nn.Module]:
        """The layers that the model itself names; or else ``backbone``, the last one that timm names as a feature map
        if its output is [B, C, h, w]; or else, as in a ViT, ``last-block``, the norm before the last block's attention,
        the last place where every patch still acts on the class token."""
        own = getattr(self.net, "cam_layers", None)
        if own is not None:
            return own()
        info = getattr(self.net, "feature_info", None)
        last = info[-1] if isinstance(info, list) and info else {}
        layer = dict(self.net.named_modules()).get(last.get("module"))
        if layer is not None and len(shape := self._output_of(layer)) == 3 and shape[0] == last.get("num_chs"):
            return {"backbone": layer}
        blocks = getattr(self.net, "blocks", None)
        norm = getattr(blocks[-1], "norm1", None) if isinstance(blocks, nn.Sequential) and len(blocks) else None
        if norm is not None and len(shape := self._output_of(norm)) == 2 and patch_side(shape[0]) > 1:
            return {"last-block": norm}
        return {}

    def novelty_layer(self) -> nn.Module | None:
        """The map that timm names whose side is nearest to 1/16 of the input's, or a ViT's block half way."""
        if (layer := self._map_at(16)) is not None:
            return layer
        blocks = getattr(self.net, "blocks", None)
        layer = blocks[(len(blocks) - 1) // 2] if isinstance(blocks, nn.Sequential) and len(blocks) else None
        return layer if layer is not None and len(self._output_of(layer)) == 2 else None

    def mask_layers(self) -> list[nn.Module]:
        """The maps that timm names whose sides are nearest to 1/8 and 1/32 of the input's; or a ViT's block half way
        and its last; or the backbone that the model itself names."""
        found = [layer for layer in (self._map_at(8), self._map_at(32)) if layer is not None]
        middle, blocks = self.novelty_layer(), getattr(self.net, "blocks", None)
        if not found and middle is not None and isinstance(blocks, nn.Sequential):
            found = [layer for layer in (middle, blocks[-1]) if patch_side(self._output_of(layer)[0]) > 1]
        backbone = getattr(self.net, "backbone", None)
        if not found and isinstance(backbone, nn.Module) and len(self._output_of(backbone)) == 3:
            found = [backbone]
        return list(dict.fromkeys(found))

    def _map_at(self, stride: int) -> nn.Module | None:
        """The map that timm names whose side is nearest to 1/``stride`` of the input's; None: it names none."""
        info, named = getattr(self.net, "feature_info", None), dict(self.net.named_modules())
        maps = [entry for entry in info if entry.get("module") in named] if isinstance(info, list) else []
        for entry in sorted(maps, key=lambda entry: abs(math.log2(entry.get("reduction", 1) / stride))):
            layer = named[entry["module"]]
            shape = self._output_of(layer)
            if len(shape) == 3 and shape[0] == entry.get("num_chs"):
                return layer
        return None

    def _output_of(self, layer: nn.Module) -> tuple[int, ...]:
        """Shape, without the batch, of a layer's output; empty unless it runs once and gives a tensor."""
        shapes: list[tuple[int, ...]] = []
        look = lambda _module, _inputs, output: shapes.append(
            tuple(output.shape[1:]) if isinstance(output, Tensor) else ()
        )
        side = self.config.image_size
        with hooked(self, [(layer, look)]), torch.no_grad():
            self(torch.zeros(1, 3, side, side, device=device_of(self)))
        return shapes[0] if len(shapes) == 1 else ()


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


def publishes_weights(name: str) -> bool:
    """Whether timm knows published weights of a model, or of the part that it shares with one of timm's."""
    known = _published(weights_of(name))
    return known is not None and bool(known.has_weights)


def build_detector(
    config: DTNConfig | TimmConfig, pretrained: bool = False, files: Files = MappingProxyType({})
) -> Detector:
    """A detector to be trained, with fresh weights, or a timm model with published ones."""
    made = DTN(config) if isinstance(config, DTNConfig) else TimmDetector(config, pretrained, files)
    initialise(made)
    return made


def with_mask_head(model: Detector) -> Detector:
    """``model`` with a new mask head, in eval mode; itself if it has one.  Its logits are the same, and so its
    calibration holds.  Raises UsageError when it has no map for it."""
    if model.mask_head is not None:
        return model
    made = type(model)(dataclasses.replace(model.config, mask_head=True))
    made.load_state_dict({**made.state_dict(), **model.state_dict()})
    made.notice, made.novelty = model.notice, model.novelty
    if (card := model.config.card) is not None and card.calibration is not None:
        tied = dataclasses.replace(card.calibration, weights=weights_checksum(made))
        made.config = dataclasses.replace(made.config, card=dataclasses.replace(card, calibration=tied))
    return made.eval()


def load_detector(folder: Path) -> Detector:
    """Reads a folder that ``save_pretrained`` wrote, in eval mode.  Raises UsageError as ``from_pretrained`` does."""
    check_folder(folder)
    config = read_config(folder / CONFIG)
    kind = DTN if isinstance(config, DTNConfig) else TimmDetector
    return kind.from_pretrained(folder, config)

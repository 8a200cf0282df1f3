"""DTN in timm's model registry: ``import timm, dtn_fast; timm.create_model("dtn_paper")``, in either order."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from dtn_fast.errors import UsageError
from dtn_fast.model import baselines  # noqa: F401  (it registers its models)
from dtn_fast.model.backbone import Backbone
from dtn_fast.model.config import STRIDE, DTNConfig
from dtn_fast.model.dtn import DTN, checked, placed
from dtn_fast.model.levt import LEVTBlock
from dtn_fast.model.moe_gate import MoEGate
from dtn_fast.model.timm_compat import import_timm

timm = import_timm()
build_model_with_cfg = timm.models.build_model_with_cfg
for _module in (Backbone, MoEGate, LEVTBlock):  # single nodes of a symbolic trace (torch.fx)
    timm.models.register_notrace_module(_module)
for _function in (checked, placed):
    timm.models.register_notrace_function(_function)


def _cfg(config: DTNConfig) -> dict[str, Any]:
    side = config.image_size
    return {
        "url": "",
        "num_classes": 2,
        "input_size": (3, side, side),
        "mean": config.mean,
        "std": config.std,
        "pool_size": (side // STRIDE, side // STRIDE),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "first_conv": "backbone.0",
        "classifier": "head",
    }


default_cfgs = timm.models.generate_default_cfgs(
    {f"dtn_{name}": _cfg(DTNConfig.preset(name)) for name in ("paper", "tiny")}
)


def _make(preset: str, num_classes: int, in_chans: int = 3, global_pool: str = "avg", **fields: Any) -> DTN:
    """A DTN by timm's names, ``img_size``, ``in_chans``, ``global_pool``, any number of classes, and by DTNConfig's."""
    if "img_size" in fields:
        fields["image_size"] = fields.pop("img_size")
    model = DTN(DTNConfig.preset(preset, **fields))
    model.reset_classifier(num_classes, global_pool)
    if in_chans != 3 and isinstance(model.backbone, Backbone):
        model.in_chans, model.backbone[0] = in_chans, nn.Conv2d(in_chans, model.config.channels[0], 3, padding=1)
    elif in_chans != 3:
        raise UsageError(f"backbone {model.config.backbone}: in_chans must be 3")
    return model


def _create(preset: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    name = f"dtn_{preset}"
    if pretrained and not (kwargs.get("pretrained_cfg") or kwargs.get("pretrained_cfg_overlay")):
        raise UsageError(f"{name}: no pretrained weights are published; train one and use DTN.from_pretrained")
    kwargs.setdefault("num_classes", 2)
    own = kwargs.get("backbone", DTNConfig.backbone) == DTNConfig.backbone
    features = {"feature_cls": "getter", "out_indices": range(5) if own else (0,)}
    return build_model_with_cfg(functools.partial(_make, preset), name, pretrained, feature_cfg=features, **kwargs)


@timm.models.register_model
def dtn_paper(pretrained: bool = False, **kwargs: Any) -> Any:
    """The paper's DTN: 256x256, depth 6, 8 heads, 2 experts."""
    return _create("paper", pretrained, kwargs)


@timm.models.register_model
def dtn_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """A small DTN for demos and tests: 128x128, depth 2."""
    return _create("tiny", pretrained, kwargs)

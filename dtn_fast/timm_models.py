"""DTN in timm's model registry: ``import timm, dtn_fast; timm.create_model("dtn_paper")``.

When timm is imported after dtn_fast, ``import dtn_fast.timm_models`` registers the presets.
"""

from __future__ import annotations

from typing import Any

import torch

from dtn_fast.config import DTNConfig
from dtn_fast.dtn import DTN
from dtn_fast.errors import UsageError


def _declare_torchvision_operators() -> torch.library.Library | None:
    """Lets torchvision import beside a CPU-only torch.

    PyPI's torchvision is built for CUDA; beside a CPU torch its library does not load, and its import fails because
    it describes two operators that then do not exist.  Declaring them is enough: nothing here calls them.
    """
    try:
        import torchvision  # noqa: F401

        return None
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_torchvision_library = _declare_torchvision_operators()

from timm.models import generate_default_cfgs, register_model  # noqa: E402


def _cfg(config: DTNConfig) -> dict[str, Any]:
    side = config.image_size
    return {
        "url": "",
        "num_classes": 2,
        "input_size": (3, side, side),
        "mean": config.mean,
        "std": config.std,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "first_conv": "backbone.0",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({f"dtn_{name}": _cfg(DTNConfig.preset(name)) for name in ("paper", "tiny")})


def _create(preset: str, pretrained: bool, kwargs: dict[str, Any]) -> DTN:
    if pretrained:
        raise UsageError(f"dtn_{preset}: no pretrained weights are published; train one and use DTN.from_pretrained")
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(name, None)
    if kwargs.pop("in_chans", 3) != 3:
        raise UsageError(f"dtn_{preset}: in_chans must be 3 (RGB)")
    if "img_size" in kwargs:
        kwargs["image_size"] = kwargs.pop("img_size")
    model = DTN(DTNConfig.preset(preset, **kwargs))
    model.pretrained_cfg = model.default_cfg = default_cfgs[f"dtn_{preset}"].default.to_dict()
    return model


@register_model
def dtn_paper(pretrained: bool = False, **kwargs: Any) -> DTN:
    """The paper's DTN: 256x256, depth 6, 8 heads, 2 experts."""
    return _create("paper", pretrained, kwargs)


@register_model
def dtn_tiny(pretrained: bool = False, **kwargs: Any) -> DTN:
    """A small DTN for demos and tests: 128x128, depth 2."""
    return _create("tiny", pretrained, kwargs)


from dtn_fast import baselines  # noqa: E402, F401

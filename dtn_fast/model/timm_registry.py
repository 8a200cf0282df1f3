"""DTN in timm's model registry: ``import timm, dtn_fast; timm.create_model("dtn_paper")``.

When timm is imported after dtn_fast, ``import dtn_fast.model.timm_registry`` registers the presets.
"""

from __future__ import annotations

from typing import Any

from dtn_fast.errors import UsageError
from dtn_fast.model import baselines  # noqa: F401  (it registers its models)
from dtn_fast.model.config import DTNConfig
from dtn_fast.model.dtn import DTN
from dtn_fast.model.timm_compat import import_timm

timm = import_timm()


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


default_cfgs = timm.models.generate_default_cfgs(
    {f"dtn_{name}": _cfg(DTNConfig.preset(name)) for name in ("paper", "tiny")}
)


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


@timm.models.register_model
def dtn_paper(pretrained: bool = False, **kwargs: Any) -> DTN:
    """The paper's DTN: 256x256, depth 6, 8 heads, 2 experts."""
    return _create("paper", pretrained, kwargs)


@timm.models.register_model
def dtn_tiny(pretrained: bool = False, **kwargs: Any) -> DTN:
    """A small DTN for demos and tests: 128x128, depth 2."""
    return _create("tiny", pretrained, kwargs)

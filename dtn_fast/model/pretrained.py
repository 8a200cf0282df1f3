"""timm models with published weights, from timm's hub or a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtn_fast.errors import UsageError, reason

EFFICIENTNET = "efficientnet_b0"
PARTS = {"efficient_vit": EFFICIENTNET, "cross_efficient_vit": EFFICIENTNET}
"""Models of this package of which a part is a timm model's; as published, they begin with that one's weights."""
Files = Mapping[str, Path]
"""Files of weights by the name of the timm model that they are of."""


def files_of(pairs: tuple[str, ...]) -> dict[str, Path]:
    """The files in ``pairs``, each NAME=FILE.  Raises UsageError on another form, or a name given twice."""
    found: dict[str, Path] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path) or name in found:
            raise UsageError(f"--pretrained-from {pair}: NAME=FILE was expected, each name once, such as "
                             "legacy_xception=xception.pth")  # fmt: skip
        found[name] = Path(path)
    return found


def weights_of(name: str) -> str:
    """The timm model whose published weights a model begins with: itself, or its part."""
    return PARTS.get(name.removesuffix("_mas").removesuffix("_reattention"), name)


def create_model(timm: Any, name: str, pretrained: bool, files: Files, **how: Any) -> Any:
    """``timm.create_model`` with weights from ``files``, if it has the model's, or else from timm's hub.

    Raises UsageError naming the file when it holds no weights, or not those of every layer but the classifier, or
    values that are not finite; a file is read without executing code from it.
    """
    if not pretrained or name not in files:
        return timm.create_model(name, pretrained=pretrained, **how)
    path = files[name]
    if not path.is_file():
        raise UsageError(f"--pretrained-from {name}={path}: no such file")
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # of safetensors, of torch, or of unpickling
        why = reason(error)[:200]
        raise UsageError(f"--pretrained-from {name}={path}: cannot be read as weights ({why})") from error
    if broken := [key for key, v in state.items() if isinstance(v, torch.Tensor) and not v.isfinite().all()]:
        raise UsageError(f"--pretrained-from {name}={path}: {broken[0]} is not finite; fetch the file again")
    begin = torch.get_rng_state()
    fresh = timm.create_model(name, pretrained=False, **how)
    torch.set_rng_state(begin)  # the same initial values: those that stay were not in the file
    try:
        made = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": state}, **how)
    except Exception as error:
        raise UsageError(f"--pretrained-from {name}={path}: not weights of {name} ({reason(error)[:200]})") from error
    if absent := _unchanged(made, fresh):
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise UsageError(f"--pretrained-from {name}={path}: not weights of {name}: it lacks {absent[0]}{more}")
    return made


def _unchanged(made: nn.Module, fresh: nn.Module) -> list[str]:
    """Names of the parameters that still have their random initial values, but for the classifier's."""
    heads = getattr(made, "pretrained_cfg", {}).get("classifier") or ()
    own = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    before = dict(fresh.named_parameters())
    random = lambda values: values.numel() > 1 and bool(values.min() < values.max())
    same = [name for name, v in made.named_parameters() if random(v) and torch.equal(v, before[name])]
    return [name for name in same if not name.startswith(own)]

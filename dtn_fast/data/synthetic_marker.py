"""The marker file of the synthetic demo set, and its contents."""

from __future__ import annotations

import json
from pathlib import Path

from dtn_fast.errors import UsageError

MARKER = "SYNTHETIC.json"
METHODS = ("SynthBlend", "SynthSwap", "SynthResample", "SynthWarp")
HELD_OUT = "SynthWarp"
"""The forgery that the demo never trains on."""
STAMP = "synthetic faces: no claim about real deepfakes"


def is_synthetic(root: Path) -> bool:
    """Whether ``root`` is a set written by :func:`make_synthetic`."""
    return (root / MARKER).is_file()


def expected_counts(root: Path) -> dict[str, int]:
    """Number of videos of each class in every split of the synthetic set under ``root``, from its marker file."""
    try:
        made = json.loads((root / MARKER).read_text(encoding="utf-8"))
        return {split: int(made[split]) for split in ("train", "val", "test")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{root / MARKER}: damaged ({error}); make the synthetic set again") from error

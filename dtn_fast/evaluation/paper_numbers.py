"""The paper's own figures, in percent as printed, to stand beside what is measured here.  None of them was measured
with this code."""

from __future__ import annotations

from typing import NamedTuple

DATASETS = ("FF++", "Celeb-DF", "DFDC", "DF-1.0", "DFD")
FORGERIES = ("DF", "F2F", "FS", "NT")
FF_NAMES = {"Deepfakes": "DF", "Face2Face": "F2F", "FaceSwap": "FS", "NeuralTextures": "NT"}
"""FaceForensics++'s folder names, as the paper shortens them."""


class Pair(NamedTuple):
    """Percent; None where the paper prints none."""

    acc: float | None
    auc: float | None


Row = dict[str, Pair]
"""By dataset."""


def _row(*values: float | None) -> Row:
    """ACC, AUC, ACC, AUC, ... in the order of DATASETS."""
    return {name: Pair(*values[2 * i : 2 * i + 2]) for i, name in enumerate(DATASETS[: len(values) // 2])}


TABLE1: dict[str, Row] = {
    "CViT": _row(90.47, 96.69, 50.75, 64.70, 60.95, 65.96, 56.15, 62.42, 77.70, 89.28),
    "Xception": _row(95.73, 96.30),
    "EfficientViT": _row(88.26, 96.14, 49.00, 62.47, 64.78, 70.12, 66.67, 70.60, 80.75, 90.50),
    "CrossEfficientViT": _row(93.67, 98.36, 44.24, 65.29, 66.14, 75.55, 62.16, 67.51, 86.71, 94.23),
    "DTN": _row(97.13, 99.70, 70.68, 75.32, 72.13, 80.01, 71.24, 78.77, 87.32, 97.60),
}
"""Trained on FF++; the rows that this package can train."""
TABLE2: dict[str, dict[str, dict[str, float]]] = {
    "DTN": {
        "DF": {"DF": 100.0, "F2F": 97.23, "FS": 74.26, "NT": 98.53},
        "F2F": {"DF": 100.0, "F2F": 99.82, "FS": 93.63, "NT": 97.03},
        "FS": {"DF": 99.15, "F2F": 99.74, "FS": 98.21, "NT": 92.45},
        "NT": {"DF": 99.71, "F2F": 97.95, "FS": 91.25, "NT": 99.81},
    },
    "Xception": {
        "DF": {"DF": 99.38, "F2F": 75.05, "FS": 49.13, "NT": 80.39},
        "F2F": {"DF": 87.56, "F2F": 99.53, "FS": 65.23, "NT": 65.90},
        "FS": {"DF": 70.12, "F2F": 61.7, "FS": 99.36, "NT": 68.71},
        "NT": {"DF": 93.09, "F2F": 84.82, "FS": 47.98, "NT": 99.50},
    },
}
"""AUC by the forgery trained on, then by the one tested on."""
TABLE8_SIZES = {
    "vit_b16": (85.620, 16.879), "vit_b16_reattention": (85.623, 16.968), "vit_b16_mas": (85.620, 16.879),
    "cvit": (88.988, 6.684), "cvit_reattention": (88.989, 6.684), "cvit_mas": (88.988, 6.684),
    "efficient_vit": (104.167, 0.169), "efficient_vit_reattention": (104.167, 0.169),
    "efficient_vit_mas": (104.167, 0.169), "cross_efficient_vit": (90.640, 0.174),
    "cross_efficient_vit_reattention": (90.644, 0.174), "cross_efficient_vit_mas": (90.640, 0.174),
}  # fmt: skip
"""Millions of parameters and GMACs of the transformers compared with, by their names in dtn_fast/baselines.py."""

"""Values printed in the paper's tables (metrics in percent); none of them was measured with this code."""

from __future__ import annotations

import functools
from typing import NamedTuple

DATASETS = ("FF++", "Celeb-DF", "DFDC", "DF-1.0", "DFD")
FF_NAMES = {"Deepfakes": "DF", "Face2Face": "F2F", "FaceSwap": "FS", "NeuralTextures": "NT"}
"""Folder names of FaceForensics++ -> the paper's short forms."""


class Pair(NamedTuple):
    """ACC and AUC in percent; None if the paper does not print the value."""

    acc: float | None
    auc: float | None


PaperValues = dict[str, Pair]
"""A row of a table: dataset -> ACC and AUC."""


def _row(*values: float | None, on: tuple[str, ...] = DATASETS) -> PaperValues:
    """A row of ACC, AUC, ACC, AUC, ... in the order of the datasets ``on``, without those of which it has neither."""
    pairs = {name: Pair(*values[2 * i : 2 * i + 2]) for i, name in enumerate(on[: len(values) // 2])}
    return {name: pair for name, pair in pairs.items() if pair != Pair(None, None)}


def _aucs(*values: float | None, on: tuple[str, ...] = DATASETS) -> PaperValues:
    """A row without ACC."""
    return _row(*(v for auc in values for v in (None, auc)), on=on)


TABLE1: dict[str, PaperValues] = {
    "CViT": _row(90.47, 96.69, 50.75, 64.70, 60.95, 65.96, 56.15, 62.42, 77.70, 89.28),
    "Xception": _row(95.73, 96.30),
    "TwoStream": _aucs(95.05, 79.40, 79.70, 73.80, 91.90),
    "SBIs": _aucs(99.64, 93.18, 72.42, None, 97.56),
    "EfficientViT": _row(88.26, 96.14, 49.00, 62.47, 64.78, 70.12, 66.67, 70.60, 80.75, 90.50),
    "CrossEfficientViT": _row(93.67, 98.36, 44.24, 65.29, 66.14, 75.55, 62.16, 67.51, 86.71, 94.23),
    "RECCE": _row(97.06, 99.32, None, 68.71, None, 69.06),
    "IID": _aucs(99.32, 83.80, 81.23, None, 93.92),
    "IDDDM": _aucs(99.70, 91.15, 71.49),
    "UIA-ViT": _aucs(99.33, 82.41, 75.80, None, 94.68),
    "FoCus": _row(96.43, 99.15),
    "ResNet34": _aucs(98.30),
    "Yu et al.": _row(97.72, 99.55, None, 72.86, None, 69.23, None, None, None, 80.76),
    "Guan et al.": _aucs(99.17, 95.14, 74.65),
    "NACO": _aucs(99.70, 89.50, 76.70),
    "DTN": _row(97.13, 99.70, 70.68, 75.32, 72.13, 80.01, 71.24, 78.77, 87.32, 97.60),
}
"""Table 1: models trained on FF++.  Left out: two more values each of FoCus (76.13, 68.42) and ResNet34 (86.40, 72.10),
because these rows have one cell too few in our copy of the paper, so that their columns cannot be told."""

FORGERIES = tuple(FF_NAMES.values())
"""The columns of Table 2."""
_across = functools.partial(_aucs, on=FORGERIES)
TABLE2: dict[str, dict[str, PaperValues]] = {
    "DF": {
        "Xception": _across(99.38, 75.05, 49.13, 80.39),
        "Face X-ray": _across(99.17, 94.14, 75.34, 93.95),
        "SOLA": _across(100.0, 96.95, 69.72, 98.48),
        "IID": _across(99.51, None, 63.83, None),
        "IDDDM": _across(100.0, 83.94, 58.33, 68.98),
        "Guan et al.": _across(100.0, 66.72, 43.29, 67.40),
        "DTN": _across(100.0, 97.23, 74.26, 98.53),
    },
    "F2F": {
        "Xception": _across(87.56, 99.53, 65.23, 65.90),
        "Face X-ray": _across(98.52, 99.06, 72.69, 91.49),
        "SOLA": _across(99.73, 99.56, 93.50, 96.02),
        "IID": {},
        "IDDDM": _across(99.88, 99.97, 79.40, 82.38),
        "Guan et al.": _across(89.10, 100.0, 62.51, 48.61),
        "DTN": _across(100.0, 99.82, 93.63, 97.03),
    },
    "FS": {
        "Xception": _across(70.12, 61.7, 99.36, 68.71),
        "Face X-ray": _across(93.77, 92.29, 99.20, 86.63),
        "SOLA": _across(99.11, 98.13, 99.98, 92.07),
        "IID": _across(75.39, 99.73, 66.18, 80.43),
        "IDDDM": _across(93.42, 74.00, 99.92, 49.86),
        "Guan et al.": _across(64.19, 66.03, 99.97, 37.37),
        "DTN": _across(99.15, 99.74, 98.21, 92.45),
    },
    "NT": {
        "Xception": _across(93.09, 84.82, 47.98, 99.50),
        "Face X-ray": _across(99.14, 98.43, 70.56, 98.93),
        "SOLA": _across(99.64, 97.69, 90.20, 99.76),
        "IID": {},
        "IDDDM": _across(100.0, 97.93, 86.76, 99.46),
        "Guan et al.": _across(90.15, 68.83, 38.28, 97.84),
        "DTN": _across(99.71, 97.95, 91.25, 99.81),
    },
}
"""Table 2: training forgery -> model -> test forgery -> AUC, as printed; IID's 99.73 under F2F and 66.18 under FS,
trained on FS, look exchanged."""
TABLE8_SIZES = {
    "vit_b16": (85.620, 16.879), "vit_b16_reattention": (85.623, 16.968), "vit_b16_mas": (85.620, 16.879),
    "cvit": (88.988, 6.684), "cvit_reattention": (88.989, 6.684), "cvit_mas": (88.988, 6.684),
    "efficient_vit": (104.167, 0.169), "efficient_vit_reattention": (104.167, 0.169),
    "efficient_vit_mas": (104.167, 0.169), "cross_efficient_vit": (90.640, 0.174),
    "cross_efficient_vit_reattention": (90.644, 0.174), "cross_efficient_vit_mas": (90.640, 0.174),
}  # fmt: skip
"""Millions of parameters and GMACs of Table 8's other transformers, by their names in dtn_fast/model/baselines.py."""
TWO = ("FF++", "DF-1.0")
"""The datasets of Table 3."""
TABLE3: dict[str, PaperValues] = {
    "Baseline": _row(91.97, 97.42, 60.56, 68.36, on=TWO),
    "Baseline+LEVT": _row(93.03, 98.02, 62.86, 70.88, on=TWO),
    "Baseline+LEVT+MoE": _row(94.76, 98.93, 65.45, 73.73, on=TWO),
    "Baseline+LEVT+MoE*": _row(95.02, 99.02, 65.83, 74.57, on=TWO),
    "Baseline+LEVT*+MoE": _row(95.56, 99.30, 66.96, 75.86, on=TWO),
    "Baseline+LEVT+MoE+MAS": _row(97.13, 99.70, 71.24, 78.77, on=TWO),
}
"""Table 3: components."""
TABLE4: dict[str, PaperValues] = {
    "DTN w/o STG": _row(95.20, 99.17, 64.23, 73.72, 70.39, 78.01, 68.03, 75.36),
    "DTN w/ STG": _row(97.13, 99.70, 66.68, 75.32, 72.13, 80.01, 71.24, 78.77),
}
"""Table 4: soft labels."""
TABLE5: dict[str, PaperValues] = {
    "CE loss": _row(93.03, 98.13, 57.84, 70.21, 67.94, 73.32, 65.89, 67.75),
    "KD + CE loss": _row(95.77, 99.30, 62.72, 70.92, 69.83, 77.95, 66.97, 71.14),
    "Ct-c + CE loss": _row(95.20, 99.17, 64.23, 73.72, 70.39, 78.01, 68.03, 75.36),
    "DSD loss": _row(97.13, 99.70, 66.68, 75.32, 72.13, 80.01, 71.24, 78.77),
}
"""Table 5: losses."""
TABLE6: dict[str, PaperValues] = {
    "DTN w/o LC": _row(95.56, 99.43, 63.95, 72.52, 70.79, 78.73, 67.43, 74.23),
    "DTN w/ LC": _row(97.13, 99.70, 66.68, 75.32, 72.13, 80.01, 71.24, 78.77),
}
"""Table 6: local connection."""
TABLE6_SIZES = {
    "DTN w/o LC": (29.876, 9.796),
    "DTN w/ LC": (29.912, 9.799),
}
"""Millions of parameters and GMACs of Table 6's models."""
TABLE7: dict[str, PaperValues] = {
    "Vanilla MoE": _row(92.24, 97.03, 58.28, 63.71, 62.18, 68.03, 62.09, 68.43, 81.65, 87.27),
    "Ours": _row(93.21, 98.20, 60.23, 66.22, 64.88, 72.67, 65.45, 74.36, 82.93, 90.58),
}
"""Table 7: expert gate without transformer blocks."""
TABLE8: dict[str, PaperValues] = {
    "ViT": _row(62.44, 67.07, 62.28, 59.75, 56.18, 58.31, 58.05, 61.27),
    "ViT w/ Re-att": _row(62.84, 67.42, 63.25, 60.19, 56.21, 58.34, 58.21, 61.43),
    "ViT w/ MAS": _row(63.45, 67.97, 64.40, 61.65, 56.66, 58.86, 59.04, 62.36),
    "CViT": _row(90.47, 96.69, 50.75, 64.70, 60.95, 65.96, 56.15, 62.42),
    "CViT w/ Re-att": _row(90.45, 96.78, 52.74, 66.42, 62.13, 65.87, 58.17, 65.72),
    "CViT w/ MAS": _row(90.45, 97.03, 55.86, 65.35, 63.27, 67.85, 60.32, 67.62),
    "EViT": _row(88.26, 96.14, 49.00, 62.47, 64.78, 70.12, 66.67, 70.60),
    "EViT w/ Re-att": _row(88.12, 96.38, 52.54, 63.27, 65.31, 70.46, 66.35, 70.82),
    "EViT w/ MAS": _row(88.44, 96.66, 57.30, 64.80, 66.26, 70.71, 66.39, 71.34),
    "CEViT": _row(93.67, 98.36, 44.24, 65.29, 66.14, 75.55, 62.61, 67.51),
    "CEViT w/ Re-att": _row(93.85, 98.82, 47.14, 66.04, 66.26, 72.51, 63.06, 68.35),
    "CEViT w/ MAS": _row(94.69, 99.08, 49.97, 67.37, 66.64, 74.13, 64.18, 69.30),
    "Ours": _row(94.76, 98.93, 65.09, 73.21, 70.45, 78.23, 65.45, 73.73),
    "Ours w/ Re-att": _row(95.32, 99.03, 66.31, 74.03, 71.27, 79.52, 68.21, 74.36),
    "Ours w/ MAS": _row(97.13, 99.70, 66.68, 75.32, 72.13, 80.01, 71.24, 78.77),
}
"""Table 8: MAS and Re-attention in other transformers."""
TABLE8_OWN_SIZES = {
    "Ours": (29.912, 9.799),
    "Ours w/ Re-att": (29.915, 9.802),
    "Ours w/ MAS": (29.912, 9.799),
}
"""Millions of parameters and GMACs of the paper's own model in Table 8."""
TABLE9: dict[str, PaperValues] = {
    "L=4": _row(95.03, 97.93, 64.31, 73.89, 70.38, 78.48, 69.98, 76.43),
    "L=5": _row(96.35, 98.04, 65.45, 74.46, 71.54, 79.34, 70.03, 77.05),
    "L=6": _row(97.13, 99.70, 66.68, 75.32, 72.13, 80.01, 71.24, 78.77),
    "L=7": _row(96.85, 98.32, 65.54, 74.27, 72.06, 79.43, 70.32, 77.67),
}
"""Table 9: number of transformer blocks."""
TABLE9_SIZES = {
    "L=4": (23.590, 9.393),
    "L=5": (26.751, 9.596),
    "L=6": (29.912, 9.799),
    "L=7": (33.073, 10.002),
}
"""Millions of parameters and GMACs of Table 9's models."""
TABLE10: dict[str, tuple[PaperValues, ...]] = {
    "DTN": (
        _row(95.20, 99.17, 64.23, 73.72, 70.39, 78.01, 68.03, 75.36, 85.06, 94.83),
        _row(95.91, 99.55, 66.03, 74.81, 70.71, 78.72, 67.02, 76.68, 85.48, 96.34),
        _row(96.14, 99.69, 66.17, 75.12, 70.93, 79.90, 71.35, 78.54, 86.52, 97.53),
        _row(97.13, 99.70, 66.68, 75.32, 72.13, 80.01, 71.24, 78.77, 87.32, 97.60),
        _row(97.35, 99.81, 65.32, 74.05, 72.01, 79.83, 70.36, 78.42, 87.23, 97.54),
    ),
    "Xception": (
        _row(94.08, 96.51, 54.24, 65.86, 58.77, 66.95, 54.76, 67.03, 76.84, 85.20),
        _row(95.80, 97.56, 57.57, 66.53, 60.08, 67.44, 58.93, 71.67, 78.43, 86.65),
        _row(95.74, 97.52, 58.99, 66.47, 59.97, 67.21, 59.68, 73.29, 77.55, 86.03),
        _row(95.77, 97.43, 60.81, 67.36, 60.10, 66.89, 61.60, 74.16, 77.92, 85.92),
        _row(95.61, 97.45, 59.50, 66.15, 59.98, 66.63, 60.51, 73.82, 77.01, 85.84),
    ),
    "EViT": (
        _row(88.26, 96.14, 49.00, 62.47, 64.78, 70.12, 66.67, 70.60, 80.75, 90.50),
        _row(89.50, 96.85, 47.02, 63.36, 64.75, 70.91, 67.83, 74.05, 81.04, 90.76),
        _row(89.77, 97.19, 49.88, 63.86, 64.68, 70.55, 69.24, 75.51, 80.87, 90.87),
        _row(89.83, 97.31, 50.16, 62.26, 65.93, 71.00, 70.95, 77.95, 79.19, 88.86),
        _row(90.07, 97.52, 49.08, 62.56, 63.68, 70.85, 70.03, 77.62, 80.88, 90.31),
    ),
}
"""Table 10: generations of self-distillation, the teacher, then students 1 to 4."""

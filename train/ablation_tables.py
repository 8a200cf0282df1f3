"""The variants of the paper's tables."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from dtn_fast.errors import UsageError
from dtn_fast.evaluation.paper_numbers import DATASETS, FF_NAMES, TABLE1, TABLE2, TABLE8_SIZES, Pair
from dtn_fast.model.config import DTNConfig, TimmConfig
from dtn_fast.train.config import Recipe

Printed = dict[str, Pair]


@dataclass(frozen=True)
class Variant:
    """A model of a table: changes to the model and to the recipe, and what the paper prints for it."""

    name: str
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of DTNConfig; or ``{"timm": NAME}``, another detector."""
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    distil: bool = False
    """Also distil; the best student on validation is measured."""
    every_generation: bool = False
    """Measure each generation, a row each."""
    paper: Printed = dataclasses.field(default_factory=dict)
    size: tuple[float, float] | None = None
    """The paper's millions of parameters and GMACs, where its table has them."""
    trained_on: str = ""
    """The one forgery it is trained on, as the paper shortens it; empty: all."""

    @property
    def label(self) -> str:
        """What tells it from the table's other variants."""
        return f"{self.name} on {self.trained_on}" if self.trained_on else self.name


class Ablation(NamedTuple):
    title: str
    variants: tuple[Variant, ...]
    by_forgery: bool = False
    """Each variant is trained on each forgery alone and tested on each."""


def paper_row(*values: float, on: tuple[str, ...] = DATASETS) -> Printed:
    return {name: Pair(values[2 * i], values[2 * i + 1]) for i, name in enumerate(on[: len(values) // 2])}


TWO = ("FF++", "DF-1.0")
CE, CE_CENTER = (1.0, 0.0), (1.0, 1.0)
PLAIN = {"num_experts": 0, "mas": False}
UNSCALED = {"mas": False, "expert_scales": False}
FULL = paper_row(97.13, 99.70, 66.68, 75.32, 72.13, 80.01, 71.24, 78.77)
TEACHER = paper_row(95.20, 99.17, 64.23, 73.72, 70.39, 78.01, 68.03, 75.36)
ABLATIONS: dict[str, Ablation] = {
    "cross-dataset": Ablation("Within-dataset and cross-dataset evaluation (Table 1)", (
        Variant("CViT", {"timm": "cvit"}, paper=TABLE1["CViT"]),
        Variant("Xception", {"timm": "legacy_xception"}, paper=TABLE1["Xception"]),
        Variant("EfficientViT", {"timm": "efficient_vit"}, paper=TABLE1["EfficientViT"]),
        Variant("CrossEfficientViT", {"timm": "cross_efficient_vit"}, paper=TABLE1["CrossEfficientViT"]),
        Variant("DTN", distil=True, paper=TABLE1["DTN"]),
    )),
    "cross-manipulation": Ablation("Generalisation to forgeries not trained on (Table 2)", (
        Variant("Xception", {"timm": "legacy_xception"}), Variant("DTN", distil=True),
    ), by_forgery=True),
    "components": Ablation("Components (Table 3)", (
        Variant("Baseline", {"depth": 0, **PLAIN}, paper=paper_row(91.97, 97.42, 60.56, 68.36, on=TWO), distil=True),
        Variant("Baseline+LEVT", PLAIN, paper=paper_row(93.03, 98.02, 62.86, 70.88, on=TWO), distil=True),
        Variant("Baseline+LEVT+MoE", UNSCALED,
                paper=paper_row(94.76, 98.93, 65.45, 73.73, on=TWO), distil=True),
        Variant("Baseline+LEVT+MoE*", {"mas": False}, paper=paper_row(95.02, 99.02, 65.83, 74.57, on=TWO), distil=True),
        Variant("Baseline+LEVT*+MoE", {"expert_scales": False}, paper=paper_row(95.56, 99.30, 66.96, 75.86, on=TWO),
                distil=True),
        Variant("Baseline+LEVT+MoE+MAS", paper=paper_row(97.13, 99.70, 71.24, 78.77, on=TWO), distil=True),
    )),
    "soft-labels": Ablation("Soft labels (Table 4)", (
        Variant("DTN w/o STG", paper=TEACHER),
        Variant("DTN w/ STG", distil=True, paper=FULL),
    )),
    "losses": Ablation("Losses (Table 5)", (
        Variant("CE loss", recipe={"initial_weights": CE},
                paper=paper_row(93.03, 98.13, 57.84, 70.21, 67.94, 73.32, 65.89, 67.75)),
        Variant("KD + CE loss", recipe={"initial_weights": CE, "weights": (4.0, 0.4, 0.0)}, distil=True,
                paper=paper_row(95.77, 99.30, 62.72, 70.92, 69.83, 77.95, 66.97, 71.14)),
        Variant("Ct-c + CE loss", paper=TEACHER),
        Variant("DSD loss", distil=True, paper=FULL),
    )),
    "local-connection": Ablation("Local connection (Table 6)", (
        Variant("DTN w/o LC", {"local_connection": False}, distil=True,
                paper=paper_row(95.56, 99.43, 63.95, 72.52, 70.79, 78.73, 67.43, 74.23), size=(29.876, 9.796)),
        Variant("DTN w/ LC", distil=True, paper=FULL, size=(29.912, 9.799)),
    )),
    "moe": Ablation("Gate alone on the convolutions (Table 7)", (
        Variant("Vanilla MoE", {"gate": "vanilla", "depth": 0, "noise": "none", "expert_scales": False},
                paper=paper_row(92.24, 97.03, 58.28, 63.71, 62.18, 68.03, 62.09, 68.43, 81.65, 87.27)),
        Variant("Ours", {"depth": 0},
                paper=paper_row(93.21, 98.20, 60.23, 66.22, 64.88, 72.67, 65.45, 74.36, 82.93, 90.58)),
    )),
    "mas": Ablation("MAS and Re-attention in other transformers (Table 8)", (*(
        Variant(title + end, {"timm": name + suffix}, paper=paper_row(*values), size=TABLE8_SIZES[name + suffix])
        for title, name, rows in (
            ("ViT", "vit_b16", ((62.44, 67.07, 62.28, 59.75, 56.18, 58.31, 58.05, 61.27),
                                (62.84, 67.42, 63.25, 60.19, 56.21, 58.34, 58.21, 61.43),
                                (63.45, 67.97, 64.40, 61.65, 56.66, 58.86, 59.04, 62.36))),
            ("CViT", "cvit", ((90.47, 96.69, 50.75, 64.70, 60.95, 65.96, 56.15, 62.42),
                              (90.45, 96.78, 52.74, 66.42, 62.13, 65.87, 58.17, 65.72),
                              (90.45, 97.03, 55.86, 65.35, 63.27, 67.85, 60.32, 67.62))),
            ("EViT", "efficient_vit", ((88.26, 96.14, 49.00, 62.47, 64.78, 70.12, 66.67, 70.60),
                                       (88.12, 96.38, 52.54, 63.27, 65.31, 70.46, 66.35, 70.82),
                                       (88.44, 96.66, 57.30, 64.80, 66.26, 70.71, 66.39, 71.34))),
            ("CEViT", "cross_efficient_vit", ((93.67, 98.36, 44.24, 65.29, 66.14, 75.55, 62.61, 67.51),
                                              (93.85, 98.82, 47.14, 66.04, 66.26, 72.51, 63.06, 68.35),
                                              (94.69, 99.08, 49.97, 67.37, 66.64, 74.13, 64.18, 69.30))),
        )
        for end, suffix, values in zip(("", " w/ Re-att", " w/ MAS"), ("", "_reattention", "_mas"), rows, strict=True)
    ),
        Variant("Ours", UNSCALED, distil=True, size=(29.912, 9.799),
                paper=paper_row(94.76, 98.93, 65.09, 73.21, 70.45, 78.23, 65.45, 73.73)),
        Variant("Ours w/ Re-att", {**UNSCALED, "reattention": True}, distil=True, size=(29.915, 9.802),
                paper=paper_row(95.32, 99.03, 66.31, 74.03, 71.27, 79.52, 68.21, 74.36)),
        Variant("Ours w/ MAS", distil=True, size=(29.912, 9.799), paper=FULL),
    )),
    "depth": Ablation("Transformer blocks (Table 9)", tuple(
        Variant(f"L={depth}", {"depth": depth}, distil=True, paper=paper_row(*values), size=size)
        for depth, size, values in (
            (4, (23.590, 9.393), (95.03, 97.93, 64.31, 73.89, 70.38, 78.48, 69.98, 76.43)),
            (5, (26.751, 9.596), (96.35, 98.04, 65.45, 74.46, 71.54, 79.34, 70.03, 77.05)),
            (6, (29.912, 9.799), (97.13, 99.70, 66.68, 75.32, 72.13, 80.01, 71.24, 78.77)),
            (7, (33.073, 10.002), (96.85, 98.32, 65.54, 74.27, 72.06, 79.43, 70.32, 77.67)),
        )
    )),
    "generations": Ablation("Generations of self-distillation (Table 10)", (
        Variant("DTN", distil=True, every_generation=True, recipe={"min_generations": 4, "generations": 4}),
        Variant("Xception", {"timm": "legacy_xception"}, distil=True, every_generation=True,
                recipe={"min_generations": 4, "generations": 4}),
        Variant("EViT", {"timm": "efficient_vit"}, distil=True, every_generation=True,
                recipe={"min_generations": 4, "generations": 4}),
    )),
    "noise": Ablation("What disturbs the gate's input (Figure 6a)", tuple(
        Variant(name, {"noise": kind}) for name, kind in (
            ("Gaussian noise", "gaussian"), ("Gaussian blur", "blur"), ("compression", "compression"),
            ("contrast", "contrast"), ("none", "none"),
        )
    )),
    "center-dimension": Ablation("What Ct-c is taken of (Figure 6b)", (
        Variant("vanilla Ct-c", recipe={"center_on": "features"}),
        Variant("low-dimensional Ct-c"),
    )),
    "backbones": Ablation("Other backbones (Figure 6c)", tuple(
        variant for name in ("resnet34", "resnet50", "efficientnet_b0", "efficientnet_b4") for variant in (
            Variant(name, {"backbone": name, "depth": 0, **PLAIN}),
            Variant(f"{name} + ours", {"backbone": name}),
        )
    )),
    "experts": Ablation("Experts, with noise and without (Figure 6d)", tuple(
        Variant(f"n={experts}{title}", {"num_experts": experts, "noise": noise})
        for noise, title in (("gaussian", ""), ("none", " without noise")) for experts in range(1, 8)
    )),
}  # fmt: skip
"""By the name that ``dtn-fast ablate`` takes.  Where the paper does not say whether a variant was distilled: the rows
whose full model prints the distilled DTN's figures are (*choice*)."""
GENERATIONS: dict[str, tuple[tuple[float, ...], ...]] = {
    "DTN": ((95.20, 99.17, 64.23, 73.72, 70.39, 78.01, 68.03, 75.36, 85.06, 94.83),
            (95.91, 99.55, 66.03, 74.81, 70.71, 78.72, 67.02, 76.68, 85.48, 96.34),
            (96.14, 99.69, 66.17, 75.12, 70.93, 79.90, 71.35, 78.54, 86.52, 97.53),
            (97.13, 99.70, 66.68, 75.32, 72.13, 80.01, 71.24, 78.77, 87.32, 97.60),
            (97.35, 99.81, 65.32, 74.05, 72.01, 79.83, 70.36, 78.42, 87.23, 97.54)),
    "Xception": ((94.08, 96.51, 54.24, 65.86, 58.77, 66.95, 54.76, 67.03, 76.84, 85.20),
                 (95.80, 97.56, 57.57, 66.53, 60.08, 67.44, 58.93, 71.67, 78.43, 86.65),
                 (95.74, 97.52, 58.99, 66.47, 59.97, 67.21, 59.68, 73.29, 77.55, 86.03),
                 (95.77, 97.43, 60.81, 67.36, 60.10, 66.89, 61.60, 74.16, 77.92, 85.92),
                 (95.61, 97.45, 59.50, 66.15, 59.98, 66.63, 60.51, 73.82, 77.01, 85.84)),
    "EViT": ((88.26, 96.14, 49.00, 62.47, 64.78, 70.12, 66.67, 70.60, 80.75, 90.50),
             (89.50, 96.85, 47.02, 63.36, 64.75, 70.91, 67.83, 74.05, 81.04, 90.76),
             (89.77, 97.19, 49.88, 63.86, 64.68, 70.55, 69.24, 75.51, 80.87, 90.87),
             (89.83, 97.31, 50.16, 62.26, 65.93, 71.00, 70.95, 77.95, 79.19, 88.86),
             (90.07, 97.52, 49.08, 62.56, 63.68, 70.85, 70.03, 77.62, 80.88, 90.31)),
}  # fmt: skip
"""Table 10: teacher, then students 1 to 4."""


def configure(variant: Variant, model: DTNConfig, recipe: Recipe) -> tuple[DTNConfig | TimmConfig, Recipe]:
    """The variant's model and recipe, on top of given ones.  Raises UsageError as their classes do."""
    changed = dataclasses.replace(recipe, **variant.recipe)
    if "timm" in variant.model:
        return TimmConfig(variant.model["timm"], model.image_size, margin=model.margin), changed
    return dataclasses.replace(model, **variant.model), changed


def variants_of(name: str, forgeries: tuple[str, ...]) -> tuple[Variant, ...]:
    """The variants of ABLATIONS[name]; by forgery: one for each that is trained on.  Raises UsageError on no name."""
    if name not in ABLATIONS:
        raise UsageError(f"unknown ablation {name!r}; there are {', '.join(ABLATIONS)}")
    ablation = ABLATIONS[name]
    if not ablation.by_forgery:
        return ablation.variants
    found = []
    for variant in ablation.variants:
        for forgery in forgeries:
            short = FF_NAMES.get(forgery, forgery)
            printed = {c: Pair(None, auc) for c, auc in TABLE2[variant.name].get(short, {}).items()}
            recipe = {**variant.recipe, "methods": (forgery,), "real_repeat": 0}  # one fake to a real already
            found.append(dataclasses.replace(variant, recipe=recipe, paper=printed, trained_on=short))
    return tuple(found)

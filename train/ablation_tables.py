"""The variants of the paper's tables."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from dtn_fast.errors import UsageError
from dtn_fast.evaluation.paper_numbers import (
    FF_NAMES,
    TABLE1,
    TABLE2,
    TABLE3,
    TABLE4,
    TABLE5,
    TABLE6,
    TABLE6_SIZES,
    TABLE7,
    TABLE8,
    TABLE8_OWN_SIZES,
    TABLE8_SIZES,
    TABLE9,
    TABLE9_SIZES,
    TABLE10,
    PaperValues,
)
from dtn_fast.evaluation.protocols import table_2
from dtn_fast.evaluation.tables import PaperRow
from dtn_fast.model.build import publishes_weights, timm_config
from dtn_fast.model.config import Adaptation, DTNConfig, TimmConfig
from dtn_fast.model.pretrained import weights_of
from dtn_fast.train.config import FOUNDATION, BaselineConfig, Recipe


@dataclass(frozen=True)
class Variant:
    """A row of a table: changes to the model and to the recipe, and the paper's values."""

    name: str
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Changed fields of DTNConfig; or ``{"timm": NAME}`` for another detector, with the fields of its Adaptation."""
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Changed fields of Recipe."""
    untaught: bool = False
    """Whether students learn without their teacher: the KD term's weight is 0, everything else stays (a control)."""
    distil: bool = False
    """Whether to distil the model too; its best student on validation is measured."""
    every_generation: bool = False
    """Whether to measure every generation, with a row for each."""
    paper: PaperValues = dataclasses.field(default_factory=dict)
    size: tuple[float, float] | None = None
    """The paper's millions of parameters and GMACs; None if its table lacks them."""
    trained_on: str = ""
    """The single forgery to train on, in the paper's short form; empty: all forgeries."""

    @property
    def label(self) -> str:
        """Unique name within the table."""
        return f"{self.name} on {self.trained_on}" if self.trained_on else self.name


class Ablation(NamedTuple):
    title: str
    variants: tuple[Variant, ...]
    by_forgery: bool = False
    """Whether each variant is trained on each forgery alone and tested on every forgery."""
    cost: bool = False
    """Whether the table shows what each model costs, and a chart its AUC against that."""


CE, CE_CENTER = (1.0, 0.0), (1.0, 1.0)
PLAIN = {"num_experts": 0, "mas": False}
UNSCALED = {"mas": False, "expert_scales": False}
ADAPTED = {"pretrained": True, "lr": 2e-4}
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
    "components": Ablation("Components (Table 3)", tuple(
        Variant(name, model, paper=TABLE3[name], distil=True) for name, model in (
            ("Baseline", {"depth": 0, **PLAIN}), ("Baseline+LEVT", PLAIN), ("Baseline+LEVT+MoE", UNSCALED),
            ("Baseline+LEVT+MoE*", {"mas": False}), ("Baseline+LEVT*+MoE", {"expert_scales": False}),
            ("Baseline+LEVT+MoE+MAS", {}),
        )
    )),
    "soft-labels": Ablation("Soft labels (Table 4)", (
        Variant("DTN w/o STG", paper=TABLE4["DTN w/o STG"]),
        Variant("DTN w/ STG", distil=True, paper=TABLE4["DTN w/ STG"]),
    )),
    "losses": Ablation("Losses (Table 5)", (
        Variant("CE loss", recipe={"initial_weights": CE}, paper=TABLE5["CE loss"]),
        Variant("KD + CE loss", recipe={"initial_weights": CE, "weights": (4.0, 0.4, 0.0)}, distil=True,
                paper=TABLE5["KD + CE loss"]),
        Variant("Ct-c + CE loss", paper=TABLE5["Ct-c + CE loss"]),
        Variant("DSD loss", distil=True, paper=TABLE5["DSD loss"]),
    )),
    "local-connection": Ablation("Local connection (Table 6)", tuple(
        Variant(name, {"local_connection": connected}, distil=True, paper=TABLE6[name], size=TABLE6_SIZES[name])
        for name, connected in (("DTN w/o LC", False), ("DTN w/ LC", True))
    )),
    "moe": Ablation("Expert gate without transformer blocks (Table 7)", (
        Variant("Vanilla MoE", {"gate": "vanilla", "depth": 0, "noise": "none", "expert_scales": False},
                paper=TABLE7["Vanilla MoE"]),
        Variant("Ours", {"depth": 0}, paper=TABLE7["Ours"]),
    )),
    "mas": Ablation("MAS and Re-attention in other transformers (Table 8)", (*(
        Variant(title + end, {"timm": name + suffix}, paper=TABLE8[title + end], size=TABLE8_SIZES[name + suffix])
        for title, name in (("ViT", "vit_b16"), ("CViT", "cvit"), ("EViT", "efficient_vit"),
                            ("CEViT", "cross_efficient_vit"))
        for end, suffix in (("", ""), (" w/ Re-att", "_reattention"), (" w/ MAS", "_mas"))
    ), *(
        Variant(name, model, distil=True, paper=TABLE8[name], size=TABLE8_OWN_SIZES[name]) for name, model in (
            ("Ours", UNSCALED), ("Ours w/ Re-att", {**UNSCALED, "reattention": True}), ("Ours w/ MAS", {}),
        )
    ))),
    "depth": Ablation("Transformer blocks (Table 9)", tuple(
        Variant(name, {"depth": int(name.removeprefix("L="))}, distil=True, paper=row, size=TABLE9_SIZES[name])
        for name, row in TABLE9.items()
    )),
    "generations": Ablation("Generations of self-distillation (Table 10)", (
        Variant("DTN", distil=True, every_generation=True, recipe={"min_generations": 4, "generations": 4}),
        Variant("DTN without a teacher", distil=True, every_generation=True, untaught=True,
                recipe={"min_generations": 4, "generations": 4}),
        Variant("Xception", {"timm": "legacy_xception"}, distil=True, every_generation=True,
                recipe={"min_generations": 4, "generations": 4}),
        Variant("EViT", {"timm": "efficient_vit"}, distil=True, every_generation=True,
                recipe={"min_generations": 4, "generations": 4}),
    )),
    "noise": Ablation("Noise on the gate's input (Figure 6a)", (*(
        Variant(name, {"noise": kind}) for name, kind in (
            ("Gaussian noise", "gaussian"), ("Gaussian blur", "blur"), ("compression", "compression"),
            ("contrast", "contrast"), ("none", "none"),
        )
    ), *(
        Variant(f"Gaussian noise of std {std:g}", {"noise": "gaussian", "noise_std": std})
        for std in (0.1, 0.3, 3.0, 10.0)
    ))),
    "center-dimension": Ablation("Input of Ct-c (Figure 6b)", (
        Variant("vanilla Ct-c", recipe={"center_on": "features"}),
        Variant("low-dimensional Ct-c"),
    )),
    "backbones": Ablation("Other backbones (Figure 6c), and pretrained transformers", (*(
        variant for name in ("vgg", "resnet34", "resnet50", "efficientnet_b0", "efficientnet_b4") for variant in (
            Variant(name, {"backbone": name, "depth": 0, **PLAIN}),
            Variant(f"{name} + ours", {"backbone": name}),
        )
    ), *(
        variant for name, timm in FOUNDATION.items() for variant in (
            Variant(f"{name} LoRA", {"timm": timm, "adapt": "lora"}, ADAPTED),
            Variant(f"{name} Effort", {"timm": timm, "adapt": "effort"}, ADAPTED),
            Variant(f"{name} Effort + ours", {"timm": timm, "adapt": "effort", "mas": True}, {**ADAPTED,
                    "initial_weights": CE_CENTER}, distil=True),
        )
    )), cost=True),
    "limitations": Ablation("Wrong and ambiguous samples (the paper's limitations)", (
        Variant("DSD", distil=True),
        *(Variant(f"DSD, {name}", recipe=how, distil=True) for name, how in (
            ("focal weights", {"error_weights": "focal"}), ("boosted weights", {"error_weights": "boosted"}),
            ("more of the ambiguous", {"ambiguous": 0.2}),
            ("focal weights, more of the ambiguous", {"error_weights": "focal", "ambiguous": 0.2}),
        )),
    )),
    "experts": Ablation("Number of experts, with and without noise (Figure 6d)", tuple(
        Variant(f"n={experts}{title}", {"num_experts": experts, "noise": noise})
        for noise, title in (("gaussian", ""), ("none", " without noise")) for experts in range(1, 8)
    )),
}  # fmt: skip
"""Ablations by their name in ``dtn-fast ablate``.  Where the paper does not say whether a variant was distilled, it is
distilled if the full model of its table has the distilled DTN's printed values (*choice*)."""


def configure(
    variant: Variant, model: DTNConfig, recipe: Recipe, baselines: BaselineConfig = BaselineConfig()
) -> tuple[DTNConfig | TimmConfig, Recipe]:
    """``model`` and ``recipe`` with the variant's changes.  A detector of timm is trained by CE alone, as published,
    unless ``baselines`` says otherwise, and begins with published weights if the recipe asks for them and it has such.

    Raises UsageError when a changed value is invalid.
    """
    name = variant.model.get("timm", "")
    pairs = tuple(pair for pair in recipe.pretrained_from if name and pair.startswith(f"{weights_of(name)}="))
    published = recipe.pretrained and bool(name and (pairs or publishes_weights(name)))
    losses = {"initial_weights": CE} if name and baselines.baseline_losses == "published" else {}
    begin = {"pretrained": published, "pretrained_from": pairs}
    changed = dataclasses.replace(recipe, **{**losses, **begin, **variant.recipe})
    if variant.untaught:
        ce, _, center = changed.weights
        changed = dataclasses.replace(changed, weights=(ce, 0.0, center))
    if name:
        adaptation = Adaptation(**{k: v for k, v in variant.model.items() if k != "timm"})
        return dataclasses.replace(timm_config(name, model.image_size, model.crop), adaptation=adaptation), changed
    return dataclasses.replace(model, **variant.model), changed


def variants_of(name: str, forgeries: tuple[str, ...]) -> tuple[Variant, ...]:
    """Variants of ABLATIONS[name]; in a table by forgery, one for each model and training forgery.

    Raises UsageError on an unknown name.
    """
    if name not in ABLATIONS:
        raise UsageError(f"unknown ablation {name!r}; there are {', '.join(ABLATIONS)}")
    ablation = ABLATIONS[name]
    if not ablation.by_forgery:
        return ablation.variants
    found = []
    for variant in ablation.variants:
        for forgery in forgeries:
            short = FF_NAMES.get(forgery, forgery)
            printed = TABLE2.get(short, {}).get(variant.name, {})
            recipe = {**variant.recipe, "methods": (forgery,), "real_repeat": 0}  # the classes are balanced already
            found.append(dataclasses.replace(variant, recipe=recipe, paper=printed, trained_on=short))
    return tuple(found)


def printed_rows(name: str) -> list[PaperRow]:
    """Every row of the table that ABLATIONS[name] is of, also those of models that nothing here trains, named as the
    rows measured here are."""
    if name == "cross-dataset":
        return [PaperRow(model, row) for model, row in TABLE1.items()]
    if name == "cross-manipulation":
        return table_2()
    if name == "generations":
        return [
            PaperRow(generation_name(model, g), row) for model, rows in TABLE10.items() for g, row in enumerate(rows)
        ]
    return [PaperRow(v.name, v.paper, after=dict(zip(SIZE, map("{:.3f}".format, v.size or ()), strict=False)))
            for v in ABLATIONS[name].variants]  # fmt: skip


SIZE = ("M params", "GMAC")
"""Titles of the columns with a model's size."""


def generation_name(model: str, generation: int) -> str:
    """Name of a generation's row in Table 10."""
    return f"{model}-Student {generation}" if generation else f"{model}-Teacher"

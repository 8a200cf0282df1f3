"""Every ablation by name: its variants can be made and differ as the paper says, one of each kind trains."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import RECIPE, SMALL, changed

from dtn_fast import DTN
from dtn_fast.config import NOISES
from dtn_fast.counting import count
from dtn_fast.data.shards import Shards
from dtn_fast.detectors import TimmConfig, build_detector
from dtn_fast.errors import UsageError
from dtn_fast.losses import contrastive_center, initial_loss
from dtn_fast.moe import MoEGate, disturb
from dtn_fast.train.ablations import ABLATIONS, ablate, configure, folder_of, table
from dtn_fast.train.recipe import Execution, Recipe
from dtn_fast.train.step import TrainStep

QUICK = changed(RECIPE, epochs=1, generations=1, min_generations=0)


def finish(steps: Generator[Any, None, Any]) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def test_no_two_ablations_share_a_run() -> None:
    folders = [folder_of(Path("x", name), v) for name, ablation in ABLATIONS.items() for v in ablation.variants]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_variant_can_be_made(name: str) -> None:
    variants = ABLATIONS[name].variants
    assert len({v.name for v in variants}) == len(variants)
    assert len({folder_of(Path("x"), v) for v in variants}) == len(variants)
    for variant in variants:
        config, recipe = configure(variant, SMALL, Recipe())
        if isinstance(config, TimmConfig):
            assert config.timm == variant.model["timm"]
        elif config.backbone == "vgg":
            assert DTN(config).eval()(torch.randn(1, 3, 64, 64)).shape == (1, 2)
        assert isinstance(recipe, Recipe)
        assert all(0 < value <= 100 for pair in variant.paper.values() for value in pair if value is not None)


def test_components_are_the_papers() -> None:
    parts = {v.name: configure(v, SMALL, Recipe())[0] for v in ABLATIONS["components"].variants}
    has = {
        name: (c.depth > 0, c.num_experts > 0, c.num_experts > 0 and c.expert_scales, c.depth > 0 and c.mas)
        for name, c in parts.items() if not isinstance(c, TimmConfig)
    }  # fmt: skip
    assert has == {
        "Baseline": (False, False, False, False),
        "Baseline+LEVT": (True, False, False, False),
        "Baseline+LEVT+MoE": (True, True, False, False),
        "Baseline+LEVT+MoE*": (True, True, True, False),
        "Baseline+LEVT*+MoE": (True, True, False, True),
        "Baseline+LEVT+MoE+MAS": (True, True, True, True),
    }
    paper = {v.name: configure(v, dataclasses.replace(DTN().config), Recipe())[0] for v in ABLATIONS["depth"].variants}
    millions = [round(count(c).layer_parameters / 1e6, 3) for c in paper.values() if not isinstance(c, TimmConfig)]
    assert millions == [23.590, 26.751, 29.912, 33.073]


SOME = {
    "mas": ("CViT w/ Re-att",),
    "backbones": ("efficientnet_b0 + ours",),
    "experts": ("n=1", "n=7 without noise"),
    "depth": ("L=4",),
    "components": ("Baseline", "Baseline+LEVT*+MoE"),
}
"""Variants that stand for their ablation here, where all would take minutes; the others run whole."""


@pytest.mark.parametrize("name", [name for name in ABLATIONS if name != "generations"])
def test_an_ablation_trains_measures_and_resumes(name: str, shards: Shards, tmp_path: Path) -> None:
    only = SOME.get(name, ())
    how: dict[str, Any] = {"device": "cpu", "execution": Execution()}
    steps = lambda: ablate(name, shards, {"FF++": shards}, tmp_path, SMALL, QUICK, only, **how)
    rows = finish(steps())
    assert [row["variant"] for row in rows] == [v.name for v in ABLATIONS[name].variants if not only or v.name in only]
    header, body = table(rows)
    assert header == ["variant", "validation AUC", "FF++ ACC", "FF++ AUC"]
    printed = next(v for v in ABLATIONS[name].variants if v.name == rows[0]["variant"]).paper.get("FF++")
    assert (f"[{printed.auc:.2f}]" in body[0][3]) if printed else "[" not in body[0][3]
    assert json.loads((tmp_path / f"{name}.json").read_text())["rows"] == json.loads(json.dumps(rows))
    assert "synthetic faces" in (tmp_path / f"{name}.md").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    assert finish(steps()) == rows
    assert {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")
    } == stamps  # not trained again


def test_generations_give_a_row_each_and_other_models_run(shards: Shards, tmp_path: Path) -> None:
    two = dataclasses.replace(QUICK, generations=1)
    only = ("DTN",)
    original = ABLATIONS["generations"].variants[0]
    short = dataclasses.replace(original, recipe={"generations": 1, "min_generations": 1})
    ABLATIONS["generations"] = ABLATIONS["generations"]._replace(
        variants=(short, *ABLATIONS["generations"].variants[1:])
    )
    try:
        rows = finish(ablate("generations", shards, {"DFD": shards}, tmp_path, SMALL, two, only, device="cpu"))
    finally:
        ABLATIONS["generations"] = ABLATIONS["generations"]._replace(
            variants=(original, *ABLATIONS["generations"].variants[1:])
        )
    assert [row["variant"] for row in rows] == ["DTN-Teacher", "DTN-Student 1"]
    assert rows[1]["paper"]["DFD"] == {"acc": 85.48, "auc": 96.34}
    with pytest.raises(UsageError, match="unknown ablation 'x'; there are components"):
        finish(ablate("x", shards, {}, tmp_path, SMALL, QUICK))
    with pytest.raises(UsageError, match="--only Nothing: moe has Vanilla MoE, Ours"):
        finish(ablate("moe", shards, {}, tmp_path, SMALL, QUICK, ("Nothing",)))


def test_the_vanilla_gate_by_its_formula() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, gate="vanilla", num_experts=3, expert_scales=False)
    gate = MoEGate(config).eval()
    x = torch.randn(2, 64, 4, 4)
    assert gate.router is not None
    hidden = [torch.einsum("mc,bchw->bmhw", gate.w1[e], x) + gate.b1[e][:, None, None] for e in range(3)]
    experts = [(torch.einsum("m,bmhw->bhw", gate.w2[e], h.relu()) + gate.b2[e]).sigmoid() for e, h in enumerate(hidden)]
    weights = gate.router(x.mean((2, 3))).softmax(1)
    expected = x * torch.sigmoid(sum(weights[:, e, None, None] * a for e, a in enumerate(experts)))[:, None]
    torch.testing.assert_close(gate(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in NOISES if kind != "none"])
def test_disturbances_disturb_and_pass_gradients(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    y = disturb(x, kind, 0.1)
    assert y.shape == x.shape
    assert 0 < float((y - x).abs().mean()) < 0.5
    assert torch.allclose(disturb(x, kind, 0.0), x, atol=1e-5)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    gate = MoEGate(dataclasses.replace(SMALL, noise=kind, noise_std=0.1)).train()
    features = torch.randn(2, 64, 2, 2)
    assert not torch.equal(gate(features), gate(features))
    assert torch.equal(gate.eval()(features), gate(features))


def test_losses_by_weight_and_by_features(shards: Shards) -> None:
    torch.manual_seed(0)
    logits, points, labels = torch.randn(4, 2), torch.randn(4, 7), torch.tensor([0, 1, 1, 0])
    centers = torch.randn(2, 7)
    found = initial_loss(logits, labels, centers, 1.0, (2.0, 0.5), points)
    assert found["loss"] == pytest.approx(float(2 * found["ce"] + 0.5 * found["center"]))
    assert found["center"] == pytest.approx(float(contrastive_center(points, labels, centers)))
    recipe = changed(QUICK, center_on="features")
    step = TrainStep(DTN(SMALL), recipe, Execution(), torch.device("cpu"))
    assert step.centers.shape == (2, 64)
    before = step.centers.detach().clone()
    rows = shards.select("train")[:8]
    step.set_epoch(0)
    outcome = step(torch.from_numpy(shards.get(rows)), torch.from_numpy(shards.labels[rows]))
    assert outcome.values.isfinite().all()
    assert not torch.equal(step.centers, before)
    with pytest.raises(UsageError, match="--center-on features: only a DTN"):
        TrainStep(build_detector(TimmConfig("resnet10t", 64)), recipe, Execution(), torch.device("cpu"))
    with pytest.raises(UsageError, match="initial_weights"):
        Recipe(initial_weights=(-1.0, 0.0))

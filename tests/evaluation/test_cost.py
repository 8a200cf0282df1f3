"""Costs of models: counts by formula, and the rate's place in a table and its chart."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small import SMALL

from dtn_fast import DTN
from dtn_fast.evaluation.cost import cost_of, gmacs_of
from dtn_fast.evaluation.mac_count import count
from dtn_fast.evaluation.tables import Cell, ResultTable, TableRow
from dtn_fast.model.build import build_detector, timm_config
from dtn_fast.model.config import Adaptation
from dtn_fast.model.fold import frozen


def test_a_vits_products_by_their_formula() -> None:
    """Patches, projections, attention's two products, MLPs and head of a ViT-Ti/16 at 224 pixels."""
    n, c = 197, 192
    block = n * (c * 3 * c + c * c + 2 * c * 4 * c) + 2 * n * n * c
    expected = (196 * 768 * c + 12 * block + c * 2) / 1e9
    for how in (Adaptation(), Adaptation("lora"), Adaptation("effort", mas=True)):
        model = build_detector(dataclasses.replace(timm_config("vit_tiny_patch16_224", 224), adaptation=how)).eval()
        assert gmacs_of(model, frozen(model)) == pytest.approx(expected, rel=1e-9), how


def test_costs_of_a_dtn() -> None:
    model = DTN(SMALL).eval()
    found, known = cost_of(model), count(SMALL)
    assert found.gmacs == (known.macs + known.attention_macs) / 1e9
    assert found.trained == found.parameters == known.parameters
    assert found.images_per_second > 0
    assert "float32" in found.where
    assert all(p.requires_grad for p in model.parameters()), "the model can go on in training"


def test_an_adaptation_is_counted_as_trained_and_not_as_parameters() -> None:
    config = timm_config("vit_tiny_patch16_224", 64)
    plain = cost_of(build_detector(config).eval())
    few = cost_of(build_detector(dataclasses.replace(config, adaptation=Adaptation("lora", 4))).eval())
    assert few.parameters == plain.parameters == plain.trained
    assert few.trained == 2 * 193 + 12 * 4 * 4 * (192 + 192)


def test_a_chart_of_auc_against_cost() -> None:
    torch.manual_seed(0)
    cells = lambda auc: {level: {"A": Cell(0.5, auc, (0.6, 0.9))} for level in ("frame", "video")}
    rows = [TableRow(name, cells(auc), after={"GMAC": (cost, "")})  # type: ignore[arg-type]
            for name, auc, cost in (("one", 0.7, "0.150"), ("two", None, "81.1"))]  # fmt: skip
    chart = ResultTable("x", "title", ("A",), rows, cost="GMAC").cost_chart()
    assert chart.startswith("<?xml")
    assert "one" in chart
    assert "GMAC per image" in chart
    assert "two" not in chart, "not measured"

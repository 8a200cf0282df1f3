"""The paper's printed numbers against each other and against the differences that its text states."""

from __future__ import annotations

import itertools

import pytest

from dtn_fast.evaluation.paper_numbers import (
    DATASETS,
    FORGERIES,
    TABLE1,
    TABLE2,
    TABLE3,
    TABLE4,
    TABLE5,
    TABLE7,
    TABLE8,
    TABLE8_OWN_SIZES,
    TABLE8_SIZES,
    TABLE9,
    TABLE9_SIZES,
    TABLE10,
    PaperValues,
)

OURS = TABLE1["DTN"]
STATED: list[tuple[PaperValues, PaperValues, str, str, float]] = [
    (OURS, TABLE1["CViT"], "FF++", "auc", 3.0),
    (OURS, TABLE1["EfficientViT"], "FF++", "auc", 3.6),
    (OURS, TABLE1["CrossEfficientViT"], "FF++", "auc", 1.4),
    (OURS, TABLE1["RECCE"], "Celeb-DF", "auc", 6.6),
    (OURS, TABLE1["EfficientViT"], "DF-1.0", "auc", 8.1),
    (OURS, TABLE1["CrossEfficientViT"], "DF-1.0", "auc", 11.2),
    (OURS, TABLE1["NACO"], "DFDC", "auc", 3.3),
    (OURS, TABLE1["Guan et al."], "DFDC", "auc", 5.4),
    (TABLE3["Baseline+LEVT"], TABLE3["Baseline"], "FF++", "acc", 1.0),
    (TABLE3["Baseline+LEVT"], TABLE3["Baseline"], "FF++", "auc", 0.6),
    (TABLE3["Baseline+LEVT+MoE"], TABLE3["Baseline+LEVT"], "FF++", "auc", 0.9),
    (TABLE3["Baseline+LEVT+MoE+MAS"], TABLE3["Baseline+LEVT+MoE"], "FF++", "acc", 2.3),
    (TABLE3["Baseline+LEVT+MoE+MAS"], TABLE3["Baseline+LEVT+MoE"], "FF++", "auc", 0.8),
    (TABLE3["Baseline+LEVT+MoE+MAS"], TABLE3["Baseline"], "FF++", "acc", 5.1),
    (TABLE3["Baseline+LEVT+MoE+MAS"], TABLE3["Baseline"], "FF++", "auc", 2.3),
    (TABLE4["DTN w/ STG"], TABLE4["DTN w/o STG"], "DF-1.0", "auc", 3.4),
    (TABLE5["Ct-c + CE loss"], TABLE5["CE loss"], "DF-1.0", "auc", 7.6),  # "nearly 8%"
    (TABLE8["ViT w/ MAS"], TABLE8["ViT"], "DF-1.0", "auc", 1.1),
    (TABLE8["CEViT w/ MAS"], TABLE8["CEViT"], "DF-1.0", "auc", 1.8),
    (TABLE10["DTN"][1], TABLE10["DTN"][0], "Celeb-DF", "auc", 1.1),
    (TABLE10["DTN"][1], TABLE10["DTN"][0], "DFDC", "auc", 0.7),
    (TABLE10["DTN"][1], TABLE10["DTN"][0], "DF-1.0", "auc", 1.3),
    (TABLE10["DTN"][1], TABLE10["DTN"][0], "DFD", "auc", 1.5),
    (TABLE10["DTN"][2], TABLE10["DTN"][1], "DF-1.0", "auc", 1.8),
]
"""Differences that the text states, in percent; it cuts some off and rounds others."""


def test_the_text_states_the_differences_of_the_rows() -> None:
    for higher, lower, dataset, metric, stated in STATED:
        found = getattr(higher[dataset], metric) - getattr(lower[dataset], metric)
        assert found == pytest.approx(stated, abs=0.0999), (dataset, metric, stated)
    wrong = OURS["DFDC"].auc - TABLE1["Yu et al."]["DFDC"].auc
    assert wrong == pytest.approx(10.78)  # the text says 11.8
    sizes = list(TABLE9_SIZES.values())
    for (smaller, less), (larger, more) in itertools.pairwise(sizes):
        assert (larger - smaller, more - less) == pytest.approx((3.161, 0.203))  # of each further block


def test_the_text_ranks_the_rows_as_they_are() -> None:
    """Trained on F2F or NT the DTN is "the best among all approaches" in the mean, on DF or FS among the "top two"."""
    for on, places in (("F2F", 1), ("NT", 1), ("DF", 2), ("FS", 2)):
        full = {name: row for name, row in TABLE2[on].items() if len(row) == len(FORGERIES)}
        means = {name: sum(pair.auc or 0 for pair in row.values()) / len(row) for name, row in full.items()}
        assert "DTN" in sorted(means, key=lambda name: -means[name])[:places], (on, means)
    ours = {forgery: TABLE2[forgery]["DTN"] for forgery in FORGERIES}
    assert ours["DF"]["FS"].auc < TABLE2["DF"]["Face X-ray"]["FS"].auc  # "a little bit lower than Face X-ray"
    assert ours["FS"]["FS"].auc < TABLE2["FS"]["SOLA"]["FS"].auc  # "and SOLA, respectively"
    assert max(TABLE9, key=lambda depth: TABLE9[depth]["FF++"].auc or 0) == "L=6"
    assert [len(rows) for rows in TABLE10.values()] == [5, 5, 5]
    assert max(range(5), key=lambda g: TABLE10["DTN"][g]["DFDC"].auc or 0) == 3  # "we chose student 3"
    gate, vanilla = TABLE7["Ours"], TABLE7["Vanilla MoE"]
    assert all(gate[dataset].auc > vanilla[dataset].auc for dataset in DATASETS)


def test_every_printed_row_is_there() -> None:
    assert len(TABLE1) == 16
    assert {on: len(rows) for on, rows in TABLE2.items()} == dict.fromkeys(FORGERIES, 7)
    assert len(TABLE8) == len(TABLE8_SIZES) + len(TABLE8_OWN_SIZES) == 15
    rows = [row for table in (TABLE1, *TABLE2.values(), TABLE8) for row in table.values()]
    for row in [*rows, *itertools.chain(*TABLE10.values())]:
        assert set(row) <= {*DATASETS, *FORGERIES}
        values = [[value for value in pair if value is not None] for pair in row.values()]
        assert all(values), "no pair without a value"
        assert all(30 < value <= 100 for pair in values for value in pair)

"""The paper's protocols: what is measured, in its layout, its own figures beside."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small import SMALL

from dtn_fast import DTN, paper
from dtn_fast.data.shards import Shards
from dtn_fast.errors import UsageError
from dtn_fast.evaluate import evaluate
from dtn_fast.protocols import Protocol, cross_dataset, cross_manipulation, names_of
from dtn_fast.runtime import TorchScorer


def result(steps: Iterator[Protocol | str]) -> tuple[Protocol, list[str]]:
    *said, last = list(steps)
    assert isinstance(last, Protocol)
    return last, [str(s) for s in said]


@pytest.fixture
def scorers() -> dict[str, TorchScorer]:
    made = {}
    for seed, name in enumerate(("DTN", "a_b & c")):
        torch.manual_seed(seed)
        made[name] = TorchScorer(DTN(SMALL).eval())
    return made


def lazily(scorers):
    return {name: (lambda s=s: s) for name, s in scorers.items()}


def test_table_1(scorers, shards: Shards, tmp_path: Path) -> None:
    found, said = result(cross_dataset(lazily(scorers), {"FF++": shards, "my_set": shards}))
    assert said[0] == "DTN on FF++"
    assert len(said) == 4
    expected = evaluate(scorers["DTN"], shards, groups={"all": shards.methods}).rows[0]
    for level, metrics, interval in (("frame", expected.frame, expected.frame_interval),
                                     ("video", expected.video, expected.video_interval)):  # fmt: skip
        cell = found.cells[level]["DTN"]["FF++"]
        assert (cell.acc, cell.auc, cell.interval) == (metrics.acc, metrics.auc, interval)
    header, rows = found.table("frame")
    assert header == ["model", "FF++ ACC", "FF++ AUC", "my_set ACC", "my_set AUC"]
    assert rows[0][2].startswith(f"{100 * (expected.frame.auc or 0):.2f} (")
    assert ["DTN (the paper's figures)", "97.13", "99.70", "-", "-"] in rows
    made = found.write(tmp_path / "table1")
    assert [path.name for path in made] == ["table1.json", "table1.md", "table1.tex"]
    text = made[2].read_text()
    assert text.count(r"\begin{tabular}{lcccc}") == 2  # both levels
    assert r"a\_b \& c & " in text
    assert r"\multicolumn{2}{c}{my\_set}" in text
    assert r"DTN$^{\ast}$ & 97.13 & 99.70 & - & - \\" in text
    assert text.count("{") == text.count("}")
    stored = json.loads(made[0].read_text())
    assert stored["cells"]["video"]["DTN"]["FF++"]["auc"] == expected.video.auc
    assert "10 videos" in made[1].read_text()


def test_table_2(scorers, shards: Shards) -> None:
    renamed = dict(zip(shards.methods, ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures"), strict=True))
    videos = [v._replace(method=renamed.get(v.method, "")) for v in shards.videos]
    ff = dataclasses.replace(shards, videos=videos)
    found, _ = result(cross_manipulation({"DF": lambda: scorers["DTN"]}, ff))
    header, rows = found.table("video")
    assert header == ["model", "DF AUC", "F2F AUC", "FS AUC", "NT AUC"]
    one = evaluate(scorers["DTN"], ff, groups={"FaceSwap": ("FaceSwap",)}).rows[0]
    assert found.cells["video"]["DF"]["FS"].auc == one.video.auc
    assert ["DTN, trained on DF (the paper's figures)", "100.00", "97.23", "74.26", "98.53"] in rows
    assert "trained on F2F" not in str(rows)
    assert r"Training set & DF & F2F & FS & NT \\" in found.latex("frame")


def test_the_papers_figures_are_in_range_and_named_alike() -> None:
    for row in paper.TABLE1.values():
        assert set(row) <= set(paper.DATASETS)
        assert all(v is None or 0 < v <= 100 for pair in row.values() for v in pair)
    for table in paper.TABLE2.values():
        assert set(table) == set(paper.FORGERIES) == set(table["DF"])


def test_names() -> None:
    paths = [Path("a/run"), Path("b/run")]
    assert names_of(paths, (), "x") == ["a/run", "b/run"]
    assert names_of([Path("a/one"), Path("b/two")], (), "x") == ["one", "two"]
    assert names_of(paths, ("p", "q"), "x") == ["p", "q"]
    with pytest.raises(UsageError, match="--x: 1 names for 2"):
        names_of(paths, ("p",), "x")
    with pytest.raises(UsageError, match="each must be named once"):
        names_of(paths, ("p", "p"), "x")

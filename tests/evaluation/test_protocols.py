"""The paper's protocols: what is measured, in its layout, its own figures beside."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from small import SMALL

from dtn_fast import DTN
from dtn_fast.data.blend import self_blended
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.config import EvaluateConfig, RobustnessConfig
from dtn_fast.evaluation.evaluate import evaluate
from dtn_fast.evaluation.paper_numbers import Pair
from dtn_fast.evaluation.protocols import Entry, cross_dataset, cross_manipulation, evaluate_models, names_of, within
from dtn_fast.evaluation.robustness import robustness
from dtn_fast.evaluation.tables import Cell, ResultTable, TableRow
from dtn_fast.model.config import TrainedOn
from dtn_fast.runtime.torch_scorer import TorchScorer


def result(steps: Iterator[str | ResultTable]) -> tuple[ResultTable, list[str]]:
    *said, last = list(steps)
    assert isinstance(last, ResultTable)
    return last, [str(s) for s in said]


@pytest.fixture
def scorers() -> dict[str, TorchScorer]:
    made = {}
    for seed, name in enumerate(("DTN", "a_b & c")):
        torch.manual_seed(seed)
        made[name] = TorchScorer(DTN(SMALL).eval())
    return made


def entries(scorers: dict[str, TorchScorer]) -> list[Entry]:
    return [Entry(name, scorer) for name, scorer in scorers.items()]


def test_table_1(scorers: dict[str, TorchScorer], dataset: CropDataset, tmp_path: Path) -> None:
    found, said = result(cross_dataset(entries(scorers), {"FF++": dataset, "my_set": dataset}))
    assert said[0] == "DTN on FF++"
    assert len(said) == 4
    expected = evaluate(scorers["DTN"], dataset, groups={"all": dataset.methods}).rows[0]
    for level, metrics, interval in (("frame", expected.frame, expected.frame_interval),
                                     ("video", expected.video, expected.video_interval)):  # fmt: skip
        assert found.rows[0].cells[level]["FF++"] == Cell(metrics.acc, metrics.auc, interval)
    header, rows = found.text("frame")
    assert header == ["model", "FF++ ACC", "FF++ AUC", "my_set ACC", "my_set AUC"]
    assert rows[0][2].startswith(f"{100 * (expected.frame.auc or 0):.2f} (")
    assert ["DTN (the paper's values)", "97.13", "99.70", "-", "-"] in rows
    assert ["RECCE (the paper's values)", "97.06", "99.32", "-", "-"] in rows
    assert len(rows) == 2 + 16  # every row of the paper's table
    made = found.write(tmp_path / "table1")
    assert [path.name for path in made] == ["table1.json", "table1.md", "table1.tex", "table1.svg"]
    text = made[2].read_text()
    assert text.count(r"\begin{tabular}{lcccc}") == 2  # both levels
    assert r"a\_b \& c & " in text
    assert r"\multicolumn{2}{c}{my\_set}" in text
    assert r"DTN$^{\ast}$ & 97.13 & 99.70 & - & - \\" in text
    assert text.count("{") == text.count("}")
    stored = json.loads(made[0].read_text())
    assert stored["rows"][0]["cells"]["video"]["FF++"]["auc"] == expected.video.auc
    assert [TableRow.from_json(row) for row in stored["rows"]] == found.rows
    assert "10 videos" in made[1].read_text()
    assert "in brackets" not in made[1].read_text()
    ElementTree.fromstring(made[3].read_text())


def test_one_model_on_one_dataset(scorers: dict[str, TorchScorer], dataset: CropDataset) -> None:
    measured = evaluate(scorers["DTN"], dataset)
    table, _ = result(cross_dataset(entries(scorers)[:1], {"DFD": dataset}))
    assert within("DTN", "DFD", measured).latex("video") == table.latex("video")
    assert r"DTN$^{\ast}$ & 87.32 & 97.60" in table.latex("video")


FEW = EvaluateConfig(bootstrap_draws=5)


def trained_on(*forgeries: str) -> TorchScorer:
    torch.manual_seed(0)
    facts = TrainedOn(forgeries, ()) if forgeries else None
    return TorchScorer(DTN(dataclasses.replace(SMALL, trained_on=facts)).eval())


def test_all_is_what_the_model_was_trained_on_and_the_rest_is_apart(dataset: CropDataset) -> None:
    a, b, *rest = dataset.methods
    result_of = lambda *names: evaluate(trained_on(*names), dataset, FEW)
    rows = {row.fakes: row for row in result_of(a, b, "elsewhere").rows}
    families = {"family swap": ("SynthBlend", "SynthSwap"), "family reenactment": ("SynthWarp",),
                "family editing": ("SynthResample",)}  # fmt: skip
    assert [*rows] == ["all", "unseen", *families, *dataset.methods]
    for title, group in (("all", (a, b)), ("unseen", tuple(rest)), *families.items()):
        direct = evaluate(trained_on(), dataset, FEW, groups={"x": group}).rows[0]
        assert rows[title] == direct._replace(fakes=title)
        assert f"fakes by {', '.join(group)};" in rows[title].note
    for names in ((), ("elsewhere",), dataset.methods):
        assert [row.fakes for row in result_of(*names).rows] == ["all", *families, *dataset.methods]
        assert result_of(*names).rows[0].video.fakes == 2 * len(dataset.methods)
    table = within("DTN", "FF++", result_of(a, b))
    assert table.rows[0].cells["frame"]["FF++"].auc == rows["all"].frame.auc


def test_tables_keep_forgeries_apart_that_no_model_was_trained_on(dataset: CropDataset) -> None:
    a, b, *_ = dataset.methods
    alike = [Entry(name, trained_on(a, b)) for name in "xy"]
    table, _ = result(cross_dataset(alike, {"FF++": dataset}, FEW))
    assert table.columns == ("FF++", "FF++, unseen")
    measured = evaluate(trained_on(a, b), dataset, FEW)
    assert [table.rows[1].cells["video"][c].auc for c in table.columns] == [r.video.auc for r in measured.rows[:2]]
    assert table.paper[0].cells.keys() == {"FF++"}
    for other in (trained_on(a), trained_on()):  # rows of a table are comparable: of the same fakes
        table, _ = result(cross_dataset([*alike, Entry("z", other)], {"FF++": dataset}, FEW))
        assert table.columns == ("FF++",)
        assert "8 fake)" in table.column_notes["FF++"]


def test_models_of_different_recipes_are_marked(dataset: CropDataset) -> None:
    made = {name: trained_on(*dataset.methods) for name in ("CE alone", "both", "old")}
    for name, recipe in (("CE alone", "CE; published weights"), ("both", "CE + Ct-c; from scratch"), ("old", "")):
        made[name].config = dataclasses.replace(made[name].config, trained_on=TrainedOn(dataset.methods, (), recipe))
    table, _ = result(cross_dataset(entries(made), {"FF++": dataset}, FEW))
    header, rows = table.text("frame")
    assert header[-1] == "recipe"
    assert [row[-1] for row in rows[:3]] == ["CE; published weights", "CE + Ct-c; from scratch", "not recorded"]
    assert "CE + Ct-c; from scratch" in table.latex("frame")
    table, _ = result(cross_dataset([Entry("old", made["old"])], {"FF++": dataset}, FEW))
    assert table.text("frame")[0] == ["model", "FF++ ACC", "FF++ AUC"], "of nothing anything is recorded"


def test_families_are_columns_when_asked_and_may_be_named(dataset: CropDataset) -> None:
    one, names = [Entry("x", trained_on(), "DF")], ["swap", "reenactment", "editing"]
    table, _ = result(cross_dataset(one, {"FF++": dataset}, FEW, by_family=True))
    assert table.columns == ("FF++", *(f"FF++, family {name}" for name in names))
    swaps = evaluate(trained_on(), dataset, FEW, groups={"x": ("SynthBlend", "SynthSwap")}).rows[0]
    assert table.rows[0].cells["video"]["FF++, family swap"].auc == swaps.video.auc
    table, _ = result(cross_manipulation(one, dataset, FEW, by_family=True))
    assert table.columns == (*dataset.methods, *(f"family {name}" for name in names))
    named = dataclasses.replace(FEW, families=tuple(f"{method}=other" for method in dataset.methods))
    assert [row.fakes for row in evaluate(trained_on(), dataset, named).rows] == ["all", *dataset.methods]
    named = dataclasses.replace(FEW, families=("SynthWarp=whole-face,diffusion",))
    rows = {row.fakes: row for row in evaluate(trained_on(), dataset, named).rows}
    assert rows["family diffusion"].frame == rows["SynthWarp"].frame
    with pytest.raises(UsageError, match=r"--families Nope=.*: no such forgery here; there are SynthBlend"):
        evaluate(trained_on(), dataset, dataclasses.replace(FEW, families=("Nope=swap",)))


def test_families_of_a_table_are_named_once_for_all_its_sets(dataset: CropDataset, trained: Path) -> None:
    one = [Entry("x", trained_on())]
    mine = [v._replace(method="MyGAN") if v.method == "SynthWarp" else v for v in dataset.videos]
    sets = {"a": dataset, "b": dataclasses.replace(dataset, videos=mine)}
    table, _ = result(cross_dataset(one, sets, dataclasses.replace(FEW, families=("MyGAN=whole-face",)), True))
    assert {"a, family reenactment", "b, family whole-face"} <= set(table.columns)
    assert "a, family whole-face" not in table.columns
    with pytest.raises(UsageError, match=r"--families Nope=.*: no such forgery here"):
        result(cross_dataset(one, sets, dataclasses.replace(FEW, families=("Nope=swap",)), True))
    with pytest.raises(UsageError, match=r"--families MyGAN=swap: in this table .* with --by-family alone"):
        list(evaluate_models([trained] * 2, [Path(dataset.folder)], EvaluateConfig(families=("MyGAN=swap",))))


@pytest.fixture
def stills(dataset: CropDataset) -> CropDataset:
    """The crops as single pictures."""
    names = [(f"{row}.png",) for row in range(len(dataset.video))]
    videos = [
        dataset.videos[v]._replace(path=name[0], frames=name) for v, name in zip(dataset.video, names, strict=True)
    ]
    status = [dataset.status[v] for v in dataset.video]
    return dataclasses.replace(dataset, videos=videos, status=status, video=np.arange(len(names)))


def test_single_pictures_have_no_video_level(
    scorers: dict[str, TorchScorer], dataset: CropDataset, stills: CropDataset, tmp_path: Path
) -> None:
    measured, videos = evaluate(scorers["DTN"], stills), evaluate(scorers["DTN"], dataset)
    assert measured.rows[0].frame == videos.rows[0].frame
    header, rows = measured.table()
    assert header == ["fakes", "frame ACC", "frame AUC", "interval", "frame EER", "frame AP", "pictures"]
    assert rows[0][-1] == "6 + 24"
    assert measured.note().startswith(
        "test split, 30 pictures (6 real, 24 fake), one face of a frame; no video level, "
    )
    assert "bootstrap draws of pictures" in measured.note()
    stored = measured.to_json()["rows"][0]
    assert stored["video"] == {"acc": None, "auc": None, "eer": None, "ap": None, "reals": 6, "fakes": 24}
    assert stored["video_interval"] is None
    alone = within("DTN", "mine", measured)
    assert "Video level" not in alone.markdown()
    assert "Frame level" in alone.markdown()
    assert alone.write(tmp_path / "x")[2].read_text().count(r"\begin{tabular}") == 1
    assert TableRow.from_json(json.loads((tmp_path / "x.json").read_text())["rows"][0]) == alone.rows[0]
    both, _ = result(cross_dataset(entries(scorers), {"pictures": stills, "videos": dataset}))
    assert both.levels == ("frame", "video")
    assert both.text("video")[1][0][1:3] == ["-", "-"]
    assert both.text("video")[1][0][3] != "-"
    blended = evaluate(scorers["DTN"], self_blended(stills, 0)).note()
    assert blended.startswith("test split, 12 pictures (6 real, 6 fake)")
    for _ in range(2):  # the second reads what the first wrote
        list(robustness({"DTN": scorers["DTN"]}, stills, tmp_path / "r", RobustnessConfig(("jpeg",), (0,))))
    aucs = json.loads((tmp_path / "r/robustness.json").read_text())["auc"]
    assert aucs == {"DTN": {"untouched": {"frame": measured.rows[0].frame.auc}}}


def test_table_2(scorers: dict[str, TorchScorer], dataset: CropDataset) -> None:
    renamed = dict(zip(dataset.methods, ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures"), strict=True))
    videos = [v._replace(method=renamed.get(v.method, "")) for v in dataset.videos]
    ff = dataclasses.replace(dataset, videos=videos)
    two = [entry._replace(trained_on="DF") for entry in entries(scorers)]  # of one forgery, in one table
    found, said = result(cross_manipulation(two, ff))
    assert said == ["DTN on the data", "a_b & c on the data"]
    header, rows = found.text("video")
    assert header == ["model", "trained on", "DF AUC", "F2F AUC", "FS AUC", "NT AUC"]
    assert found.column_notes["FS"].startswith("test split, 4 videos (2 real, 2 fake), 3.0 frames each on average, ")
    one = evaluate(scorers["DTN"], ff, groups={"FaceSwap": ("FaceSwap",)}).rows[0]
    assert found.rows[0].cells["video"]["FS"].auc == one.video.auc
    assert [row[:2] for row in rows[:2]] == [["DTN", "DF"], ["a_b & c", "DF"]]
    assert ["DTN (the paper's values)", "DF", "100.00", "97.23", "74.26", "98.53"] in rows
    assert ["SOLA (the paper's values)", "DF", "100.00", "96.95", "69.72", "98.48"] in rows
    assert ["IID (the paper's values)", "DF", "99.51", "-", "63.83", "-"] in rows
    assert len(rows) == 2 + 7
    assert "F2F" not in {row[1] for row in rows}
    assert r"Method & trained on & DF & F2F & FS & NT \\" in found.latex("frame")
    assert r"DTN$^{\ast}$ & DF & 100.00 & 97.23 & 74.26 & 98.53 \\" in found.latex("frame")
    real = dataclasses.replace(dataset, videos=[v._replace(label=0, method="") for v in dataset.videos])
    with pytest.raises(UsageError, match="no forgery to test on"):
        result(cross_manipulation(two, real))


def test_the_papers_figures_stand_beside_ours() -> None:
    cells = {"x": Cell(0.5, 0.75, (0.7, 0.8)), "y|z": Cell(0.25, None, None)}
    row = TableRow("a<c", {"frame": cells, "video": cells}, after={"size": ("1.0", "2.0"), "other": ("3", "")},
              paper={"x": Pair(60.0, 70.5), "elsewhere": Pair(1.0, 2.0)}, notice="careful")  # fmt: skip
    table = ResultTable("t", "T", ("x", "y|z"), [row, dataclasses.replace(row, name="b", after={}, paper={})])
    header, rows = table.text("frame")
    assert header == ["model", "x ACC", "x AUC", "y|z ACC", "y|z AUC", "size", "other"]
    assert rows == [
        ["a<c", "50.00 [60.00]", "75.00 (70.0-80.0) [70.50]", "25.00", "-", "1.0 [2.0]", "3"],
        ["b", "50.00", "75.00 (70.0-80.0)", "25.00", "-", "", ""],
    ]
    text = table.markdown()
    assert "The paper's values are in brackets." in text
    assert r"| y\|z ACC |" in text
    assert "| a&lt;c | 50.00" in text
    assert text.endswith("**careful**\n")
    assert r"a<c$^{\ast}$ & 60.00 & 70.50 & - & - & 2.0 &  \\" in table.latex("frame")
    assert "% careful\n" in table.latex("frame")
    assert r"b$^" not in table.latex("frame")
    assert "the paper" in table.chart()


def test_names() -> None:
    paths = [Path("a/run"), Path("b/run")]
    assert names_of(paths, (), "x") == ["a/run", "b/run"]
    assert names_of([Path("a/one"), Path("b/two")], (), "x") == ["one", "two"]
    assert names_of(paths, ("p", "q"), "x") == ["p", "q"]
    with pytest.raises(UsageError, match="--x: 1 names for 2"):
        names_of(paths, ("p",), "x")
    with pytest.raises(UsageError, match="each must be named once"):
        names_of(paths, ("p", "p"), "x")

"""Groups of people: attributes from a CSV or the dataset, metrics by group, and gaps that are found or are chance."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from small import SMALL

from dtn_fast import DTN
from dtn_fast.data.attributes import attributes_of
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.video_table import Video
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.evaluate import evaluate
from dtn_fast.evaluation.groups import GroupTable, measure_groups
from dtn_fast.evaluation.protocols import Within, evaluate_models
from dtn_fast.runtime.torch_scorer import TorchScorer

QUICK = EvaluateConfig(bootstrap_draws=199)


def population(
    seed: int, shift: float = 0.0, people: int = 120, fakes: int = 2, copies: int = 1
) -> tuple[np.ndarray, np.ndarray, list[str], dict[str, list[str]]]:
    """Labels, scores, people and attributes; ``shift``: added to the logits of the reals of women."""
    rng = np.random.default_rng(seed)
    labels, scores, names = [], [], []
    attributes: dict[str, list[str]] = {"gender": [], "age": []}
    for person in range(people):
        gender, age, own = rng.choice(["man", "woman"]), rng.choice(["20-39", "40-59", "60-79"]), rng.normal(0, 0.7)
        for label in (0, *[1] * fakes):
            logit = own + rng.normal(3.2 * label - 1.6, 0.7) + shift * (gender == "woman") * (1 - label)
            for _ in range(copies):
                labels.append(label)
                scores.append(1 / (1 + np.exp(-logit)))
                names.append(f"p{person}")
                attributes["gender"].append(str(gender))
                attributes["age"].append(str(age))
    return np.array(labels), np.array(scores), names, attributes


def measured(seed: int, shift: float = 0.0, config: EvaluateConfig = QUICK, **how: int) -> GroupTable:
    return measure_groups(*population(seed, shift, **how), 0.5, config)


def test_a_planted_bias_is_found() -> None:
    for seed in range(5):
        table = measured(seed, shift=2.0)
        for metric, high in (("false alarms", "woman"), ("AUC", "man")):
            widest = next(gap for gap in table.gaps if gap.metric == metric)
            assert (widest.attribute, widest.high, widest.found) == ("gender", high, True), (seed, widest)
        assert not any(gap.found for gap in table.gaps if gap.attribute == "age"), seed
        said = table.sentences()
        assert re.match(r"Widest gap in false alarms: gender, woman \d+\.\d% against man \d+\.\d%, a difference of .* "
                        r"excludes 0 \(p 0\.005\)\.", said[0])  # fmt: skip


def test_where_none_is_planted_gaps_are_found_at_the_stated_rate() -> None:
    """Eight gaps at once are found by chance in a fifth of the sets at 80 % confidence, not each of them in a fifth."""
    config = EvaluateConfig(bootstrap_draws=59, confidence=0.8)
    seeds = 150
    wrong = sum(
        any(gap.found for gap in measured(seed, config=config, people=60, fakes=1).gaps) for seed in range(seeds)
    )
    assert 0.11 < wrong / seeds < 0.29, wrong  # 0.2, and three standard deviations


def test_intervals_are_those_of_the_test() -> None:
    for seed, shift in ((0, 0.0), (1, 0.4), (2, 0.8), (3, 1.2)):
        table = measured(seed, shift)
        assert len(table.gaps) == 2 * (1 + 3)
        for gap in table.gaps:
            assert gap.found == (gap.p <= 0.05), gap
            assert gap.difference >= 0
            assert gap.interval[0] <= gap.difference <= gap.interval[1]
    few = dataclasses.replace(QUICK, group_size=3)
    for seed in range(30):  # few people: many permutations are as far apart as what is seen
        for gap in measured(seed, 3.0, few, people=16, fakes=1).gaps:
            assert gap.found == (gap.p <= 0.05), gap
    labels, scores, people, attributes = population(1, 0.8)
    width = lambda known: np.ptp(measure_groups(labels, scores, people, known, 0.5, QUICK).gaps[0].interval)
    rng = np.random.default_rng(0)
    many = {f"noise {n}": [str(v) for v in rng.integers(0, 2, len(labels) // 3).repeat(3)] for n in range(8)}
    alone, among = ({"gender": attributes["gender"], **more} for more in ({}, many))
    table = measure_groups(labels, scores, people, among, 0.5, QUICK)
    gender = next(gap for gap in table.gaps if gap.attribute == "gender")
    assert np.ptp(gender.interval) > 1.15 * width(alone), "more gaps need wider intervals"


def test_metrics_of_a_group_are_those_of_its_videos() -> None:
    from sklearn.metrics import roc_auc_score

    labels, scores, people, attributes = population(0)
    table = measure_groups(labels, scores, people, attributes, 0.4, QUICK)
    assert [(row.attribute, row.value) for row in table.rows] == [
        ("gender", "man"), ("gender", "woman"), ("age", "20-39"), ("age", "40-59"), ("age", "60-79"),
    ]  # fmt: skip
    for row in table.rows:
        own = np.array(attributes[row.attribute]) == row.value
        y, s = labels[own], scores[own]
        assert row.auc
        assert row.false_alarms
        assert row.misses
        assert row.auc[0] == pytest.approx(roc_auc_score(y, s))
        assert row.false_alarms[0] == pytest.approx((s[y == 0] >= 0.4).mean())
        assert row.misses[0] == pytest.approx((s[y == 1] < 0.4).mean())
        assert (row.reals, row.fakes) == ((y == 0).sum(), (y == 1).sum())
        assert row.real_people == row.fake_people == row.reals
        for value, low, high in (row.auc, row.false_alarms, row.misses):
            assert low <= value <= high


def test_videos_of_a_person_are_not_independent() -> None:
    """Five copies of every video say no more than one: intervals and gaps stay as they are."""
    once, often = measured(3, 0.5), measured(3, 0.5, copies=5)
    for one, five in zip(once.rows, often.rows, strict=True):
        assert five.reals == 5 * one.reals
        for metric in ("auc", "false_alarms", "misses"):
            assert getattr(five, metric) == pytest.approx(getattr(one, metric)), metric
    for a, b in zip(once.gaps, often.gaps, strict=True):
        assert b.interval == pytest.approx(a.interval)
    assert "of 120 people" not in str(once.text())
    assert re.search(r"\d+ of \d+ people", str(often.text()))


def test_small_groups_say_so() -> None:
    labels, scores, people, attributes = population(0, people=40)
    attributes["age"] = ["rare" if person in ("p0", "p1") else "usual" for person in people]
    attributes["empty"] = [""] * len(people)
    attributes["none real"] = ["x" if label else "y" for label in labels]
    table = measure_groups(labels, scores, people, attributes, 0.5, QUICK)
    rows = {(row.attribute, row.value): row for row in table.rows}
    assert rows["age", "rare"][-3:] == (None, None, None)
    assert rows["none real", "x"].false_alarms is None
    assert rows["none real", "x"].misses is not None
    assert ("empty", "") not in rows
    assert {gap.attribute for gap in table.gaps} == {"gender"}
    header, cells = table.text()
    rare = dict(zip(header[:5], cells[[*rows].index(("age", "rare"))], strict=False))
    assert rare == {"attribute": "age", "group": "rare", "real": "2", "fake": "4 of 2 people", "AUC": "too few"}
    one = measure_groups(labels, scores, people, {"age": attributes["age"]}, 0.5, QUICK)
    assert one.gaps == []
    assert one.sentences()[0].startswith("No gap in false alarms can be measured")
    few = dataclasses.replace(QUICK, group_size=2)
    assert len(measure_groups(labels, scores, people, {"age": attributes["age"]}, 0.5, few).gaps) == 2
    still = measure_groups(labels, np.full(len(labels), 0.1), people, {"gender": attributes["gender"]}, 0.5, QUICK)
    assert [(gap.difference, gap.found, gap.p) for gap in still.gaps] == [(0, False, 1), (0, False, 1)]
    assert still.sentences()[0] == "No gap in false alarms: no two groups that are large enough differ."
    tones = ["Monk 2", "monk", "Monk 10", "Monk 1"] * (len(labels) // 4)
    values = [row.value for row in measure_groups(labels, scores, people, {"tone": tones}, 0.5, QUICK).rows]
    assert values == ["Monk 1", "Monk 2", "Monk 10", "monk"]
    assert not any(gap.found for gap in measured(1, 3.0, EvaluateConfig(bootstrap_draws=9)).gaps), (
        "too few draws to say"
    )


def test_table_in_every_form() -> None:
    labels, scores, people, attributes = population(0)
    attributes["gen|der_<&"] = attributes.pop("gender")
    table = measure_groups(labels, scores, people, attributes, 0.5, QUICK)
    assert r"| gen\|der_&lt;& | man |" in table.markdown()
    latex = table.latex()
    assert r"gen|der\_<\& & man & " in latex
    assert all(line.startswith("% ") for line in latex[: latex.index(r"\begin")].strip().splitlines())
    stored = json.loads(json.dumps(table.to_json()))
    assert stored["rows"][0]["auc"] == list(table.rows[0].auc or ())
    assert stored["gaps"][0]["difference"] == table.gaps[0].difference
    ElementTree.fromstring(table.chart("careful"))
    assert table.chart() == table.chart()


VIDEOS = [
    Video("real/a.mp4", 0, "real", "test", ("a",)), Video("real/b.mp4", 0, "real", "test", ("b",)),
    Video("Swap/a_b.mp4", 1, "Swap", "test", ("a", "b")), Video("Other/a_b.mp4", 1, "Other", "test", ("a", "b")),
    Video("real/c.mp4", 0, "real", "train", ("c",), attributes=(("gender", "man"),)),
]  # fmt: skip


def read(tmp_path: Path, text: str) -> tuple[dict[str, list[str]], list[str]]:
    (tmp_path / "g.csv").write_text(text)
    return attributes_of(VIDEOS, "test", tmp_path / "g.csv")


def test_attributes_of_a_csv(tmp_path: Path) -> None:
    found, notes = read(tmp_path, "Identity,Gender,Age\na,Woman,30\nb,man,\nc,MAN,40\n")
    assert found == {"gender": ["Woman", "man", "Woman", "Woman", "man"], "age": ["30", "", "30", "30", "40"]}
    assert notes == []
    found, notes = read(tmp_path, "video,tone\nreal\\a.mp4,dark\nb,light\nSwap/a_b,dark\n")
    assert found == {"gender": ["", "", "", "", "man"], "tone": ["dark", "light", "dark", "", ""]}
    assert notes == ["g.csv: 1 of 4 videos have no row, and are in no group"]
    assert attributes_of(VIDEOS, "test") == ({"gender": ["", "", "", "", "man"]}, [])
    assert attributes_of(VIDEOS[:4], "test") == ({}, [])


@pytest.mark.parametrize(("text", "error"), [
    ("video,gender\nreal/q.mp4,man\n", "1 of 1 rows name no video .*'real/q.mp4', the nearest is real/"),
    ("identity,gender\nz,man\n", "1 of 1 rows name no identity .* the first is 'z'; one that is known is a"),
    ("name,gender\na,man\n", "has no column video or identity; its columns are name, gender"),
    ("video\na\n", "has no attribute beside video"),
    ("video,gender\n", "has no rows below its header"),
    ("", "has no rows below its header"),
    ("video,gender\na,man\na,woman\n", "video a has two rows, with gender 'man' and 'woman'; delete one"),
    ("video,gender\na_b,man\n", "a_b may be 2 videos; write the path, such as Swap/a_b.mp4"),
    ("video,gender\na,man,x\n", "row 2 has more cells than the header"),
    ("video,gender\nb,\n", "no attribute to group these videos by"),
])  # fmt: skip
def test_wrong_csvs(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(UsageError, match=error) as raised:
        attributes_of([video._replace(attributes=()) for video in VIDEOS], "test", write(tmp_path, text))
    assert "g.csv" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "g.csv").write_text(text)
    return tmp_path / "g.csv"


def test_notes_on_a_csv(tmp_path: Path) -> None:
    _, notes = read(tmp_path, "identity,gender\na,man\na,man\nb,woman\nbb,man\n")
    assert notes == [
        "g.csv: 1 of 4 rows name no identity of these crops, the first is 'bb', the nearest is b",
        "g.csv: 1 rows are there twice",
    ]
    videos = [Video(f"{n}.mp4", 0, "real", "test", (str(n),)) for n in range(500)]
    path = write(tmp_path, "identity,age,gender\n" + "".join(f"{n},{n},{'fm'[n % 2]}\n" for n in range(500)))
    found, notes = attributes_of(videos, "test", path)
    assert [*found] == ["gender"]
    assert notes == ["left out: age has 500 values, more than 20; write ranges, such as 20-39"]
    with pytest.raises(UsageError, match="no attribute to group these videos by; left out: age has 500 values"):
        attributes_of(videos, "test", write(tmp_path, "identity,age\n" + "".join(f"{n},{n}\n" for n in range(500))))
    found, _ = attributes_of(videos[:1], "test", write(tmp_path, "identity,a\x1bb\n0,x\x1b[2J\n"))
    assert found == {"a\\x1bb": ["x\\x1b[2J"]}, "nothing reaches the terminal"


@pytest.fixture
def scorer() -> TorchScorer:
    torch.manual_seed(0)
    return TorchScorer(DTN(SMALL).eval())


def test_groups_in_an_evaluation(dataset: CropDataset, scorer: TorchScorer, tmp_path: Path) -> None:
    config = EvaluateConfig(bootstrap_draws=20, group_size=1, threshold=0.3)
    assert evaluate(scorer, dataset, config).groups is None
    first = sorted({v.identities[0] for v in dataset.videos if v.split == "test"})
    path = write(tmp_path, "identity,gender\n" + "".join(f"{one},{'mw'[n]}\n" for n, one in enumerate(first)))
    made = evaluate(scorer, dataset, dataclasses.replace(config, groups=path))
    assert made.groups
    assert [(row.value, row.reals, row.fakes) for row in made.groups.rows] == [("m", 1, 4), ("w", 1, 4)]
    assert made.groups.threshold == 0.3
    assert made.groups.notes[0] == "the threshold is --threshold, as the model is not calibrated"
    carried = [v._replace(attributes=(("gender", "mw"[first.index(v.identities[0])]),)) if v.split == "test" else v
               for v in dataset.videos]  # fmt: skip
    own = evaluate(scorer, dataclasses.replace(dataset, videos=carried), config)
    assert own.groups
    assert own.groups.rows == made.groups.rows, "by the dataset's own lists, without a CSV"
    named = dataclasses.replace(config, groups=path, group_threshold=0.6)
    assert evaluate(scorer, dataset, named).groups.threshold == 0.6
    assert json.loads(json.dumps(made.to_json()))["groups"]["threshold"] == 0.3
    assert made.rows == evaluate(scorer, dataset, config).rows
    others = sorted({v.identities[0] for v in dataset.videos if v.split == "train"} - {*first})
    path = write(tmp_path, "identity,gender\n" + "".join(f"{one},m\n" for one in others))
    with pytest.raises(UsageError, match=r"g\.csv: no attribute of the videos of the test split; g\.csv: \d+ of"):
        evaluate(scorer, dataset, dataclasses.replace(config, groups=path))
    files = Within("DTN", "set", made).write(tmp_path / "x")
    assert [file.name for file in files] == ["x.json", "x.md", "x.tex", "x.svg"]
    assert "**By group; rates in percent**" in files[1].read_text()
    assert r"gender & m & " in files[2].read_text()


def test_the_threshold_is_the_calibrations(dataset: CropDataset, trained: Path, tmp_path: Path) -> None:
    from dtn_fast.evaluation.calibration import Calibrated, calibrate
    from dtn_fast.runtime.load import load_scorer

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    *_, last = calibrate(run, Path(dataset.folder))
    assert isinstance(last, Calibrated)
    first = sorted({v.identities[0] for v in dataset.videos if v.split == "test"})
    path = write(tmp_path, "identity,gender\n" + "".join(f"{one},x\n" for one in first))
    made = evaluate(load_scorer(run), dataset, EvaluateConfig(bootstrap_draws=5, group_size=1, groups=path))
    calibration: Any = last.card.calibration
    assert made.groups
    assert made.groups.threshold == calibration.video.fake_from
    assert made.groups.notes[0] == "the threshold is the limit of the model's calibration"


def test_groups_take_one_model_on_one_dataset(trained: Path, crops: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(groups=tmp_path / "g.csv")
    with pytest.raises(UsageError, match=r"--groups .*g\.csv: takes one model, one dataset and --protocol within"):
        list(evaluate_models([trained], [crops, crops], config, data_names=("a", "b")))

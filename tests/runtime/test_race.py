"""--runtime auto: the fastest runtime that keeps the answers, by a race that is remembered."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dtn_fast import DTN
from dtn_fast.cli.doctor import examine
from dtn_fast.errors import DtnWarning, UsageError
from dtn_fast.export.to_onnx import export_onnx
from dtn_fast.runtime import Runtime, load_scorer, race

AUTO = Runtime(runtime="auto")


@pytest.fixture(autouse=True)
def raced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The runtimes of each race that was timed, whose times are those that a test sets; the cache folder is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    races: list[list[str]] = []

    def times(scorers: Any) -> dict[str, float]:
        races.append(list(scorers))
        return {name: {"onnxruntime": 3.0, "openvino": 2.0}[name] for name in scorers}

    monkeypatch.setattr(race, "median_milliseconds", times)
    return races


def told(path: Path, runtime: Runtime = AUTO) -> tuple[str, str]:
    """The name of the scorer, and what was said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        name = load_scorer(path, runtime).name
    return name, "; ".join(str(one.message) for one in caught if one.category is DtnWarning)


def changed(monkeypatch: pytest.MonkeyPatch, name: str, by: float) -> None:
    """Lets the runtime ``name`` add ``by`` to every output."""
    opened = race.RUNTIMES[name]

    def open_file(path: Path, runtime: Runtime) -> Any:
        scorer = opened(path, runtime)
        outputs = scorer._outputs

        def more(crops: NDArray[np.uint8]) -> NDArray[np.float64]:
            return outputs(crops) + by

        scorer._outputs = more  # type: ignore[method-assign]
        return scorer

    monkeypatch.setitem(race.RUNTIMES, name, open_file)


def test_the_fastest_runs_and_is_remembered(exported: Path, raced: list[list[str]]) -> None:
    name, said = told(exported)
    assert name == "OpenVINO"
    assert f"{exported}: runs through openvino; 8 crops take onnxruntime 3.0 ms, openvino 2.0 ms; remembered" in said
    assert told(exported) == ("OpenVINO", "")
    assert raced == [["onnxruntime", "openvino"]], "once"
    (choice,) = race.choices()
    assert (choice.file, choice.runtime) == ("model.onnx", "openvino")
    (rows,) = [section.rows for section in examine() if section.title.startswith("Choices of --runtime auto")]
    assert rows == [["model.onnx", "openvino", "onnxruntime 3.0 ms, openvino 2.0 ms", choice.machine]]


def test_another_file_machine_or_version_is_raced_again(
    exported: Path, small: DTN, raced: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_scorer(exported, AUTO)
    (tmp_path / "copy.onnx").write_bytes(exported.read_bytes())
    load_scorer(tmp_path / "copy.onnx", AUTO)
    assert len(raced) == 1, "the same file under another name"
    export_onnx(small, tmp_path / "copy.onnx")
    load_scorer(tmp_path / "copy.onnx", AUTO)
    assert len(raced) == 2
    monkeypatch.setattr(race, "cpu_name", lambda: "another processor")
    load_scorer(exported, AUTO)
    assert len(raced) == 3
    monkeypatch.setattr(race, "choose_threads", lambda _threads: 77)
    load_scorer(exported, AUTO)
    assert len(raced) == 4
    monkeypatch.setattr(race, "_version", lambda _package: "9.9")
    load_scorer(exported, AUTO)
    assert len(raced) == 5


@pytest.mark.parametrize(("by", "kept"), [(2e-4, True), (5e-2, False), (float("nan"), False)])
def test_other_answers_lose(by: float, kept: bool, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, "openvino", by)
    name, said = told(exported)
    assert name == ("OpenVINO" if kept else "onnxruntime")
    reason = "are not finite" if np.isnan(by) else "its outputs differ by .*, over 1e-03"
    assert bool(re.search(f"openvino is left out: .*{reason}", said)) is not kept


def test_what_is_not_there_is_said_and_what_is_there_runs(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, runtime: Runtime) -> Any:
        raise UsageError(f"{path}: cannot run here")

    with monkeypatch.context() as patch:
        patch.setitem(race.RUNTIMES, "openvino", refuse)
        name, said = told(exported)
        assert name == "onnxruntime"
        assert "openvino is left out: " in said
        assert " ms" not in said, "one alone is not timed"
        patch.setattr(race, "cpu_name", lambda: "another processor")
        patch.setitem(race.RUNTIMES, "onnxruntime", refuse)
        with pytest.raises(UsageError, match="cannot run here"):
            load_scorer(exported, AUTO)
    monkeypatch.setattr(race, "cpu_name", lambda: "a third processor")
    monkeypatch.setitem(race.RUNTIMES, "onnxruntime", refuse)
    assert told(exported)[0] == "OpenVINO"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"runtime": "openvino"}', "wrong", "unhashable", "times", b"\xff"])
def test_a_damaged_memory_is_made_again(damage: str | bytes, exported: Path, raced: list[list[str]]) -> None:
    load_scorer(exported, AUTO)
    (file,) = race.folder().glob("*.json")
    good = json.loads(file.read_text())
    fields: dict[Any, dict[str, Any]] = {
        "wrong": {"runtime": "rm -rf"},
        "unhashable": {"runtime": {}},
        "times": {"milliseconds": 3},
    }
    if damage in fields:
        damage = json.dumps({**good, **fields[damage]})
    file.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert not race.choices()
    assert not [section for section in examine() if "auto" in section.title]
    assert told(exported)[0] == "OpenVINO"
    assert len(raced) == 2
    assert json.loads(file.read_text()) == good


def test_a_cache_that_cannot_be_written_is_said(
    exported: Path, raced: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        name, said = told(exported)
        assert name == "OpenVINO"
        assert "not remembered (" in said
    assert len(raced) == 2


def test_a_gpu_needs_no_race(exported: Path, raced: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race.onnx, "provider_of", lambda _runtime: "cuda")
    with pytest.raises(UsageError, match="CUDAExecutionProvider"):
        race.load(exported, AUTO)
    assert not raced


@pytest.mark.parametrize(("once", "rounds"), [(0.05, 20), (0.001, 30), (9.0, 3)])
def test_times_are_medians_of_calls_in_turns(
    once: float, rounds: int, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    asked = []

    def turns(calls: Any, count: int, warm_up: int) -> dict[str, list[float]]:
        asked.append((count, warm_up))
        assert [len(call()) for call in calls.values()] == [race.BATCH] * 2
        return dict.fromkeys(calls, [once] * count if warm_up else [0.5, *[once] * (count - 2), 9.0])

    scorers = {name: load_scorer(exported, Runtime(runtime=name)) for name in race.RUNTIMES}
    monkeypatch.setattr(race, "in_turns", turns)
    assert race.median_milliseconds(scorers) == dict.fromkeys(scorers, 1e3 * once)
    assert asked == [(1, 1), (rounds, 0)]


def test_a_crop_drawn_for_the_race_is_no_noise() -> None:
    crops = race.drawn_crops(3, 64)
    assert crops.shape == (3, 64, 64, 3)
    assert crops.dtype == np.uint8
    assert np.array_equal(crops, race.drawn_crops(3, 64)), "seeded"
    assert np.abs(np.diff(crops.astype(int), axis=1)).mean() < 15

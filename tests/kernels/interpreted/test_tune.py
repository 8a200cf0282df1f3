"""The search for launch values, with a clock that this test sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dtn_fast.kernels import launch_values, ops, tune


def case() -> tune.Case:
    def make():
        qkv, scale = torch.randn(1, 16, 3, 1, 32), torch.zeros(1)
        return lambda: [ops.mas_attention_packed(qkv, scale, path="triton")]

    return tune.Case(("mas_small_forward",), {"N": 64, "bytes": 4}, make)


def test_the_fastest_right_answer_wins_and_is_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = [{"num_warps": w, "num_stages": 1} for w in (1, 2, 4, 8)]
    monkeypatch.setattr(tune, "candidates", lambda: {"mas_small_forward": values})

    def timer(make) -> float:
        now = launch_values.override.get("mas_small_forward")
        if now is None:
            return 10.0
        if now["num_warps"] == 4:
            raise RuntimeError("does not fit")
        return {1: 0.5, 2: 3.0, 8: 9.0}[now["num_warps"]]

    alike = tune._alike
    monkeypatch.setattr(  # the fastest gives wrong answers: it must not be taken
        tune,
        "_alike",
        lambda a, b: launch_values.override["mas_small_forward"]["num_warps"] != 1 and alike(a, b),
    )
    found = tune.search([case()], 60, timer)
    assert found == {"mas_small_forward": [{"when": {"N": 64, "bytes": 4}, "num_warps": 2, "num_stages": 1}]}
    assert not launch_values.override
    path = tune.write("NVIDIA H200", found, tmp_path)
    assert path.name == "nvidia-h200.json"
    tune.write("NVIDIA H200", {"moe_forward": [{"num_warps": 4}]}, tmp_path)
    assert set(json.loads(path.read_text())) == {"mas_small_forward", "moe_forward"}


def test_an_empty_budget_writes_nothing_and_slower_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune.search([case()], -1, lambda make: 1.0) == {}
    case().make()()
    row = {"when": {"N": 64, "bytes": 4}, **launch_values.used["mas_small_forward"]}
    found = tune.search([case()], 60, lambda make: 5.0 if launch_values.override else 1.0)
    assert found == {"mas_small_forward": [row]}  # the default's: else another shape's row would serve this one


def test_every_kernel_is_kept_as_it_is_found_and_rows_are_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound, warps in ((128, 8), (64, 4), (64, 2)):
        row = {"when": {"N": bound, "bytes": 4}, "num_warps": warps, "num_stages": 1}
        tune.write("GPU", {"mas_small_forward": [row]}, tmp_path)
    rows = json.loads((tmp_path / "gpu.json").read_text())["mas_small_forward"]
    assert [(row["when"]["N"], row["num_warps"]) for row in rows] == [(64, 2), (128, 8)]
    for when in ({"C": 32, "bytes": 2}, {"C": 32, "T": 2048, "bytes": 2}, {"POOL": 0, "bytes": 2}):
        tune.write("GPU", {"k": [{"when": when, "num_warps": 4, "num_stages": 1}]}, tmp_path)
    bounds = [set(row["when"]) - {"bytes"} for row in json.loads((tmp_path / "gpu.json").read_text())["k"]]
    assert bounds == [{"POOL"}, {"C", "T"}, {"C"}]  # a row of more bounds is not hidden behind one of fewer
    kept: list[int] = []
    two = [case(), case()._replace(when={"N": 128, "bytes": 4})]
    tune.search(two, 60, lambda make: 1.0, lambda found: kept.append(len(found["mas_small_forward"])))
    assert kept == [1, 2]


def test_without_a_gpu_the_search_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "no GPU" in capsys.readouterr().err

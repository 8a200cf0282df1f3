"""The calls of ``make gpu``: planned to fit, ended in time, and whatever ends them, what they had is kept and said."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from dtn_fast.bench import gpu, results, tables
from dtn_fast.bench.machine import Machine
from dtn_fast.bench.measure import Measurement
from dtn_fast.kernels import launch_values, tune

H200 = Machine("NVIDIA H200", 790e12, 4.3e12, "bfloat16")


@pytest.mark.parametrize("minutes", [1, 5, 7.5, 10, 15, 20, 30, 45, 60, 90])
def test_planned_calls_fit(minutes: float) -> None:
    lines = list(gpu.plan(list(gpu.STAGES), minutes, "abc"))
    calls = [shlex.split(line) for line in lines if line.startswith("make gpu ")]
    budgets = [float(word.removeprefix("BUDGET=")) for call in calls for word in call if word.startswith("BUDGET=")]
    stages = [call[2].removeprefix("STAGE=").split() for call in calls]
    assert max(budgets, default=0) <= gpu.LIMIT <= 540
    assert sum(budgets) <= max(60 * minutes - gpu.STARTING, 0)
    planned = [name for names in stages for name in names]
    assert planned == [name for name in gpu.STAGES if name in planned], "in order"
    for line in lines:  # what has no time is said
        assert not line.startswith("# no time") or line.split()[4].strip(",") not in planned
    assert len(planned) + sum(line.startswith("# no time") for line in lines) == len(gpu.STAGES)
    for names, budget in zip(stages, budgets, strict=True):  # the runner divides a call's budget as it was planned
        assert list(gpu.allot(names, budget)) == names
    if minutes >= 15:
        assert planned[:4] == ["environment", "tests", "sweep", "kernels"]
    if minutes >= 30:
        assert planned == list(gpu.STAGES)


def test_make_passes_the_plan_on(tmp_path: Path) -> None:
    make = ["make", "--no-print-directory", f"PYTHON={sys.executable}"]
    done = subprocess.run([*make, "gpu-plan", "MINUTES=15"], cwd=tables.REPOSITORY, capture_output=True, text=True)
    call = next(line for line in done.stdout.splitlines() if line.startswith("make gpu "))
    shown = subprocess.run([*make, "-n", *shlex.split(call)[1:], f"OUT={tmp_path}"], cwd=tables.REPOSITORY,
                           capture_output=True, text=True).stdout  # fmt: skip
    (stages,), (budget,) = re.findall(r'STAGE="(.*?)"', call), re.findall(r"BUDGET=(\d+)", call)
    assert stages.startswith("environment tests sweep")
    assert f"-m dtn_fast.bench.gpu --stage {stages} --budget {budget}" in shown
    assert f"--out {tmp_path}" in shown
    assert re.search(r"DTN_COMMIT=[0-9a-f]{12}", shown)


def test_time_goes_to_what_is_first_and_then_to_what_is_enough() -> None:
    assert gpu.allot(["environment", "tests"], 5) == {}
    assert list(gpu.allot(list(gpu.STAGES), 150)) == ["environment", "tests", "convolutions"]
    assert gpu.allot(["kernels"], 540) == {"kernels": 540}
    got = gpu.allot(["sweep", "model"], 400)
    assert got == {"sweep": gpu.STAGES["sweep"].enough, "model": 400 - gpu.STAGES["sweep"].enough}


def test_without_a_gpu_only_a_dry_run_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "sees no GPU" in capfd.readouterr().err
    stages = ["environment", "convolutions", "sanitizer"]
    assert gpu.main(["--dry-run", "--stage", *stages, "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "gpu-run.json").read_text())["stages"]
    assert [row["stage"] for row in summary] == ["environment", "convolutions", "sanitizer"]
    assert [row["state"] for row in summary[:2]] == ["done", "done"]
    assert summary[2]["state"].startswith("not run")
    assert summary[1]["kept"].startswith("28 rows of 1 cases"), (
        "nine convolutions, the first twice and with no input gradient"
    )
    (file,) = [path for path in tmp_path.glob("*.json") if path.name != "gpu-run.json"]
    assert len(results.load(file)["suites"]["convolutions"]["rows"]) == 28
    log = (tmp_path / "gpu-run.log").read_text()
    assert "TFLOP/s float32" in log
    assert "of the lower bound" in log
    assert gpu.main(["--plan", "30", "--stage", "train"]) == 0
    with pytest.raises(gpu.UsageError, match="--collect nowhere: no such folder"):
        gpu.main(["--collect", "nowhere"])


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_stage_that_fails_or_takes_too_long_leaves_the_others_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = {"kernels": "raise SystemExit(3)", "model": "print('so far'); import time; time.sleep(600)", "data": ""}
    monkeypatch.setattr(gpu, "commands", lambda stage, *_: [python(todo[stage])])
    monkeypatch.setattr(gpu, "STAGES", {name: gpu.Stage(2, 3, "") for name in gpu.STAGES})
    summary = gpu.run(["kernels", "model", "data"], 9, tmp_path, dry=True)
    states = {row["stage"]: row["state"] for row in summary}
    assert states["kernels"].startswith("failed with 3")
    assert states["model"] == "cut off by the budget"
    assert states["data"] in ("done", "not run: it needs 2 s; make gpu STAGE=\"data\"")  # fmt: skip
    assert "so far" in (tmp_path / "gpu-run.log").read_text()
    (row,) = gpu.run(["train"], 1, tmp_path, dry=True)
    assert row["state"] == 'not run: it needs 2 s; make gpu STAGE="train"'


@pytest.mark.parametrize("end", ["sys.exit(0)", "time.sleep(600)"], ids=["done", "killed"])
def test_no_process_outlives_its_stage(end: str, tmp_path: Path) -> None:
    """As an idle compiler's worker would, with the GPU's memory in its hands."""
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    with (tmp_path / "log").open("w+") as log:
        code = gpu._run_command(python(f"{child}; print(p.pid, flush=True); {end}"), 3, log)
        log.seek(0)
        pid = int(log.readline())
    assert code == (0 if "exit" in end else None)
    for _ in range(1000):  # the kill is sent; init collects the process a moment later
        if not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"process {pid} is still there")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_a_run_killed_at_any_moment_keeps_what_it_had_and_says_so(how: signal.Signals, tmp_path: Path) -> None:
    """The runner itself is killed, as at the end of a lease, at a random moment after the first rows."""
    command = [*gpu.THIS, "--dry-run", "--stage", "kernels", "--out", str(tmp_path)]
    with (tmp_path / "screen").open("w") as screen:
        runner = subprocess.Popen(command, cwd=tables.REPOSITORY, stdout=screen, stderr=screen, process_group=0)
        while not (files := [p for p in tmp_path.glob("*.json") if p.name != "gpu-run.json"]):
            assert runner.poll() is None, (tmp_path / "screen").read_text()
            time.sleep(0.05)
        time.sleep(random.random() / 2)
        runner.send_signal(how)
        assert runner.wait() == (-9 if how == signal.SIGKILL else 143)
    rows = results.load(files[0])["suites"]["kernels"]["rows"]
    assert rows
    (stage,) = json.loads((tmp_path / "gpu-run.json").read_text())["stages"]
    assert (stage["stage"], stage["state"]) == ("kernels", "begun")
    assert rows[0].case in (tmp_path / "gpu-run.log").read_text()
    assert rows[0].case in (tmp_path / "screen").read_text()
    if how == signal.SIGKILL:  # its stage goes on, with a budget of its own
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError), open(process / "cmdline", "rb") as file:  # many end meanwhile
                if str(tmp_path).encode() in file.read():
                    os.kill(int(process.name), signal.SIGKILL)


def test_a_rehearsal_kills_each_stage_and_says_what_it_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random.Random, "uniform", lambda *_: 3 + 3 * random.random())
    assert gpu.main(["--rehearse", "1", "--stage", "sweep", "--out", str(tmp_path)]) == 0
    shown = capfd.readouterr().out
    for row in json.loads((tmp_path / "gpu-run.json").read_text())["stages"]:
        assert row["state"] in ("killed at random", "done")
        assert f"kept: {row['kept'] or 'nothing'}" in shown
    if (tuned := tmp_path / "rehearsal.json").is_file():
        assert (
            f"kept: {len(json.loads(tuned.read_text())['mas_small_forward'])} launch values in rehearsal.json" in shown
        )


def test_a_rehearsal_leaves_no_figures_among_the_real_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[Path, bool]] = []
    monkeypatch.setattr(gpu, "run", lambda stages, budget, out, dry, dice: used.append((out, dry)) or [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    Path("gpu-results/rehearsal").mkdir(parents=True)
    for how in ([], ["--dry-run"], ["--rehearse", "1"]):
        assert gpu.main([*how, "--stage", "data"]) == 0
    assert used == [(Path("gpu-results"), False), *[(Path("gpu-results/rehearsal"), True)] * 2]


def test_no_kernel_takes_all_of_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    now = [0.0]

    def search(todo: list[tune.Case], share: float, timer: object) -> dict[str, list[dict[str, object]]]:
        (kernel,) = todo[0].kernels
        given.append(share)
        now[0] += share  # uses all that it may
        return {kernel: [{"when": todo[0].when, "num_warps": len(given)}]}

    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tune, "search", search)
    gpu.sweep(tmp_path, 300, dry=True)
    assert given[:3] == [75, 56.25, 42.1875]
    assert len(given) > 12
    assert now[0] <= 300
    assert len(json.loads((tmp_path / "rehearsal.json").read_text())["mas_small_forward"]) == len(given)
    order: list[str] = []
    monkeypatch.setattr(tune, "search", lambda todo, *_: order.extend(todo[0].kernels) or {})
    monkeypatch.setattr(tune, "write", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    now[0] = 0
    gpu.sweep(tmp_path, 300, dry=False)
    assert order == [kernel for case in tune.cases() for kernel in case.kernels]


def test_what_tests_had_is_counted_with_and_without_workers(tmp_path: Path) -> None:
    text = ("tests/a.py::test_one[x] PASSED  [  3%]\n[gw0] [ 12%] PASSED tests/a.py::test_two \n"
            "tests/a.py::test_three \n"
            "[gw1] [ 20%] FAILED tests/b.py::test_four \nE   assert 1 == 2\n")  # fmt: skip
    assert gpu._kept("tests", tmp_path, text, dry=True) == "2 passed, 1 failed"


def test_failures_are_shown_as_they_come(tmp_path: Path) -> None:
    """A process that is killed cannot print its tracebacks at the end."""
    (tmp_path / "test_two.py").write_text("def test_a():\n    assert 1 == 2\ndef test_b():\n    pass\n")
    plugin = gpu.pytest_command(dry=False)[4:6]
    assert plugin[0] == "-p"
    command = [sys.executable, "-m", "pytest", "-v", *plugin, "--numprocesses", "1", "--rootdir", str(tmp_path)]
    done = subprocess.run([*command, str(tmp_path)], cwd=tables.REPOSITORY, capture_output=True, text=True)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.index("assert 1 == 2") < re.search(r"PASSED \S*test_b", done.stdout).start()


ENV = {"gpu": "NVIDIA H200", "cpu": "Chip", "threads": 2, "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0",
       "python": "3.12", "commit": "abcdef123456", "date": "2026-01-01"}  # fmt: skip


def rows(*cases: str, taken: float = 1.0) -> list[Measurement]:
    return [Measurement("kernels", case, "ours", taken, taken, taken, 1.0) for case in cases]


def test_a_run_that_was_cut_off_takes_no_rows_from_an_earlier_one(tmp_path: Path) -> None:
    def stored() -> dict[str, float]:
        (path,) = tmp_path.glob("*.json")
        return {row.case: row.median for row in results.load(path)["suites"]["kernels"]["rows"]}

    results.store(tmp_path, "kernels", rows("a", "b"), H200, ENV, {"a": ["old"], "b": ["kept"]})
    path = results.store(tmp_path, "kernels", rows("a", taken=2.0), H200, {**ENV, "date": "2026-01-02"}, {"a": ["new"]})
    assert stored() == {"a": 2.0, "b": 1.0}
    assert results.load(path)["suites"]["kernels"]["notes"] == {"a": ["new"], "b": ["kept"]}
    others = (("commit", "abcdef123457"), ("triton", "3.7"), ("commit", "abcdef123457+"), ("commit", "unknown"))
    for key, value in others:
        changed = {key: value}
        results.store(tmp_path, "kernels", rows("b"), H200, {**ENV, **changed}, {})  # other code: other figures
        assert stored() == {"b": 1.0}
        results.store(tmp_path, "kernels", rows("a"), H200, {**ENV, **changed}, {})
        named = key == "triton" or value == "abcdef123457"
        assert set(stored()) == ({"a", "b"} if named else {"a"})


def test_results_of_several_calls_are_merged_into_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, first, second = (tmp_path / name for name in ("here", "first", "second"))
    for folder in (here, first, second, tmp_path / "tuned"):
        folder.mkdir()
    monkeypatch.setattr(results, "FOLDER", here)
    monkeypatch.setattr(launch_values, "FOLDER", tmp_path / "tuned")
    results.store(first, "kernels", rows("a"), H200, ENV, {})
    results.store(second, "kernels", rows("b"), H200, ENV, {})
    results.store(second, "train", [dataclasses.replace(rows("t")[0], suite="train")], H200, ENV, {})
    (second / "tuned-nvidia-h200.json").write_text('{"moe_forward": []}')
    (second / "gpu-run.json").write_text("{}")
    for folder in (first, second):
        assert gpu.main(["--collect", str(folder)]) == 0
    (file,) = here.glob("*.json")
    suites = results.load(file)["suites"]
    assert [row.case for row in suites["kernels"]["rows"]] == ["a", "b"]
    assert [row.case for row in suites["train"]["rows"]] == ["t"]
    assert (tmp_path / "tuned" / "nvidia-h200.json").read_text() == '{"moe_forward": []}'


def test_a_copy_is_of_the_commit_that_the_plan_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lent machine's own history may be missing, or end before the commit whose files it got."""
    monkeypatch.setattr(results, "commit", lambda code: "unknown")
    monkeypatch.setenv("DTN_COMMIT", "")
    assert results.environment()["commit"] == "unknown"
    monkeypatch.setenv("DTN_COMMIT", "abc")
    assert results.environment()["commit"] == "abc"
    monkeypatch.setattr(results, "commit", lambda code: "def+")
    assert results.environment()["commit"] == "abc"

"""Rooflines against known figures, the timing of contenders, results files, tables and the GPU runner's stages."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dtn_fast.bench import bench_kernels, gpu, results, roofline, tables, timm_sweep
from dtn_fast.bench import run as runner
from dtn_fast.bench.bench_kernels import attention_cases, gate_cases
from dtn_fast.bench.bench_train import techniques, train_cases
from dtn_fast.bench.machine import DATASHEETS, Machine, measure_machine
from dtn_fast.bench.measure import Case, Measurement, lines, measure, seconds
from dtn_fast.bench.roofline import inference, lower_bound, training_lower_bound
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.evaluation.mac_count import count
from dtn_fast.model.config import DTNConfig
from dtn_fast.train.config import Execution

H200 = Machine("H200", 790e12, 4.3e12, "bfloat16")
PAPER = DTNConfig.preset("paper")


def test_floors_are_the_known_ones_of_an_h200() -> None:
    """GFLOP, MB and microseconds an image at batch 256, computed by hand elsewhere."""
    rows = {
        name: [float(gflop), float(mb), float(us)]
        for name, gflop, mb, us, _ in roofline.table(inference(PAPER, 256), 256, H200)
    }
    assert rows["64 channels"] == pytest.approx([3.02, 9.96, 3.82], abs=0.02)
    assert rows["128 channels"] == pytest.approx([3.02, 4.98, 3.82], abs=0.02)
    assert rows["256 channels"] == pytest.approx([4.23, 3.56, 5.35], abs=0.02)
    assert rows["512 channels"] == pytest.approx([4.23, 1.83, 5.35], abs=0.02)
    assert rows["blocks"] == pytest.approx([2.47, 9.6, 3.69], abs=0.03)
    assert rows["32 channels"][2] == pytest.approx(1.02 + 1.95 + 1.53, abs=0.02)
    assert rows["all"] == pytest.approx([19.6, 48, 26.6], rel=0.01)
    steps = [256 / training_lower_bound(PAPER, 256, H200, passes) for passes in (0, 6, 8)]
    assert steps == pytest.approx([12_546, 8_585, 7_789], rel=0.02)


def test_flops_agree_with_the_modules_themselves() -> None:
    for preset in ("paper", "tiny"):
        config = DTNConfig.preset(preset)
        counted = count(config)
        width, tokens = config.channels[-1], (config.image_size // 32) ** 2
        normalised = sum(roofline._output_bytes(config, 1, 1)) + config.depth * tokens * width * (3 + config.mlp_ratio)
        exact = 2 * (
            counted.macs - 4 * normalised + counted.attention_macs
        )  # BN, four operations there, is folded here
        assert sum(part.flops for part in inference(config, 3)) / 3 == pytest.approx(exact, rel=1e-3)


def test_every_layer_of_a_training_step_is_listed() -> None:
    parts = roofline.training(PAPER, 4, 8.0, teacher=True)
    forward = inference(PAPER, 4)
    assert sum(p.flops for p in parts) == pytest.approx(4 * sum(p.flops for p in forward))
    passes = [p for p in parts if p.name.endswith("passes")]
    assert len(passes) == 17
    # 25 MB an image of convolution outputs in 16 bit
    assert sum(p.bytes for p in passes) / 4 / 8 == pytest.approx(25.2e6, rel=0.01)
    names = {row[0] for row in roofline.table(parts, 4, H200, layers=True)}
    assert {"conv 3->32 at 256, backward", "block 5 attention", "teacher gate", "all"} <= names


def test_a_part_is_bound_by_the_slower_of_the_two() -> None:
    part = roofline.Part("", "", flops=1e12, bytes=1e9)
    assert roofline.seconds(part, Machine("", 1e12, 1e12, "")) == 1.0
    assert roofline.seconds(part, Machine("", 1e15, 1e9, "")) == 1.0
    assert lower_bound([part, part], Machine("", 1e12, 1e12, "")) == 2.0


def test_ceilings_of_this_machine_have_the_right_magnitude() -> None:
    machine = measure_machine(torch.device("cpu"), torch.float32, quick=True)
    assert 1e9 < machine.flops < 1e15
    assert 1e8 < machine.bandwidth < 1e14
    for flops, bandwidth in DATASHEETS.values():
        assert 1e14 < flops < 1e16
        assert 1e12 < bandwidth < 1e13


def test_roofline_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "roof.png"
    assert runner.main(["roofline", "--flops", "790e12", "--bandwidth", "4.3e12", "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert "inference: at most 37," in text
    assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        runner.main(["roofline", "--flops", "1", "--plot", str(plot)])


def sleepy(name: str = "case", **fields: object) -> Case:
    calls = {"slow": lambda: time.sleep(0.004), "fast": lambda: time.sleep(0.001)}
    return dataclasses.replace(
        Case("model", name, calls, "fast", "slow", images=8, flops=1e6, lower_bound=5e-4, rounds=4), **fields
    )


def test_contenders_take_turns_and_rows_carry_the_work() -> None:
    order: list[str] = []
    case = sleepy(
        contenders={"slow": lambda: order.append("s") or time.sleep(0.003), "fast": lambda: order.append("f")}
    )
    slow, fast = measure(case)
    assert order == list("sf" * 5), "a warm-up, then four rounds in turns"
    assert slow.ratio == 1.0
    assert fast.ratio > 3
    assert fast.ours
    assert not slow.ours
    assert slow.images_per_second == pytest.approx(8 / slow.median)
    assert slow.tflops == pytest.approx(1e-6 / slow.median)
    assert slow.share == pytest.approx(5e-4 / slow.median)
    assert slow.low <= slow.median <= slow.high
    assert "1.00x" in next(iter(lines([slow])))
    assert (seconds(2.5), seconds(0.0031), seconds(4.2e-6)) == ("2.5 s", "3.1 ms", "4.2 us")


ENV = {"gpu": None, "cpu": "Chip (R) X", "threads": 2, "torch": "2.13.0+cpu", "triton": "3.7.1", "cuda": None,
       "python": "3.11", "commit": "abc", "date": "2026-01-01"}  # fmt: skip


def test_results_are_stored_by_machine_and_suite(tmp_path: Path) -> None:
    rows = measure(sleepy())
    path = results.store(tmp_path, "model", rows, H200, ENV, {"case": ["a note"]})
    assert path.name == "chip-r-x-2t-2.13.0-cpu.json"
    results.store(tmp_path, "data", rows, H200, ENV, {})
    data = results.load(path)
    assert set(data["suites"]) == {"model", "data"}
    assert data["suites"]["model"]["rows"][0] == dataclasses.replace(rows[0], **{
        f.name: float(f"{v:.5g}") for f in dataclasses.fields(Measurement)
        if isinstance(v := getattr(rows[0], f.name), float)
    })  # fmt: skip
    gpu_env = {**ENV, "gpu": "NVIDIA H200", "cuda": "13.0"}
    assert results.file_name(gpu_env) == "nvidia-h200-2.13.0-13.0.json"
    path.write_text("[]")
    with pytest.raises(UsageError, match="not a results file"):
        results.load(path)
    with pytest.raises(UsageError, match="No such file"):
        results.load(tmp_path / "none.json")


def test_compare_shows_what_moved_beyond_the_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def file(name: str, *medians: float) -> Path:
        rows = [Measurement("model", "case", str(i), m, 0.95 * m, 1.05 * m, 1.0) for i, m in enumerate(medians)]
        return results.store(tmp_path / name, "model", rows, H200, ENV, {})

    before, after = file("a", 1.0, 1.0, 1.0), file("b", 0.5, 1.04, 1.5)
    assert runner.main(["compare", str(before), str(after)]) == 0
    text = capsys.readouterr().out
    assert "2.00x  model: case: 0" in text
    assert "0.67x  model: case: 2" in text
    assert ": 1 " not in text
    assert "2 measurements changed" in text
    with pytest.raises(UsageError, match="two results files"):
        runner.main(["compare", str(before)])
    with pytest.raises(UsageError, match="unknown suite 'nothing'"):
        runner.main(["nothing"])


def test_committed_tables_are_made_of_the_committed_results(tmp_path: Path) -> None:
    readme = (tables.REPOSITORY / "README.md").read_text(encoding="utf-8")
    made = readme.split(tables.BEGIN)[1].split(tables.END)[0].strip()
    assert made == tables.readme_table().strip()
    assert (tables.REPOSITORY / "BENCHMARKS.md").read_text(encoding="utf-8") == tables.benchmarks_page()
    assert {path.name for path in tables.plots()} == {path.name for path in results.FOLDER.glob("*.svg")}
    for path, data in tables.plots().items():
        tables.plot(data, tmp_path / path.name)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_what_was_not_run_is_said(tmp_path: Path) -> None:
    assert "**GPU: not run.**" in tables.benchmarks_page(tmp_path)
    assert "not run" in tables.readme_table(tmp_path)
    results.store(tmp_path, "model", measure(sleepy("with | bar")), H200, ENV, {})
    page = tables.benchmarks_page(tmp_path)
    assert "### train\n\nnot run" in page
    assert "| **fast** |" in page
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(UsageError, match="markers"):
        tables.write_tables(tmp_path, tmp_path)


def markdown_tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Header and rows of every table."""
    cells = lambda line: [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.M):
        header, _, *rows = block.splitlines()
        yield cells(header), [cells(row) for row in rows]


def test_gpu_figures_are_measured_or_said_not_to_be() -> None:
    """Where no results file is of a GPU, every cell about one says "not run"; a prediction's column says so, and stands
    in no table with measurements."""
    readme = (tables.REPOSITORY / "README.md").read_text(encoding="utf-8")
    page = (tables.REPOSITORY / "BENCHMARKS.md").read_text(encoding="utf-8")
    measured, structure = page.split("## Structure of the kernels")
    files = [results.load(path) for path in results.machine_files(results.FOLDER)]
    on_gpu = [data for data in files if any(suite["environment"]["gpu"] for suite in data["suites"].values())]
    for data in on_gpu:
        for name, suite in data["suites"].items():
            assert suite["environment"]["gpu"] == data["machine"]["name"], name
            assert results._pure(suite["environment"]["commit"]), f"{name}: a figure without its commit"
    for said, text in (("GPU timings and GPU tests: not run.", readme), ("nothing has been run on a GPU yet", readme),
                       ("| one NVIDIA GPU | everything | not run |", readme), ("**GPU: not run.**", page)):  # fmt: skip
        assert (said in text) == (not on_gpu), said
    if not on_gpu:
        for header, rows in markdown_tables(readme):
            for place in [place for place, name in enumerate(header) if name == "on a GPU"]:
                assert {row[place] for row in rows} == {"not run", ""}
        assert not re.search(r"NVIDIA|H100|H200", measured), "a GPU's figures without its results file"
    assert "predicted" not in measured
    for header, _ in markdown_tables(structure):  # compiled, not run: a time there can only be predicted
        for name in header:
            assert "predicted" in name or not re.search(r"\b(us|ms|s|time|[a-z]+/s)\b", name), name


def test_timm_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two families through everything; what hangs or is too large is a row."""
    rows = list(timm_sweep.sweep(["starnet", "mambaout"], tmp_path))
    assert [r["family"] for r in rows] == ["starnet", "mambaout"]
    assert all([r[name] for name in ("pixels", *timm_sweep.STAGES)] == ["256", "yes", "yes", "yes"] for r in rows)
    page = tables.benchmarks_page(tmp_path)
    assert "Of 2 families 2 train, 2 distil and 2 export." in page
    assert "| starnet | starnet_s050 | 0.4 | 256 | yes | yes | yes |" in page
    (row,) = timm_sweep.sweep(["starnet"], tmp_path, limit=0.1)
    assert row["train"] == "not done within 0 s"
    monkeypatch.setattr(timm_sweep, "LARGEST", 1)
    (row,) = timm_sweep.sweep(["starnet"], tmp_path)
    assert row["train"].startswith("not run: too large")
    assert "Of 2 families 1 train, 1 distil and 1 export." in tables.benchmarks_page(tmp_path)
    from dtn_fast.model import timm_registry  # noqa: F401  (this package's own families are not timm's)

    monkeypatch.setattr(timm_sweep, "_smallest", lambda _, family: pytest.fail(f"{family} tried again"))
    (tmp_path / results.TIMM).write_text((tmp_path / results.TIMM).read_text().replace("starnet", "missing"))
    with pytest.raises(pytest.fail.Exception, match="beit tried again"):  # the first that is not stored
        next(timm_sweep.sweep((), tmp_path))
    with pytest.raises(UsageError, match="--families nothing: unknown"):
        next(timm_sweep.sweep(["nothing"], tmp_path))


def test_kernel_suite_checks_every_contender_before_timing() -> None:
    for case in [*attention_cases(2, 49, torch.float32, H200), *gate_cases(1, torch.float32, H200)]:
        assert case.ours in case.contenders
        assert case.baseline in case.contenders
        assert case.flops > 0
        assert case.lower_bound == max(case.flops / H200.flops, case.bytes / H200.bandwidth)
        assert all(error < 1e-5 for error in case.errors.values())
        assert len(measure(case, 1)) == len(case.contenders)


def test_wrong_answers_are_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_kernels.attention_contenders()
    for factor in (1.1, torch.nan, None):

        def wrong(qkv: torch.Tensor, scale: torch.Tensor, factor: float | None = factor) -> torch.Tensor:
            out = right["dtn_fast"](qkv, scale)
            return (
                out + 0 * (qkv - qkv.detach()).sum().sqrt() if factor is None else factor * out
            )  # None: wrong backward

        monkeypatch.setattr(bench_kernels, "attention_contenders", lambda wrong=wrong: {**right, "wrong": wrong})
        for case in attention_cases(1, 64, torch.float32, None):
            assert set(case.contenders) == set(right)
            assert any(note.startswith("wrong") and "wrong result" in note for note in case.notes)
        monkeypatch.setattr(bench_kernels, "attention_contenders", lambda wrong=wrong: {**right, "dtn_fast": wrong})
        with pytest.raises(DtnError, match=r"dtn_fast.* wrong result"):
            list(attention_cases(1, 64, torch.float32, None))


@pytest.mark.parametrize("dsd", [False, True])
def test_every_training_technique_learns_the_same(dsd: bool) -> None:
    case = next(train_cases("tiny", 4, dsd, None, steps=4))
    assert "separate QKV" in case.baseline
    narrow = any("autocast" in name for name in case.errors)
    for name, error in case.errors.items():
        assert error < (0.1 if narrow and name != case.baseline else 1e-3), name
    assert case.errors[case.baseline] == 0
    assert list(case.contenders)[-1] == ("+ cached soft labels" if dsd else case.ours)
    for call in case.contenders.values():  # a row goes on where its compared steps ended
        assert bool(call().values.isfinite().all())


def test_training_rows_end_at_what_a_run_does_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda")
    rows = techniques(cuda, dsd=True)
    assert [row.name for row in rows[1:]] == [
        "+ bf16 autocast", "+ channels_last", "+ packed QKV, fused attention",
        "+ BN and local connection kernels", "+ fused Adam", "+ folded teacher",
        "+ teacher on its own stream", "+ torch.compile", "+ CUDA graph", "+ cached soft labels",
    ]  # fmt: skip
    last, default = rows[-1], Execution()
    assert all(last[2:])
    assert dataclasses.replace(last.execution, compile="auto", cuda_graph="auto") == default
    assert default.compiled(cuda)
    assert default.captured(cuda, world=1)
    assert [row.name for row in techniques(cuda, dsd=False)][-2:] == ["+ torch.compile", "+ CUDA graph"]
    for before, after in itertools.pairwise(rows):  # one thing at a time
        changed = [a != b for a, b in zip(before[2:], after[2:], strict=True)]
        switches = zip(dataclasses.astuple(before.execution), dataclasses.astuple(after.execution), strict=True)
        assert sum(changed) + sum(a != b for a, b in switches) == 1, after.name


def test_suites_stop_at_the_budget_and_keep_what_they_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dtn_fast.bench.bench_model as suite

    monkeypatch.setattr(suite, "cases", lambda machine, quick: iter([sleepy("one"), sleepy("two"), sleepy("three")]))
    path = runner.run_suite("model", tmp_path, H200, quick=True, budget=0.0)
    assert path is not None
    assert list(tables.by_case(results.load(path)["suites"]["model"]["rows"])) == ["one"]


def test_every_case_compiles_anew_and_convolutions_are_stored_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets: list[int] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr("dtn_fast.bench.bench_model.cases", lambda *_: iter([sleepy("one"), sleepy("two")]))
    path = runner.run_suite("model", tmp_path, H200, quick=True, budget=60)
    assert path is not None
    assert len(resets) == 2  # beyond its limit of recompilations torch.compile runs eagerly and says nothing
    timed = roofline.Conv("conv 3->8 at 4", 1e-3, 0.0, 1e-3, 1e-4)

    def cut_off(*_: object) -> Iterator[roofline.Conv]:
        yield timed
        raise KeyboardInterrupt

    monkeypatch.setattr(roofline, "measure_convolutions", cut_off)
    with pytest.raises(KeyboardInterrupt):
        gpu.convolutions(tmp_path / "cut", dry=True)
    (file,) = (tmp_path / "cut").glob("*.json")
    assert len(results.load(file)["suites"]["convolutions"]["rows"]) == 2


def test_needs_no_installed_package(tmp_path: Path) -> None:
    """From a bare checkout the runner's help must not import what the reference GPU machine lacks."""
    code = ("import sys; import dtn_fast.bench.gpu, dtn_fast.bench.run, dtn_fast.bench.bench_kernels, "
            "dtn_fast.bench.bench_model, dtn_fast.bench.bench_train, dtn_fast.bench.bench_data; "
            "bad = {'tyro', 'dlib', 'av', 'albumentations', 'tensorrt', 'onnxruntime', 'jinja2'} & set(sys.modules); "
            "raise SystemExit(f'imported {bad}' if bad else 0)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=tables.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

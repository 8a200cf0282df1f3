"""Every shipped kernel configuration compiled for every architecture: no spills, it fits, it uses the tensor cores."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import triton

from dtn_fast.bench import results, tables
from dtn_fast.kernels import compile_check, launch_values, mas_attention_kernel

Rows = list[compile_check.CompiledKernel]


@pytest.fixture(scope="module")
def rows(archs: list[int]) -> Rows:
    return compile_check.check_all(archs)


def test_nothing_spills_everything_fits_and_uses_tensor_cores(rows: Rows, archs: list[int]) -> None:
    assert {r.arch for r in rows} == set(archs)
    assert [(r, r.problems()) for r in rows if r.problems()] == []


def test_every_kernel_is_compiled_for_every_architecture(rows: Rows, archs: list[int]) -> None:
    kernels = {r.kernel for r in rows}
    expected = {
        "mas_small_forward",
        "mas_small_backward",
        "mas_flash_forward",
        "mas_flash_backward_dq",
        "mas_flash_backward_dkdv",
        "moe_forward",
        "moe_backward_rows",
        "moe_backward_weight",
        "bn_stats",
        "bn_merge",
        "bn_apply",
        "bn_backward_stats",
        "bn_backward_apply",
        "lc_forward",
        "lc_backward",
    }
    persistent = {"mas_small_forward_persistent", "mas_small_backward_persistent"}
    for arch in archs:
        here = {r.kernel for r in rows if r.arch == arch}
        assert expected <= here
        assert here & persistent == (
            persistent if arch in (90, 100) else {"mas_small_forward_persistent"} if arch > 100 else set()
        )
    assert kernels == expected | persistent


def test_the_papers_shape_is_one_pass_everywhere(rows: Rows, archs: list[int]) -> None:
    for arch in archs:
        names = {r.kernel for r in rows if (r.arch, r.shape, r.dtype) == (arch, "N=64 D=64", "bfloat16")}
        assert {"mas_small_forward", "mas_small_backward"} <= names
        assert not {n for n in names if "flash" in n}


def test_problems_are_seen(rows: Rows) -> None:
    """The check can fail: a spill, too much memory, a lost tensor core are each named."""
    bad = rows[0]._replace(spill=8, shared=10**6, tensor_core=0, vector_load=0)
    assert len(bad.problems()) == 4
    with compile_check.target(80):  # and a real one: 128 positions in one pass do not fit sm_80's registers
        before = dict(launch_values.override)
        launch_values.override["mas_small_backward"] = {"num_warps": 4, "num_stages": 1}
        try:
            launches = compile_check.mas_launches(128, 64, torch.bfloat16)
            row = compile_check.inspect(launches[-1], 80, "N=128 D=64", torch.bfloat16)
        finally:
            launch_values.override.clear()
            launch_values.override.update(before)
    assert any("spills" in problem for problem in row.problems())


def test_dispatch_specialises_as_a_launch_would() -> None:
    """Through Triton's own dispatch: packed strides are seen as multiples of 16, odd ones are not."""
    with compile_check.target(90):
        qkv = torch.empty(2, 64, 3, 8, 64, dtype=torch.bfloat16, device="meta")
        parts = qkv.unbind(2)
        (launch,) = mas_attention_kernel.forward(
            *parts, torch.empty(8, device="meta"), torch.empty_like(parts[0]), parts[0]
        )
        assert launch.grid == (16,)
        wide = launch.compile().asm["ptx"]
        odd = torch.empty(2, 64, 3, 8, 65, dtype=torch.bfloat16, device="meta")[..., :64].unbind(2)
        (launch,) = mas_attention_kernel.forward(
            *odd, torch.empty(8, device="meta"), torch.empty_like(parts[0]), parts[0]
        )
        narrow = launch.compile().asm["ptx"]
    assert len(compile_check.VECTOR_LOAD.findall(wide)) > len(compile_check.VECTOR_LOAD.findall(narrow))


def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rows: Rows) -> None:
    monkeypatch.setattr(compile_check, "check_all", lambda archs, processes: [r for r in rows if r.arch in archs])
    assert compile_check.main(["--arch", "86", "90", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {r["arch"] for r in data["rows"]} == {86, 90}
    assert data["triton"]
    assert compile_check.main(["--arch", "90"]) == 0
    assert "mas_small_forward" in capsys.readouterr().out
    monkeypatch.setattr(compile_check, "check_all", lambda archs, processes: [rows[0]._replace(spill=4)])
    assert compile_check.main(["--arch", "80"]) == 1
    with pytest.raises(SystemExit):
        compile_check.main(["--arch", "70"])


def test_launch_values_cover_every_kernel_and_prefer_the_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = json.loads((launch_values.FOLDER / "default.json").read_text())
    assert all("when" not in rows[-1] for rows in default.values()), "the default's last row fits any shape"
    monkeypatch.setattr(launch_values, "FOLDER", tmp_path)
    for name, warps in (("default", 4), ("sm90", 8), ("nvidia-h200", 16)):
        (tmp_path / f"{name}.json").write_text(
            json.dumps({"k": [{"when": {"N": 64}, "num_warps": warps, "num_stages": 1}]})
        )
    try:
        for gpu, n, expected in ((("nvidia-h200", 90), 64, 16), (("other", 90), 64, 8), (("other", 80), 49, 4)):
            launch_values._read.cache_clear()
            launch_values._lookup.cache_clear()
            assert launch_values._lookup("k", gpu, 2, ("N", n))["num_warps"] == expected
        with pytest.raises(KeyError, match="no launch values"):
            launch_values._lookup("k", ("other", 80), 2, ("N", 65))
        # what was measured at a large batch, or for pooled maps, serves no small batch and no other map
        for size, bound in (("T", 2112), ("POOL", 0)):
            family = [{"when": {size: bound}, "num_warps": 4, "num_stages": 1}, {"num_warps": 2, "num_stages": 1}]
            (tmp_path / "sm90.json").write_text(json.dumps({"k": family}))
            measured = [{"when": {"bytes": 2}, "num_warps": 8, "num_stages": 1}]
            for rows, at, expected in ((measured, bound, 4), (measured, bound + 1, 8),
                                       ([{**measured[0], "when": {size: bound}}, *measured], bound, 8)):  # fmt: skip
                (tmp_path / "nvidia-h200.json").write_text(json.dumps({"k": rows}))
                launch_values._read.cache_clear()
                launch_values._lookup.cache_clear()
                assert launch_values._lookup("k", ("nvidia-h200", 90), 2, (size, at))["num_warps"] == expected
    finally:
        launch_values._read.cache_clear()
        launch_values._lookup.cache_clear()
    assert launch_values.slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"


def test_the_committed_report_is_this_triton_s(rows: Rows, archs: list[int]) -> None:
    stored = json.loads((results.FOLDER / results.STRUCTURE).read_text(encoding="utf-8"))
    pinned = re.search(r"^triton==(\S+)", (tables.REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    if triton.__version__ != pinned[1]:
        pytest.skip(f"the committed report is of Triton {pinned[1]}")
    assert stored["triton"] == triton.__version__, "run dtn-fast bench structure, then dtn-fast bench tables"
    compiled = [{**row._asdict(), "occupancy": round(row.occupancy(), 3)} for row in rows]
    assert compiled == [row for row in stored["rows"] if row["arch"] in archs]


def test_occupancy() -> None:
    row = compile_check.CompiledKernel(
        90, "k", "", "", 4, 1, registers=128, spill=0, stack=0, shared=32 * 1024, tensor_core=1, vector_load=1
    )
    assert row.occupancy() == 16 / 64  # 65,536 registers / (128 a thread * 128 threads) = 4 blocks of 4 warps
    assert row._replace(shared=110 * 1024).occupancy() == 8 / 64
    assert row._replace(registers=16, shared=0).occupancy() == 1.0

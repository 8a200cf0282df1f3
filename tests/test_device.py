"""The number of threads that a process may use: its cores, its container's quota, OMP_NUM_THREADS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dtn_fast.device import choose_threads
from dtn_fast.errors import UsageError


@pytest.fixture
def eight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Root folder of a machine with eight cores, of which this process may use all."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores(tmp_path, [str(cpu) for cpu in range(8)])
    return tmp_path


def cores(root: Path, siblings: list[str]) -> None:
    for cpu, text in enumerate(siblings):
        write(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", text)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_one_thread_per_core(eight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_threads(0, eight) == 8
    cores(eight, ["0,4", "1,5", "2,6", "3,7"] * 2)
    assert choose_threads(0, eight) == 4, "two threads of one core are not two cores"
    assert choose_threads(8, eight) == 8, "more may be asked for"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {1, 5})
    assert choose_threads(0, eight) == 1, "the process is bound to one core"
    assert choose_threads(0, eight / "no such system") == 2


@pytest.mark.parametrize(("given", "most"), [("3", 3), ("16", 8), ("2,4", 2), ("", 8), ("0", 8), ("many", 8)])
def test_omp_num_threads_is_kept(given: str, most: int, eight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert choose_threads(0, eight) == most


@pytest.mark.parametrize(
    ("groups", "files", "most"),
    [
        ("0::/", {"cpu.max": "250000 100000"}, 2),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "damaged"}, 8),
        ("0::/pod/one", {"pod/one/cpu.max": "max 100000", "pod/cpu.max": "300000 100000"}, 3),
        ("0::/pod/one", {"pod/one/cpu.max": "200000 100000", "pod/cpu.max": "300000 100000"}, 2),
        ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu:/docker/abc", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, 2),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("5:cpuset:/\n0::/", {"cpuset/cpu.max": "100000 100000"}, 8),
        ("0::/../other", {"cpu.max": "200000 100000"}, 2),
    ],
)
def test_the_quota_of_the_container_is_kept(groups: str, files: dict[str, str], most: int, eight: Path) -> None:
    write(eight / "proc/self/cgroup", groups)
    for name, text in files.items():
        write(eight / "sys/fs/cgroup" / name, text)
    assert choose_threads(0, eight) == most


def test_too_many_threads_are_refused_with_the_limit(eight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(eight / "proc/self/cgroup", "0::/")
    write(eight / "sys/fs/cgroup/cpu.max", "200000 100000")
    assert choose_threads(2, eight) == 2
    with pytest.raises(UsageError, match="--threads 3: the CPU quota of this container allows 2; give fewer"):
        choose_threads(3, eight)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(UsageError, match="--threads 2: OMP_NUM_THREADS allows 1"):
        choose_threads(2, eight)
    monkeypatch.delenv("OMP_NUM_THREADS")
    (eight / "proc/self/cgroup").unlink()
    with pytest.raises(UsageError, match="--threads 9: the CPU set of this process allows 8"):
        choose_threads(9, eight)

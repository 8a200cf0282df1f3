"""Shared material: a miniature synthetic set, its crops, a small trained run, made once per session."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small import RECIPE, SET, SMALL

from dtn_fast import DTN
from dtn_fast.data.config import PrepareConfig, WorkConfig
from dtn_fast.data.crop_dataset import CropDataset, open_crop_dataset
from dtn_fast.data.datasets.ffpp import read_ffpp
from dtn_fast.data.prepare import prepare
from dtn_fast.data.synthetic_faces import make_synthetic
from dtn_fast.train.distill import train_initial
from dtn_fast.train.run_folder import start_run

LONGEST = (
    "test_compile_check.py", "test_ablate.py", "test_prepare.py", "test_distributed.py", "test_bench.py",
    "test_extras.py", "test_containers.py", "test_gpu_calls.py", "test_step.py", "test_tensorrt_plugin.py",
    "test_cli.py", "test_ops.py", "test_app.py",
)  # fmt: skip
"""Files that take longest, begun first so that no worker ends with one of them alone."""


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "every architecture, forgery and gradient element, the compared models at full size, and packages installed"
    parser.addoption("--full", action="store_true", help=help)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


BACKENDS = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """The command line handles signals of the whole process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def own_backends() -> None:
    """A training step sets arithmetic of the whole process; no test may meet what another left behind."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = BACKENDS


@pytest.fixture(scope="session")
def video_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synthetic") / "set"
    for _ in make_synthetic(root, SET, workers=2):
        pass
    return root


@pytest.fixture(scope="session")
def crops(video_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("crops")
    for _ in prepare(read_ffpp(video_set), out, SMALL.image_size, PrepareConfig(frames=3, masks=True), WorkConfig()):
        pass
    return out


@pytest.fixture(scope="session")
def dataset(crops: Path) -> CropDataset:
    return open_crop_dataset(crops)


@pytest.fixture(scope="session")
def trained(dataset: CropDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose generation 0 is done."""
    run = tmp_path_factory.mktemp("run")
    start_run(run, RECIPE, SMALL)
    for _ in train_initial(run, dataset):
        pass
    return run


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """Whether to test all of what takes long, as CI does, and not a part that shows most faults."""
    return bool(pytestconfig.getoption("full"))


@pytest.fixture(scope="session")
def archs(full: bool) -> list[int]:
    """Compute capabilities x 10 to compile for: the least shared memory, and Hopper; or all with --full."""
    from dtn_fast.kernels.compile_check import SHARED_LIMIT

    return sorted(SHARED_LIMIT) if full else [86, 90]


@pytest.fixture
def small() -> DTN:
    torch.manual_seed(0)
    return DTN(SMALL).eval()

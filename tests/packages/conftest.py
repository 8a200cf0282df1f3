"""The wheel, the source distribution and fresh environments to install them in; all of it needs the package index."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packages.fresh import CONSTRAINTS, copy_tree, succeed, tracked, uv


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("full"):
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.skip(reason="installs packages: runs with --full"))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``tree``: wheel built from the checkout; ``sdist``; ``wheel``: built from the sdist."""
    folder = tmp_path_factory.mktemp("built")
    copy_tree(tracked(), folder / "checkout")
    succeed(uv("build", "--wheel", "--out-dir", folder / "tree", folder / "checkout"))
    succeed(uv("build", "--out-dir", folder / "dist", folder / "checkout"))
    patterns = {"tree": "tree/*.whl", "sdist": "dist/*.tar.gz", "wheel": "dist/*.whl"}
    return {name: next(folder.glob(pattern)) for name, pattern in patterns.items()}


@pytest.fixture(scope="session")
def environment(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Function: an extra's name, or core -> Python of an environment that has the wheel with it and nothing else.

    One environment changes its packages, which is quick; their bytecode is kept beside it, not among them.
    """
    folder = tmp_path_factory.mktemp("environment")
    succeed(uv("venv", "--python", sys.executable, folder / "env"))

    def make(extra: str) -> Path:
        wheel = str(built["wheel"]) if extra == "core" else f"dtn-fast[{extra}] @ {built['wheel'].as_uri()}"
        python = folder / "env" / "bin" / "python"
        succeed(uv("pip", "install", "--exact", "--python", python, "--constraint", CONSTRAINTS, wheel))
        return python

    return make

"""These tests run the Triton kernels in Triton's interpreter: TRITON_INTERPRET=1 before Triton is imported."""

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        for item in items:
            if "interpreted" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="make test runs these with TRITON_INTERPRET=1"))

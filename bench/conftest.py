"""pytest-benchmark for the suites' cases; the suites' own tables are printed below pytest-benchmark's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dtn_fast.bench.measure import Case, Measurement, lines, measure

ROWS = pytest.StashKey[list[tuple[Case, list[Measurement]]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Case], None]:
    """Times a case's contenders in turns; pytest-benchmark records this project's contender of the first case."""
    done: list[Case] = []

    def run(case: Case) -> None:
        rounds = case.rounds if benchmark.enabled else 1
        request.config.stash[ROWS].append((case, measure(case, rounds)))
        if not done and case.ours in case.contenders:
            done.append(case)
            benchmark.extra_info["case"] = case.title
            benchmark.pedantic(case.contenders[case.ours], rounds=rounds)

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for case, rows in config.stash[ROWS]:
        terminalreporter.section(case.title)
        for text in [*lines(rows), *case.notes]:
            terminalreporter.write_line(text)

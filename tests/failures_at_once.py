"""Plugin of pytest that prints each failure as it comes, for a run that may be killed before its end.

Run: python -m pytest -p tests.failures_at_once
"""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(FailuresAtOnce(config))


class FailuresAtOnce:
    def __init__(self, config: pytest.Config) -> None:
        self.plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.plugins.get_plugin("terminalreporter")  # none in a worker of xdist
        if report.failed and terminal:
            terminal.write_line(f"\n{report.nodeid}\n{report.longreprtext}")

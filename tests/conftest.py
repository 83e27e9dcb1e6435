"""Fixtures and rules that every test sees."""

import os
from collections.abc import Generator
from typing import TypeVar

import pytest

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

_HARDWARE = "hardware:"
"""How the reason of a skip begins when the machine lacks a device (a GPU, say): the only skip that CI accepts."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI, turn the report of a skipped test into that of a failed one."""
    return _fail_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """In CI, turn a file that skips itself into an error."""
    return _fail_if_skipped((yield))


def _fail_if_skipped(report: Report) -> Report:
    if os.environ.get("CI") != "true" or not report.skipped or hasattr(report, "wasxfail"):
        return report
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not reason.removeprefix("Skipped: ").startswith(_HARDWARE):
        report.outcome = "failed"
        report.longrepr = f"{reason}\nCI skips nothing but what needs a device: begin the reason with {_HARDWARE!r}"
    return report

"""Fixtures and rules that every test sees."""

import os
from collections import Counter
from collections.abc import Generator
from typing import TypeVar

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

_HARDWARE = "hardware:"
"""How the reason of a skip begins when the machine lacks a device (a GPU, say): the only skip that CI accepts."""

EVERY = 12
"""Of the cells of a matrix, a test run takes the first and every twelfth after it."""

_CLUSTERS = ("tests/jobs/", "tests/orchestration/")
"""Tests that start Ray or Slurm and mostly wait."""
_PROJECT = ("tests/project/test_benchmarks", "tests/project/test_documents")
"""Tests of minutes; each of the two files goes to whichever process is ready for it first."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say how to run every cell."""
    parser.addoption("--exhaustive", action="store_true", help="run every cell of the matrices, not a part of them")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cells of matrices, long tests, and what DeepSpeed has to compile something for first, in minutes."""
    if config.getoption("exhaustive"):
        return
    compiled = "nvme" in config.getoption("markexpr")
    seen: Counter[str] = Counter()
    left_out = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if item.get_closest_marker("exhaustive") or (item.get_closest_marker("nvme") and not compiled):
            left_out.add(item)
        matrix = item.get_closest_marker("matrix")
        if matrix is not None and seen[test] % matrix.kwargs.get("every", EVERY):
            left_out.add(item)
        seen[test] += 1
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


class Groups(LoadScopeScheduling):
    """One process waits for clusters while the other computes."""

    def _split_scope(self, nodeid: str) -> str:
        for name in _PROJECT:
            if nodeid.startswith(name):
                return name
        return "clusters" if nodeid.startswith(_CLUSTERS) else "others"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Groups:
    """Tell processes of xdist which tests each of them runs."""
    return Groups(config, log)


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

"""Who is named when all-reduces are slow, on networks whose slow and broken nodes are known."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.orchestration.bisection import LEAF, Collectives, Group, bisect, halves
from launcher.orchestration.diagnosis import Link

FAST, SLOW = 1e9, 1e8


def named(count: int) -> list[str]:
    return [f"n{index:02d}" for index in range(count)]


def leaves(group: Group) -> int:
    return sum(map(leaves, halves(group))) if len(group) > LEAF else 1


def network(of_group: Callable[[Group], Link]) -> Callable[[Sequence[Group]], list[Link]]:
    """An all-reduce in each of some groups; nobody may be asked twice at a time."""

    def measure(groups: Sequence[Group]) -> list[Link]:
        asked = [name for group in groups for name in group]
        assert len(asked) == len(set(asked))
        assert all(len(group) > 1 for group in groups)
        return [of_group(group) for group in groups]

    return measure


def fast_or(bad: dict[str, Link]) -> Callable[[Group], Link]:
    """A group is as its worst node."""

    def of_group(group: Group) -> Link:
        found = [bad[name] for name in group if name in bad]
        fine: Link = {"latency_s": 1e-5, "bytes_per_second": FAST}
        return next((link for link in found if "error" in link), found[0] if found else fine)

    return of_group


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[str], dict[str, Link]]:
    """Nodes, fewer of them bad than there are leaves: so one leaf at least is sound."""
    names = named(draw(st.integers(2, 40)))
    bad = draw(st.sets(st.sampled_from(names), max_size=leaves(tuple(names)) - 1)) if len(names) > LEAF else set()
    kinds: list[Link] = [{"error": "timed out"}, {"latency_s": 1e-3, "bytes_per_second": SLOW}]
    return names, {name: draw(st.sampled_from(kinds)) for name in sorted(bad)}


@given(clusters())
def test_all_that_are_slow_or_broken_are_named_and_nobody_else(cluster: tuple[list[str], dict[str, Link]]) -> None:
    names, bad = cluster
    found = bisect(names, network(fast_or(bad)))
    assert {finding.node: finding.level for finding in found.findings} == {
        name: "error" if "error" in link else "warning" for name, link in bad.items()
    }


@pytest.mark.parametrize("slow", named(3))
def test_one_of_three(slow: str) -> None:
    found = bisect(named(3), network(fast_or({slow: {"latency_s": 1e-3, "bytes_per_second": SLOW}})))
    (finding,) = found.findings
    assert finding.node == slow
    assert "slow in an all-reduce: 100 MB/s with" in finding.text
    assert finding.text.endswith("1,000 at best elsewhere")


def test_a_slow_way_between_two_halves_is_no_nodes_fault() -> None:
    names = named(16)
    first = set(names[:8])

    def of_group(group: Group) -> Link:
        crosses = 0 < len(first & set(group)) < len(group)
        return {"latency_s": 1e-5, "bytes_per_second": SLOW if crosses else FAST}

    (finding,) = bisect(names, network(of_group)).findings
    assert finding.node == ""
    assert finding.level == "warning"
    assert "together: 100 MB/s; over each of the two by itself 1,000 MB/s" in finding.text


def test_where_nothing_works_one_error_says_so() -> None:
    (finding,) = bisect(named(9), network(lambda group: {"error": "refused"})).findings
    assert str(finding) == "error: no all-reduce ends between any two nodes: refused"


def test_few_measurements_are_enough() -> None:
    calls: list[int] = []

    def measure(groups: Sequence[Group]) -> list[Link]:
        calls.append(len(groups))
        return network(fast_or({}))(groups)

    found = bisect(named(1024), measure)
    assert len(calls) == 10, "1024 nodes, 512, ... 2"
    assert found.findings == []
    assert bisect(named(1), measure) == Collectives()

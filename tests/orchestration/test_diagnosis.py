"""What the doctor makes of the facts; a real cluster with something wrong stands in test_doctor.py."""

from itertools import combinations
from typing import Any

import pytest

from launcher.orchestration.bisection import rounds
from launcher.orchestration.diagnosis import (
    bad_links,
    odd_versions,
    short_of_something,
    skewed_clocks,
    slower_than_before,
    unshared,
)
from launcher.orchestration.probe import xids

GIB = 2**30
NODES = ("n1", "n2", "n3", "n4")


def facts(**changes: Any) -> dict[str, Any]:
    versions = {"python": "3.11.7", "torch": "2.13.0"}
    plenty = {"memory_available": 9 * GIB, "temporary_free": 9 * GIB, "run_free": 9 * GIB}
    return {"versions": versions, "resolves": True, "gpus": [], "xids": {}, **plenty, **changes}


def links(**changed: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {
        pair: {"latency_s": 1e-4, "bytes_per_second": 1e9} for pair in combinations(NODES, 2)
    }
    for pair, link in changed.items():
        one, other = pair.split("_")
        found[one, other] = link
    return found


BROKEN = {"error": "timed out"}
SLOW = {"latency_s": 1e-4, "bytes_per_second": 1e8}


def test_the_node_with_another_version_is_named() -> None:
    nodes = {name: facts() for name in NODES}
    assert odd_versions(nodes) == []
    nodes["n3"] = facts(versions={"python": "3.11.7", "torch": "2.12.0"})
    (finding,) = odd_versions(nodes)
    assert (finding.level, finding.node) == ("error", "n3")
    assert finding.text.startswith("torch is 2.12.0, and 2.13.0 on most nodes")


def test_a_node_that_is_short_of_something_is_named() -> None:
    gpu = {"index": "5", "memory.used": "3000", "ecc.errors.uncorrected.volatile.total": "2"}
    fine = {"index": "0", "memory.used": "4", "ecc.errors.uncorrected.volatile.total": "[N/A]"}
    nodes = {name: facts(gpus=[fine, fine]) for name in NODES}
    assert short_of_something(nodes) == []
    nodes["n2"] = facts(run_free=GIB // 2, resolves=False, gpus=[fine, gpu], xids={"0000:3b:00": [63, 79]})
    nodes["n4"] = facts(gpus=[fine])
    assert [str(finding) for finding in short_of_something(nodes)] == [
        "warning: n2: run directory's disk: 0.5 GiB free, less than 1",
        "warning: n2: its own host name does not resolve; add it to /etc/hosts",
        "error: n2: GPU 5 has 2 uncorrected ECC errors; have it looked at",
        "error: n2: GPU 5 has 3000 MiB in use by somebody",
        "warning: n2: GPU 0000:3b:00 has had errors since boot (Xid 63, 79)",
        "error: n4: shows 1 GPUs, and 2 on most nodes",
    ]


def test_gpus_that_a_run_wants_and_no_node_shows_are_missed() -> None:
    fine = {"index": "0", "memory.used": "4", "ecc.errors.uncorrected.volatile.total": "0"}
    found = short_of_something({"n1": facts(), "n2": facts()}, gpus_per_node=2)
    assert [str(finding) for finding in found] == [
        f"warning: {name}: nvidia-smi shows 0 GPUs, and a run wants 2" for name in ("n1", "n2")
    ]
    (few,) = short_of_something({"n1": facts(gpus=[fine])}, gpus_per_node=2)
    assert str(few) == "error: n1: nvidia-smi shows 1 GPUs, and a run wants 2"


def test_what_the_kernel_says_of_gpus() -> None:
    log = (
        "[    7.1] NVRM: loading NVIDIA UNIX x86_64 Kernel Module  580.82\n"
        "[ 9041.2] NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n"
        "[ 9041.3] NVRM: Xid (PCI:0000:3b:00): 63, pid=4411, Row Remapper: New row marked for remapping\n"
        "[ 9055.0] NVRM: Xid (PCI:0000:3b:00): 79, pid=4411\n"
    )
    assert xids(log) == {"0000:3b:00": [63, 79]}
    assert xids("") == {}


def test_clocks_and_directories() -> None:
    (skewed,) = skewed_clocks({"n1": 0.01, "n2": -7.0, "n3": 0.02})
    assert str(skewed) == "warning: n2: its clock is 7.0 s behind"
    (finding,) = unshared("/runs", "n1", "", {"n1": True, "n2": True, "n3": False})
    assert finding.node == "n3"
    (finding,) = unshared("/runs", "n1", "Read-only file system", {})
    assert "cannot be written: Read-only file system" in finding.text


def test_a_node_that_nobody_reaches_is_named_alone() -> None:
    found = bad_links(links(n1_n3=BROKEN, n2_n3=BROKEN, n3_n4=BROKEN))
    assert [finding.node for finding in found] == ["n3"]
    assert "no connection with n1, n2, n4: timed out" in found[0].text


def test_two_nodes_that_do_not_reach_each_other_are_both_named() -> None:
    assert [finding.node for finding in bad_links(links(n2_n4=BROKEN))] == ["n2", "n4"]
    both = bad_links(links(n1_n3=BROKEN, n2_n3=BROKEN, n3_n4=BROKEN, n1_n2=BROKEN))
    assert [finding.node for finding in both] == ["n3", "n1", "n2"]


def test_a_node_all_of_whose_links_are_slow_is_named_alone() -> None:
    assert bad_links(links(n1_n3=SLOW)) == [], "one slow link is no slow node"
    (found,) = bad_links(links(n1_n3=SLOW, n2_n3=SLOW, n3_n4=SLOW))
    assert found.node == "n3"
    assert "100 MB/s at best, 1,000 MB/s between the others" in found.text


def test_the_last_time_is_remembered() -> None:
    assert slower_than_before("connection", 8e8, 1e9) == []
    assert slower_than_before("connection", 1e9, None) == []
    (finding,) = slower_than_before("connection", 6e8, 1e9)
    assert "600 MB/s, 1,000 MB/s last time" in finding.text


@pytest.mark.parametrize("count", range(8))
def test_every_pair_is_measured_once_and_nobody_twice_at_a_time(count: int) -> None:
    names = [f"n{index}" for index in range(count)]
    schedule = rounds(names)
    pairs = [frozenset(pair) for pairs in schedule for pair in pairs]
    assert len(pairs) == len(set(pairs)) == count * (count - 1) // 2
    for pairs_of_round in schedule:
        busy = [name for pair in pairs_of_round for name in pair]
        assert len(busy) == len(set(busy))

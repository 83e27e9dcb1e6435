"""States in memory: what counts as whole, what is dropped when, and that a part outlives the process that made it."""

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

from launcher.checkpoints.manifest import RankManifest
from launcher.checkpoints.memory import Generation, Kept, Offer, Part, Shelf, newest_whole
from tests.checkpoints.conftest import manifest_of

OWNER = """
import os, sys
memory = os.memfd_create("rank")
os.write(memory, b"....weights" + b"states")
print(memory, flush=True)
sys.stdin.read()
"""
FILES = {"model.pt": (4, 7), "optim.pt": (11, 6)}


def part(rank: int) -> RankManifest:
    return RankManifest(rank=rank, token="t", files={f"optim_{rank}.pt": {"size": 1, "xxh3_128": "0" * 32}})


def kept(token: str, step: int, ranks: tuple[int, ...], *, manifest: bool = False) -> Kept:
    return Kept(
        token, step, manifest_of(step).model_dump_json() if manifest else None, {rank: part(rank) for rank in ranks}
    )


def newest(nodes: Mapping[str, list[Kept]]) -> Generation | None:
    return newest_whole(nodes)


def test_a_generation_counts_when_everything_of_it_is_somewhere() -> None:
    found = newest({"n1": [kept("t", 10, (0, 1), manifest=True)], "n2": [kept("t", 10, (1,))]})
    assert found is not None
    assert (found.token, found.manifest.step, found.manifest.consumed_samples) == ("t", 10, 80)
    assert sorted(found.manifest.files) == ["optim_0.pt", "optim_1.pt"]
    assert found.places == {0: ("n1",), 1: ("n1", "n2")}


def test_one_that_lacks_a_part_or_its_manifest_is_passed_over() -> None:
    whole = kept("old", 10, (0, 1), manifest=True)
    assert newest({"n1": [whole, kept("new", 15, (0,), manifest=True)]}).token == "old"
    assert newest({"n1": [whole], "n2": [kept("new", 15, (0, 1))]}).token == "old"
    assert newest({"n1": [kept("new", 15, (0,), manifest=True)]}) is None
    assert newest({}) is None


def test_the_newest_is_that_of_the_largest_step() -> None:
    generations = [kept(f"t{step}", step, (0, 1), manifest=True) for step in (20, 5, 15)]
    assert newest({"n1": generations}).manifest.step == 20


@pytest.fixture
def owner():
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def offer(process: "subprocess.Popen[str]", token: str, step: int, known: str | None = None) -> Offer:
    descriptor = int(process.stdout.readline())
    return Offer(token, step, 0, process.pid, descriptor, FILES, "{}", known)


def test_what_a_rank_shared_stays_when_the_rank_is_gone(owner: "subprocess.Popen[str]") -> None:
    shared = Part.shared_by(offer(owner, "t", 10))
    shared.records = {name: shared.hashed(name) for name in FILES}
    owner.kill()
    owner.wait()
    with shared.open("model.pt") as content:
        assert content.read(3) == b"wei"
        content.seek(-3, os.SEEK_END)
        assert content.read() == b"hts"
    assert shared.hashed("optim.pt") == shared.records["optim.pt"]
    shared.close()
    with pytest.raises(OSError, match="not kept any more"):
        shared.open("model.pt")


def test_memory_that_changed_is_noticed(owner: "subprocess.Popen[str]") -> None:
    given = offer(owner, "t", 10)
    shelf, shared = Shelf(), Part.shared_by(given)
    shared.records = {name: shared.hashed(name) for name in FILES}
    shelf.put("t", 10, shared, None, None)
    assert shelf.faults("t", 0, FILES) == []
    writable = os.open(f"/proc/{owner.pid}/fd/{given.descriptor}", os.O_RDWR)
    os.pwrite(writable, b"X", 12)
    os.close(writable)
    assert shelf.faults("t", 0, FILES) == ["optim.pt: its content has changed in memory"]
    shared.close()


def test_two_generations_are_held_and_a_part_counts_once_it_is_hashed() -> None:
    shelf = Shelf()
    for number, known in ((1, None), (2, "t1"), (3, "t2")):
        shelf.put(f"t{number}", 5 * number, Part.of_size(0, 4, {"a.pt": (0, 4)}), "{}" if number < 3 else None, known)
    assert [(item.token, item.step, item.manifest, item.parts) for item in shelf.inventory()] == [
        ("t2", 10, "{}", {}),
        ("t3", 15, None, {}),
    ]
    arrived = shelf.parts["t3"][0]
    os.pwrite(arrived.descriptor, b"abcd", 0)
    arrived.records = {"a.pt": arrived.hashed("a.pt")}
    (_, last) = shelf.inventory()
    assert last.parts[0].files["a.pt"].size == 4
    shelf.put("t4", 20, Part.of_size(0, 4, {}), None, None)
    assert [item.token for item in shelf.inventory()] == ["t4"], "an attempt that began elsewhere keeps nothing older"
    shelf.parts["t4"][0].close()

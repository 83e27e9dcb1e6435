"""Every second of a run is accounted for; the report shows it. The real runs' accounts are checked in test_run.py."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.orchestration.accounting import Ledger, account
from launcher.orchestration.journal import Journal, read_account
from launcher.orchestration.report import as_html, as_markdown
from launcher.orchestration.states import GroupStatus, RunState
from launcher.run_directory import RunDirectory, read_json_lines
from launcher.training.context import Beat, Phase

SPENT = {"starting": 1.0, "import": 5.0, "rendezvous": 1.0, "engine": 2.0, "load": 1.0, "data": 4.0, "forward": 30.0}
SPENT |= {"backward": 50.0, "optimizer": 16.0, "evaluate": 6.0, "save": 3.0}


def ledger(*, saved: float = 0.0, first: float = 10.0) -> dict[str, Any]:
    """100 s of 91 steps, the first of them 10 s; `saved` of the forward seconds came before the newest checkpoint."""
    before = {"forward": saved} if saved else {}
    return Ledger(SPENT, before, first, 91, 91, 50).as_json()


def event(time: float, state: str, **facts: Any) -> dict[str, Any]:
    return {"time": time, "state": state, **facts}


JOB = {"submitted": 100.0, "started": 110.0, "ray_head": 115.0, "nodes_joined": 118.0}
EVENTS = [
    event(125, "starting", driver_started=120, moments=JOB),
    event(130, "running", attempt=1),
    event(252, "recovering", attempt=1, ledger=ledger(saved=25.0), teardown_seconds=1.0, delay=2.0, rank=3, node="n2",
          category="infrastructure", evidence="killed | by signal 9", step=91, phase="backward"),
    event(260, "waiting for nodes", attempt=1),
    event(290, "running", attempt=2),
    event(292, "straggler", rank=5, message="rank 5 on node n1 is a straggler"),
    event(295, "draining", attempt=2),
    event(412, "stopped", attempt=2, ledger=ledger(saved=100.0)),
]  # fmt: skip


def test_every_second_has_its_place() -> None:
    found = account(EVENTS)
    assert found.wall == 312
    assert sum(found.seconds.values()) == pytest.approx(312)
    assert found.seconds == pytest.approx(
        {
            "queue": 10, "start-up: ray head": 5, "start-up: workers joined": 3, "start-up: driver": 2,
            "start-up: data": 5, "start-up: worker group": 5, "start-up: import": 5, "start-up: rendezvous": 1,
            "start-up: engine": 2, "start-up: load": 1, "compile": 9, "training": 16 + 91, "lost work": 75 + 6 + 6,
            "checkpoint": 6, "recovery: detect": 3 - 1 + 1, "recovery: tear down": 1, "recovery: back-off": 2,
            "recovery: worker group": 6, "idle: waiting for nodes": 30, "recovery: import": 5,
            "recovery: rendezvous": 1, "recovery: engine": 2, "recovery: load": 1, "recovery: first step": 9,
            "idle: ending": 4 + 0,
        }
    )  # fmt: skip
    assert found.allocated == 302
    assert found.goodput == pytest.approx(107 / 302)


def test_what_was_kept_in_memory_is_not_lost() -> None:
    kept = {"data": 3.0, "forward": 28.0, "backward": 45.0, "optimizer": 14.0}
    facts = {**ledger(saved=25.0), "kept_step": 80, "spent_before_keep": kept}
    end = event(252, "recovering", attempt=1, ledger=facts, saved_step=50)
    from_disk = account([*EVENTS[:2], end])
    resumed = event(260, "resumed", attempt=2, step=80)
    from_memory = account([*EVENTS[:2], {**end, "kept_step": 80}, event(255, "running", attempt=2), resumed])
    assert (from_disk.seconds["lost work"], from_memory.seconds["lost work"]) == (75 + 6, 10 + 6)
    assert from_memory.wall == 155, "the record of a resumption ends nothing"


def test_what_an_incident_cost() -> None:
    found = account(EVENTS)
    (incident,) = found.incidents
    lost, noticed, between, start = 75 + 6, 3 + 1, 8 + 30, 5 + 1 + 2 + 1 + 9
    assert found.cost(incident) == pytest.approx(lost + noticed + between + start)


def test_a_running_attempt_has_lost_nothing_yet() -> None:
    running = {"time": 250.0, "attempt": 1, "ledger": ledger(saved=25.0)}
    found = account(EVENTS[:2], running)
    assert "lost work" not in found.seconds
    assert found.seconds["training"] == pytest.approx(91)
    assert found.wall == 150
    older = account(EVENTS[:2], {**running, "time": 129.0})
    assert older.wall == 30, "a ledger from before the attempt is that of an earlier driver's attempt 1"
    stale = account(EVENTS[:3], running)
    assert stale.wall == 152, "a ledger of an attempt that has ended says nothing more"


phases = st.dictionaries(st.sampled_from([phase.value for phase in Phase]), st.floats(0, 1e4))


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e5), st.sampled_from(["recovering", "stopped", "complete", "interrupted"]), phases, phases
        ),
        max_size=6,
    )
)
def test_the_parts_add_up_whatever_the_ledgers_say(attempts: list[tuple[float, str, Any, Any]]) -> None:
    now, events = 1000.0, [event(1000.0, "starting", driver_started=999.0, moments={})]
    for number, (seconds, end, spent, before) in enumerate(attempts, start=1):
        events.append(event(now + 1, "running", attempt=number))
        now += 1 + seconds
        events.append(event(now, end, attempt=number, ledger=Ledger(spent, before, 1.0, 5, 5, 0).as_json()))
        if end != "recovering":
            now += 2
            events.append(event(now, "starting", driver_started=now - 1, moments={}))
    found = account(events)
    assert sum(found.seconds.values()) == pytest.approx(found.wall)
    assert min(found.seconds.values(), default=0.0) >= 0


class Silent:
    def event(self, state: RunState, facts: dict[str, Any]) -> None: ...
    def message(self, text: str) -> None: ...
    def progress(self, status: GroupStatus) -> None: ...


class Hand:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


BEAT = Beat(0, 91, Phase.FORWARD, 0.0, {}, 100, {}, spent=SPENT, first_step_seconds=10.0, steps_made=91)


def test_a_driver_that_was_killed_is_accounted_for_by_its_successor(tmp_path: Path) -> None:
    directory, clock = RunDirectory.at(tmp_path), Hand()
    directory.create()
    first = Journal(directory, Silent(), clock=clock)
    first.starting({}, {})
    first.event(RunState.RUNNING, {"attempt": 1})
    clock.now = 1150.0
    first.look(GroupStatus({0: BEAT}))
    clock.now = 1190.0  # killed here; nothing says when
    clock.now = 2000.0
    second = Journal(directory, Silent(), tensorboard=True, clock=clock)
    second.starting({}, {})
    second.event(RunState.RUNNING, {"attempt": 1})
    clock.now = 2150.0
    second.look(GroupStatus({0: BEAT}))
    second.event(RunState.COMPLETE, {"attempt": 1})
    second.close()
    assert [record["state"] for record in read_json_lines(directory.events)] == [
        *("starting", "running", "interrupted"),
        *("starting", "running", "complete"),
    ]
    found = read_account(directory)
    assert found.wall == 1150
    assert sum(found.seconds.values()) == pytest.approx(1150)
    assert found.seconds["idle: between jobs"] == pytest.approx(850)
    assert found.seconds["lost work"] > 90
    assert [record["outcome"] for record in read_json_lines(directory.attempts)] == ["complete"]


def test_the_goodput_is_drawn(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory, clock = RunDirectory.at(tmp_path), Hand()
    directory.create()
    journal = Journal(directory, Silent(), tensorboard=True, clock=clock)
    journal.starting({}, {})
    journal.event(RunState.RUNNING, {"attempt": 1})
    clock.now = 1150.0
    journal.look(GroupStatus({0: BEAT}))
    journal.close()
    board = EventAccumulator(str(directory.tensorboard / "goodput")).Reload()
    (scalar,) = board.Scalars("goodput/goodput")
    assert (scalar.step, scalar.value) == (91, pytest.approx(91 / 150))
    assert "goodput/start-up" in board.Tags()["scalars"]


def test_the_report(tmp_path: Path) -> None:
    found = account(EVENTS)
    text = as_markdown(found, "tiny")
    assert "goodput 35.4% of 05:02 allocated (05:12 in all); 2 attempt(s), 1 of them failed" in text
    assert "| training | 107.0 s | 34.3% |" in text
    (row,) = [line for line in text.splitlines() if "infrastructure" in line]
    assert "| 1 | " in row
    assert r"| 3 | n2 | infrastructure | 91 | backward | 141.0 s | killed \| by signal 9 |" in row
    assert "- rank 5 on node n1 is a straggler" in text
    page = as_html(found, "tiny <b>")
    assert "tiny &lt;b&gt;" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", ""), "nothing is loaded from elsewhere"
    picture = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    bars = picture.findall(".//{*}rect")
    assert sum(float(bar.get("width", 0)) for bar in bars) == pytest.approx(960, abs=0.5)
    assert [text.text for text in picture.findall("{*}text")] == ["others", "attempt 1", "attempt 2"]
    assert json.loads(json.dumps(found.as_json()))["goodput"] == found.goodput

"""Slurm's states as ours, also where accounting is missing, Slurm is silent or has forgotten."""

import re
from pathlib import Path

import pytest

from cluster.errors import BackendError
from cluster.slurm import SlurmBackend
from cluster.slurm_states import STATES, ask_squeue
from cluster.start_folder import NodeReport, Outcome, StartFolder
from cluster.types import JobState

BACKEND = SlurmBackend()


@pytest.fixture
def squeue(fake_command):
    """Have squeue print these lines."""
    fake_command("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")

    def say(*lines: str) -> Path:
        text = "\n".join(lines)
        return fake_command("squeue", f"cat <<'END'\n{text}\nEND")

    return say


def start(record, number: int = 1, outcome: Outcome | None = None) -> StartFolder:
    folder = StartFolder.of(Path(record.job_directory), number)
    folder.path.mkdir(parents=True)
    for index in range(record.nodes):
        folder.report(index, NodeReport(f"gpu{index + 1}", "10.0.0.1", "boot/1/2", "up"))
    folder.mark("started")
    if outcome is not None:
        folder.end(outcome)
    return folder


def state(record):
    return BACKEND.states([record])[record.id]


def test_every_state_that_squeue_1_documents_is_one_of_ours():
    documented = """
        BOOT_FAIL CANCELLED COMPLETED CONFIGURING COMPLETING DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PENDING PREEMPTED
        RUNNING RESV_DEL_HOLD REQUEUE_FED REQUEUE_HOLD REQUEUED RESIZING REVOKED SIGNALING SPECIAL_EXIT STAGE_OUT
        STOPPED SUSPENDED TIMEOUT
    """
    assert set(documented.split()) == set(STATES)
    assert JobState.UNKNOWN not in STATES.values()


@pytest.mark.parametrize(
    "reason",
    ["Resources", "Priority", "QOSMaxJobsPerUserLimit", "AssocGrpGRES", "ReqNodeNotAvail, UnavailableNodes:n[1-2]"],
)
def test_a_waiting_job_says_why_in_slurms_words(squeue, make_record, reason):
    squeue(f"1234|PENDING|{reason}||2027-01-15T08:00:00", "99|RUNNING|None|n1|N/A")
    found = state(make_record())
    assert (found.state, found.native, found.reason, found.nodes) == (JobState.PENDING, "PENDING", reason, ())
    assert found.expected_start is not None


def test_a_running_job_names_its_nodes(squeue, make_record):
    squeue("1234|RUNNING|None|gpu[1-2]|2026-01-15T08:00:00")
    record = make_record()
    assert state(record).nodes == ("gpu[1-2]",), "Slurm's form, until the nodes report"
    folder = start(record)
    found = state(record)
    assert (found.state, found.nodes, found.reason, found.starts) == (
        JobState.RUNNING,
        ("gpu1", "gpu2"),
        "starting Ray",
        1,
    )
    folder.mark("ray_head")
    assert state(record).reason == "waiting for Ray on all nodes"
    folder.mark("driver_started")
    assert state(record).reason == ""


def test_one_question_for_all_jobs(squeue, make_record, tmp_path):
    calls = squeue("1|RUNNING|None|n1|N/A", "2|PENDING|Priority||N/A", "3|COMPLETED|None|n1|N/A")
    records = [
        make_record(id=f"job{index}", backend_id=str(index), run_directory=tmp_path / str(index)) for index in (1, 2, 3)
    ]
    found = BACKEND.states(records)
    assert [found[f"job{index}"].state for index in (1, 2, 3)] == [
        JobState.RUNNING,
        JobState.PENDING,
        JobState.COMPLETED,
    ]
    assert len(calls.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("slurm", "outcome", "expected", "reason"),
    [
        ("COMPLETED", Outcome("completed", 0), JobState.COMPLETED, ""),
        (
            "FAILED",
            Outcome("failed", 2, "the driver ended with code 2"),
            JobState.FAILED,
            "the driver ended with code 2",
        ),
        ("FAILED", Outcome("stopped", 130, "SIGTERM: saved and ended"), JobState.STOPPED, "SIGTERM: saved and ended"),
        (
            "FAILED",
            Outcome("stopped", 130, "saved", requeue=True),
            JobState.STOPPED,
            "Slurm did not requeue it; submit it",
        ),
        ("CANCELLED", Outcome("stopped", 130, "saved and ended"), JobState.CANCELLED, "saved and ended"),
        ("CANCELLED", None, JobState.CANCELLED, ""),
        ("TIMEOUT", None, JobState.FAILED, "reached its time limit before it had saved"),
        ("OUT_OF_MEMORY", None, JobState.FAILED, "used more memory than its nodes gave it"),
        ("NODE_FAIL", None, JobState.FAILED, "one of its nodes failed"),
        ("PREEMPTED", None, JobState.CANCELLED, "another job took its nodes"),
    ],
)
def test_how_a_job_ended_is_slurms_word_and_its_own(squeue, make_record, slurm, outcome, expected, reason):
    squeue(f"1234|{slurm}|None|gpu[1-2]|2026-01-15T08:00:00")
    record = make_record()
    start(record, outcome=outcome)
    found = state(record)
    assert (found.state, found.native) == (expected, slurm)
    assert reason in found.reason


def test_a_node_failure_that_slurm_makes_good_by_a_requeue_is_no_failure(squeue, make_record):
    squeue("1234|PENDING|BeginTime||N/A")
    record = make_record()
    start(record)  # of which nothing more was heard
    assert state(record).state is JobState.PENDING


def test_a_job_that_could_write_nothing_asks_about_the_run_directory(squeue, make_record):
    squeue("1234|FAILED|RaisedSignal:53(Real-time_signal_19)|gpu[1-2]|N/A")
    assert re.search(
        r"nothing was written to .*; do its nodes \(gpu\[1-2\]\) see that folder\?", state(make_record()).reason
    )


def test_a_job_that_failed_before_its_agents_shows_what_its_script_wrote(squeue, make_record):
    squeue("1234|FAILED|NonZeroExitCode|gpu[1-2]|N/A")
    record = make_record()
    output = Path(record.job_directory) / "1234_0_log.out"
    output.write_text("\n")
    assert state(record).reason.startswith("nothing was written to")
    output.write_text("one\ntwo\nthree\nfour\nLmod has detected the following error:\n  no module cuda/99\n")
    found = state(record)
    assert found.reason.splitlines() == [
        f"it failed before ZeroFleet began on its nodes; {output} ends:",
        "two",
        "three",
        "four",
        "Lmod has detected the following error:",
        "  no module cuda/99",
    ]


def test_an_array_is_as_its_running_or_waiting_task(squeue, make_record):
    squeue("1234|COMPLETED|None|n1|N/A", "1234|RUNNING|None|n2|N/A", "1234|PENDING|JobArrayTaskLimit||N/A")
    assert state(make_record()).native == "RUNNING"
    squeue("1234|COMPLETED|None|n1|N/A", "1234|PENDING|JobArrayTaskLimit||N/A")
    assert state(make_record()).native == "PENDING"
    squeue("1234|COMPLETED|None|n1|N/A", "1234|FAILED|None|n2|N/A")
    assert state(make_record()).native == "FAILED"


def test_what_slurm_has_forgotten_is_told_by_the_jobs_own_word(squeue, make_record):
    squeue()
    record = make_record()
    start(record, outcome=Outcome("completed", 0))
    assert state(record).state is JobState.COMPLETED


def test_what_nobody_knows_is_said_to_be_unknown(squeue, make_record):
    squeue()
    record = make_record()
    start(record)
    found = state(record)
    assert found.state is JobState.UNKNOWN
    assert "Slurm has forgotten it, accounting says nothing, and it left no word" in found.reason


def test_accounting_is_asked_where_there_is_some(fake_command, make_record):
    fake_command("squeue", "true")
    calls = fake_command("sacct", "echo '1234|CANCELLED by 1000'; echo '1234.batch|CANCELLED'")
    record = make_record()
    start(record)
    assert (state(record).state, state(record).native) == (JobState.CANCELLED, "CANCELLED")
    assert "--jobs=1234" in calls.read_text()


def test_a_silent_slurm_makes_a_state_unknown_and_not_failed(fake_command, make_record):
    fake_command(
        "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
    )
    record = make_record()
    found = state(record)
    assert found.state is JobState.UNKNOWN
    assert "Unable to contact slurm controller" in found.reason
    start(record, outcome=Outcome("completed", 0))
    assert state(record).state is JobState.COMPLETED, "that it had ended is known all the same"


def test_without_slurm_here(monkeypatch, tmp_path, make_record):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "squeue is not installed here" in state(make_record()).reason


def test_a_state_of_a_later_slurm_is_unknown_by_name(squeue, make_record):
    squeue("1234|TELEPORTED|None|n1|N/A")
    assert (state(make_record()).state, state(make_record()).native) == (JobState.UNKNOWN, "TELEPORTED")


def test_cancel_lets_a_running_job_save_and_drops_a_waiting_one(fake_command, make_record):
    calls = fake_command("scancel", "true")
    BACKEND.cancel(make_record(), now=False)
    assert calls.read_text().splitlines() == ["--state=PENDING 1234", "--state=RUNNING --signal=TERM 1234"]
    calls.unlink()
    BACKEND.cancel(make_record(), now=True)
    assert calls.read_text().splitlines() == ["1234"]


def test_a_waiting_job_may_be_gone_when_it_is_asked_to_save(fake_command, make_record):
    refusal = "scancel: error: Kill job error on job id 1234: Invalid job id specified"
    fake_command("scancel", f'case "$1" in --state=RUNNING) echo "{refusal}" >&2; exit 1;; esac')
    assert "if it still waits, it is cancelled" in BACKEND.cancel(make_record(), now=False)


def test_cancel_passes_slurms_refusal_on(fake_command, make_record):
    fake_command(
        "scancel", "echo 'scancel: error: Kill job error on job id 1234: Access/permission denied' >&2; exit 1"
    )
    with pytest.raises(BackendError, match="Access/permission denied"):
        BACKEND.cancel(make_record(), now=True)


def test_a_sites_greeting_is_no_job(squeue):
    squeue("*** maintenance on Friday | read the mail ***", "", "1|RUNNING|None|n1|N/A")
    assert set(ask_squeue()) == {"1"}

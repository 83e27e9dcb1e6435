"""Which process a pid means, and that a tree of them ends whole."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.processes import ProcessIdentity, end_tree


def test_identity_survives_being_written_and_names_one_process_only():
    own = ProcessIdentity.of(os.getpid())
    assert ProcessIdentity.parse(str(own)) == own
    assert own.is_alive
    for other in (
        ProcessIdentity(own.boot_id, own.pid, own.start_ticks + 1),
        ProcessIdentity("another-boot", own.pid, own.start_ticks),
    ):
        assert not other.is_alive
        assert not other.send(signal.SIGKILL), "it must not hit the process that has the pid now"


def test_a_zombie_is_not_alive():
    process = subprocess.Popen(["sleep", "30"])
    identity = ProcessIdentity.of(process.pid)
    assert identity.is_alive
    assert identity.send(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while identity.is_alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not identity.is_alive
    assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    process.wait()
    with pytest.raises(ProcessLookupError):
        ProcessIdentity.of(process.pid)


def test_a_name_with_spaces_and_parentheses_does_not_confuse(tmp_path: Path):
    program = tmp_path / "a) (b c"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "30"])
    try:
        time.sleep(0.1)
        assert "a) (b c" in Path(f"/proc/{process.pid}/stat").read_text()
        identity = ProcessIdentity.of(process.pid)
        assert identity.pid == process.pid
        assert identity.start_ticks > ProcessIdentity.of(os.getpid()).start_ticks
    finally:
        process.kill()
        process.wait()


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"],
    stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_tree_that_ignores_sigterm_ends_all_the_same():
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
    assert process.stdout is not None
    grandchild = ProcessIdentity.of(int(process.stdout.readline()))
    end_tree(process)
    process.stdout.close()
    assert process.poll() is not None
    assert not grandchild.is_alive

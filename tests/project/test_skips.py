"""In CI a skipped test is a failed one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

TESTS_THAT_SKIP = """
import pytest

def test_passes():
    pass

@pytest.mark.skipif(True, reason={reason!r})
def test_skips():
    pass

def test_skips_itself():
    pytest.skip({reason!r})

@pytest.mark.xfail(strict=True)
def test_fails_as_known():
    raise AssertionError
"""

FILE_THAT_SKIPS = "import pytest\npytest.importorskip('no_such_module', reason={reason!r})\n"


def outcome(folder: Path, source: str, reason: str, *, in_ci: bool) -> tuple[int, str]:
    shutil.copy(TESTS / "conftest.py", folder / "conftest.py")
    (folder / "test_one.py").write_text(source.format(reason=reason))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CI", "PYTEST", "COV"))}
    if in_ci:
        environment["CI"] = "true"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}", str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("source", "reason", "in_ci", "code", "summary"),
    [
        (TESTS_THAT_SKIP, "no Slurm here", False, 0, "1 passed, 2 skipped, 1 xfailed"),
        (TESTS_THAT_SKIP, "no Slurm here", True, 1, "1 failed, 1 passed, 1 xfailed, 1 error"),
        (TESTS_THAT_SKIP, "hardware: no GPU", True, 0, "1 passed, 2 skipped, 1 xfailed"),
        (FILE_THAT_SKIPS, "no Slurm here", False, 5, "1 skipped"),
        (FILE_THAT_SKIPS, "no Slurm here", True, 2, "1 error"),
        (FILE_THAT_SKIPS, "hardware: no GPU", True, 5, "1 skipped"),
    ],
)
def test_only_missing_hardware_excuses_a_skip_in_ci(
    tmp_path: Path, source: str, reason: str, in_ci: bool, code: int, summary: str
) -> None:
    found, last = outcome(tmp_path, source, reason, in_ci=in_ci)
    assert (found, last[: len(summary)]) == (code, summary)

"""What ran, to be found again later: versions, packages, git revision and unsaved changes, profile. Never a secret."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from cluster.profile import SECRET_ASSIGNMENT, SECRET_NAME, Profile
from launcher.run_directory import write_atomically

REDACTED = "<redacted>"
VERSIONS = ("zerofleet", "torch", "deepspeed", "ray", "transformers", "datasets", "numpy")
MAX_DIFF_CHARACTERS = 1_000_000
_MIN_SECRET_LENGTH = 6
"""Shorter values are no secrets, and taking them out everywhere would tear up the text."""


def record_provenance(path: Path, profile: Profile) -> None:
    """Write what is about to run, as JSON.

    Args:
        path: file to write.
        profile: where it runs; values of its environment whose names speak of secrets are left out.
    """
    text = json.dumps(collect(profile), indent=1)
    write_atomically(path, without_secrets(text, {**os.environ, **profile.environment}))


def collect(profile: Profile) -> dict[str, Any]:
    """What is about to run."""
    described = profile.model_dump(mode="json")
    described["environment"] = {**profile.environment, **dict.fromkeys(profile.secrets, REDACTED)}
    for section in (described["slurm"], described["ssh"] or {}):
        section["setup"] = [SECRET_ASSIGNMENT.sub(rf"\1{REDACTED}", line) for line in section.get("setup", ())]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": sys.version,
        "versions": {name: _version(name) for name in VERSIONS},
        "profile": described,
        "source": git_state(Path(__file__).parent),
        "working_directory": git_state(Path.cwd()),
        "packages": sorted({f"{found.metadata['Name']}=={found.version}" for found in distributions()}),
    }


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """Take the values of variables whose names speak of secrets out of a text, wherever they stand in it."""
    secrets = {value for name, value in environment.items() if SECRET_NAME.search(name)}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _MIN_SECRET_LENGTH:
            text = text.replace(json.dumps(secret)[1:-1], REDACTED).replace(secret, REDACTED)
    return text


def git_state(folder: Path) -> dict[str, Any] | None:
    """Revision and unsaved changes of the git repository that a folder lies in; `None` when it lies in none."""
    root = _git(folder, "rev-parse", "--show-toplevel")
    if root is None:
        return None
    diff = _git(folder, "diff", "HEAD") or ""
    return {
        "root": root.strip(),
        "revision": (_git(folder, "rev-parse", "HEAD") or "").strip(),
        "diff": diff[:MAX_DIFF_CHARACTERS],
        "diff_is_cut": len(diff) > MAX_DIFF_CHARACTERS,
        "untracked": (_git(folder, "ls-files", "--others", "--exclude-standard") or "").splitlines(),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

"""Whether all ranks see the same folder, asked before training: shards that lie on several disks are no checkpoint."""

import secrets
import socket
import time
from pathlib import Path

from launcher.errors import StorageError
from launcher.training.distributed import all_gather, broadcast

VISIBLE_WITHIN_S = 15.0
"""Network file systems may take some seconds to show a new file to another machine."""


def check_shared(directory: Path) -> str:
    """Let rank 0 write a token that every rank must read, and every rank an answer that rank 0 must read.

    Args:
        directory: the folder; rank 0 makes it if need be.

    Returns:
        The token, which names this attempt.

    Raises:
        StorageError: says which hosts do not see the folder, or cannot write in it.
    """
    token, problem = broadcast(lambda: _write_token(directory))
    problems = [] if problem is None else [problem]
    if not problems:
        answers = all_gather((socket.gethostname(), _answer(directory, token)))
        problems = [f"{host}: {text}" for host, text in dict.fromkeys(answers) if text]
    if not problems:
        problems = broadcast(lambda: _unseen_answers(directory, token, [host for host, _ in answers]))
    broadcast(lambda: _clean(directory, token))
    if problems:
        raise StorageError(
            f"the ranks do not share the folder {directory}: {'; '.join(problems)}. "
            "Name a run directory with --run-dir that every node sees under the same path."
        )
    return str(token)


def _token_path(directory: Path, token: str) -> Path:
    return directory / f".shared-{token}.tmp"


def _answer_path(directory: Path, token: str, host: str) -> Path:
    return directory / f".shared-{token}.{host}.tmp"


def _write_token(directory: Path) -> tuple[str, str | None]:
    token = secrets.token_hex(8)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _token_path(directory, token).write_text(token)
    except OSError as error:
        return token, f"{socket.gethostname()}: cannot write there: {error.strerror or error}"
    return token, None


def _answer(directory: Path, token: str) -> str | None:
    if not _appears(_token_path(directory, token), token):
        return f"does not see what rank 0 wrote there within {VISIBLE_WITHIN_S:.0f} s"
    try:
        _answer_path(directory, token, socket.gethostname()).write_text(token)
    except OSError as error:
        return f"cannot write there: {error.strerror or error}"
    return None


def _unseen_answers(directory: Path, token: str, hosts: list[str]) -> list[str]:
    here = socket.gethostname()
    unseen = [host for host in dict.fromkeys(hosts) if not _appears(_answer_path(directory, token, host), token)]
    return [f"{here}: does not see what {host} wrote there within {VISIBLE_WITHIN_S:.0f} s" for host in unseen]


def _appears(path: Path, content: str) -> bool:
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while True:
        try:
            if path.read_text() == content:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def _clean(directory: Path, token: str) -> None:
    for path in directory.glob(f".shared-{token}*.tmp"):
        path.unlink(missing_ok=True)

"""A process that imported everything once and forks a rank for each case, for tests that kill ranks.

For cases that end their ranks (a SIGKILL in the middle of a write) or need many sizes.

The server is this file run as a program; it takes one JSON request a line (`{"size": 2, "call": "module:function",
"arguments": {...}, "environment": {...}}`) and answers with one JSON line: for each rank its result, error or signal.
"""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parent
GROUP_TIMEOUT_S = 100.0
ECHO_GRACE_S = 0.3


class ForkServer:
    """Forks groups of ranks; `run` returns when all ranks of the group have ended."""

    def __init__(self, log_directory: Path) -> None:
        from tests.support.unmeasured import unmeasured_environment  # this file is a program, too

        self.log = log_directory / "forked.log"
        environment = {
            **unmeasured_environment(),  # what it forks is killed, or ends without writing
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCH_EXTENSIONS_DIR": os.environ.get(
                "TORCH_EXTENSIONS_DIR", str(Path(tempfile.gettempdir()) / "zerofleet-test-extensions")
            ),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "forked.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            start_new_session=True,
        )

    def run(
        self, size: int, call: str, environment: dict[str, str] | None = None, **arguments: Any
    ) -> list[dict[str, Any]]:
        """Fork `size` ranks that call `module:function`; one dict a rank: `result`, `error` (text) or `signal`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"size": size, "call": call, "arguments": arguments, "environment": environment or {}}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the fork server ended: {self.log.read_text()[-3000:]}"
        outcomes: list[dict[str, Any]] = json.loads(line)
        return outcomes

    def results(self, size: int, call: str, environment: dict[str, str] | None = None, **arguments: Any) -> list[Any]:
        """The same for ranks that must all return."""
        outcomes = self.run(size, call, environment, **arguments)
        assert all("result" in outcome for outcome in outcomes), "\n".join(
            str(outcome.get("error", outcome)) for outcome in outcomes
        )
        return [outcome["result"] for outcome in outcomes]

    def close(self) -> None:
        """End the server and all that it forked."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def serve() -> None:
    """Import what is heavy, then fork a group for each request until stdin closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to stdout; only answers may go there
    sys.path.insert(0, str(SUPPORT))
    import deepspeed  # noqa: F401 - imported before the forks
    import transformers.models.llama.modeling_llama
    import transformers.optimization  # noqa: F401 - imported before the forks

    import launcher.training.checkpoint
    import launcher.training.entry  # noqa: F401 - imported before the forks

    gc.collect()
    gc.freeze()  # or each rank's first collection would copy every page that it shares with this process
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(_run_group(request)) + "\n")


def _run_group(request: dict[str, Any]) -> list[dict[str, Any]]:
    size = request["size"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        pids = [_fork(rank, size, port, request, Path(folder) / str(rank)) for rank in range(size)]
        signals = _reap(pids)
        outcomes = []
        for rank in range(size):
            path = Path(folder) / str(rank)
            outcomes.append(json.loads(path.read_text()) if path.exists() else {"signal": signals[rank]})
    return outcomes


def _fork(rank: int, size: int, port: int, request: dict[str, Any], answer: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        LOCAL_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **request["environment"],
    )
    try:
        from launcher.training.distributed import join_process_group

        join_process_group("cpu", 0)
        module, _, name = request["call"].partition(":")
        content = {"result": getattr(importlib.import_module(module), name)(**request["arguments"])}
    except BaseException as error:
        content = {"error": traceback.format_exc(), "type": type(error).__name__, "message": str(error)}
    partial = answer.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.rename(answer)
    os._exit(0)


def _reap(pids: list[int]) -> list[int]:
    """Wait for all; when one was killed, end the others as the supervisor does."""
    signals = dict.fromkeys(pids, 0)
    left, deadline = set(pids), time.monotonic() + GROUP_TIMEOUT_S
    while left:
        for pid in sorted(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.discard(pid)
                if os.WIFSIGNALED(status):
                    signals[pid] = os.WTERMSIG(status)
                    deadline = min(deadline, time.monotonic() + ECHO_GRACE_S)
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [signals[pid] for pid in pids]


if __name__ == "__main__":
    serve()

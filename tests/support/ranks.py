"""Real gloo ranks that stay alive over many test cases: a group costs seconds to start, a case a fraction of one.

Each rank is this file run as a program; it takes one JSON request a line (`{"call": "module:function", "arguments":
{...}}`) and answers with one JSON line. The functions stand in `tests/support/cases.py`.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parent
ANSWER = "@answer "
LEAVE_S = 10


class Ranks:
    """`size` processes joined in one gloo group; started by the first call, and by the first one after a failure.

    Of a measured one, coverage counts the lines of rank 0.
    """

    def __init__(self, size: int, log_directory: Path, *, measured: bool = True) -> None:
        self.size = size
        self.measured = measured
        self.logs = [log_directory / f"rank_{rank}.log" for rank in range(size)]
        self.processes: list[subprocess.Popen[str]] = []

    def _start(self) -> None:
        from tests.support.unmeasured import unmeasured_environment  # this file is a program, too

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.size):
            environment = {
                **(os.environ if self.measured and rank == 0 else unmeasured_environment()),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.size),
                "LOCAL_WORLD_SIZE": str(self.size),
                "LOCAL_SIZE": str(self.size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                "TORCHDYNAMO_DISABLE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "TORCH_EXTENSIONS_DIR": os.environ.get(
                    "TORCH_EXTENSIONS_DIR", str(Path(tempfile.gettempdir()) / "zerofleet-test-extensions")
                ),
            }
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(SUPPORT / "ranks.py")],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self.logs[rank].open("w"),
                    text=True,
                    start_new_session=True,
                )
            )

    def call(self, function: str, **arguments: Any) -> list[Any]:
        """Call `module:function` on every rank at once; returns the results by rank.

        Raises:
            AssertionError: a rank raised; the text holds every rank's traceback.
        """
        if not self.processes:
            self._start()
        request = json.dumps({"call": function, "arguments": arguments}) + "\n"
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(request)
            process.stdin.flush()
        answers = self._answers()
        failed = [f"rank {rank}: {answer['error']}" for rank, answer in enumerate(answers) if "error" in answer]
        if failed:
            self.close()
            raise AssertionError("\n".join(failed))
        return [answer["result"] for answer in answers]

    def _answers(self) -> list[dict[str, Any]]:
        """Of every rank. When one has failed, those that wait for it in a collective never will: end them."""
        with ThreadPoolExecutor(self.size) as threads:
            reading = [threads.submit(self._answer, rank) for rank in range(self.size)]
            for answered in as_completed(reading):
                if "error" in answered.result():
                    wait(reading, LEAVE_S)
                    self._kill()
        return [answered.result() for answered in reading]

    def _kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    def _answer(self, rank: int) -> dict[str, Any]:
        stdout = self.processes[rank].stdout
        assert stdout is not None
        for line in stdout:
            if line.startswith(ANSWER):
                answer: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return answer
        return {"error": f"ended with {self.processes[rank].wait()}: {self.logs[rank].read_text()[-3000:]}"}

    def close(self) -> None:
        """End every rank: by closing its stdin, so that coverage is written, and if it does not go, by pid."""
        for process in self.processes:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(LEAVE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
        self.processes = []


def serve() -> None:
    """Join the group and answer requests until stdin closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to stdout; only answers may go there
    sys.path.insert(0, str(SUPPORT))
    from launcher.training.distributed import join_process_group

    join_process_group("cpu", 0)
    for line in sys.stdin:
        request = json.loads(line)
        module, _, name = request["call"].partition(":")
        try:
            result = getattr(importlib.import_module(module), name)(**request["arguments"])
            answer = {"result": result}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        answers.write(ANSWER + json.dumps(answer) + "\n")


if __name__ == "__main__":
    serve()

"""Jobs on the real thing: the real command line, a real Slurm, a real sshd, a real Ray of several nodes."""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.types import JOB_VARIABLE
from launcher.run_directory import RunDirectory, read_json_lines
from tests.support import network, slurm_cluster, sshd
from tests.support.network import Network
from tests.support.ray_cluster import HostRay, NetworkRay
from tests.support.slurm_cluster import SlurmCluster
from tests.support.sshd import SshServer
from tests.support.unmeasured import unmeasured, unmeasured_environment

LONG = 100
"""Steps of the uninterrupted run that others are compared with, and of the one that is interrupted twice."""

TRAINING = ("submit", "sweep")
"""Commands whose ranks would be measured with them; tests/training passes the lines of ranks."""

# The learning rate is constant, so that runs of different lengths make the same first steps.
RECIPE = """
name: tiny
seed: 7
model:
  config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, max_position_embeddings: 64}}
tokenizer: {{train: {{vocab_size: 320}}}}
data:
  sources: [{{type: text, sample_by: paragraph, files: ["{stdlib}/json/*.py", "{stdlib}/email/*.py"]}}]
  sequence_length: 32
  preprocessing_num_workers: 1
  cache_directory: {cache}
training: {{max_steps: 12, micro_batch_size: 1, global_batch_size: 16, precision: fp32, learning_rate: 1.0e-3,
           lr_scheduler_type: constant}}
checkpoint: {{save_steps: 1000}}
logging: {{logging_steps: 1, tensorboard: false}}
export: {{at_end: false}}
fault_tolerance: {{save_before_end_seconds: 100}}
"""


@dataclass
class Zerofleet:
    """Runs the real command line, as a user with a home of their own would."""

    recipe: Path
    environment: dict[str, str]
    prefix: Callable[..., list[str]] = lambda *command: list(command)

    def process(self, *arguments: str) -> subprocess.Popen[str]:
        command = self.prefix(sys.executable, "-P", "-m", "launcher.cli.main", *arguments)
        inherited = unmeasured_environment() if arguments[0] in TRAINING else os.environ
        environment = {**inherited, **self.environment}
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, timeout: float = 120) -> tuple[int, str, str]:
        process = self.process(*arguments)
        out, err = process.communicate(timeout=timeout)
        return process.returncode, out, err

    def ok(self, *arguments: str, timeout: float = 120) -> str:
        code, out, err = self.run(*arguments, timeout=timeout)
        assert code == 0, f"{arguments}: {code}\n{out}\n{err}"
        return out

    def submit(self, profile: Path, run_directory: Path, *overrides: str) -> str:
        """Submit the recipe; returns the job's id."""
        options = ("--profile", str(profile), "--run-dir", str(run_directory), "--json")
        return str(json.loads(self.ok("submit", str(self.recipe), *overrides, *options))["id"])

    def end_jobs(self, backend: str) -> None:
        """End what still runs on a backend, while it can still be asked to."""
        for path in (Path(self.environment["XDG_STATE_HOME"]) / "zerofleet" / "jobs").glob("*.json"):
            if json.loads(path.read_text())["backend"] == backend:
                self.run("cancel", path.stem, "--now", "--wait")

    def status(self, job: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ok("status", job, "--json"))
        return found

    def wait_for_state(self, job: str, *states: str, timeout: float = 180) -> dict[str, Any]:
        """Poll until the job is in one of these states; returns the status."""

        def reached() -> dict[str, Any] | None:
            status = self.status(job)
            if status["state"] in states:
                return status
            ended = status["state"] not in ("PENDING", "RUNNING")
            assert not ended, f"{status['state']}: {status['reason']}\n{self.run('logs', job)[1]}"
            return None

        return wait_for(reached, f"state {' or '.join(states)} of {job}", timeout, every=2)


def wait_for(condition: Callable[[], Any], what: str, timeout: float = 60, every: float = 0.1) -> Any:
    """Poll until the condition gives something true."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(every)
    raise AssertionError(f"no {what} within {timeout} s")


def losses(run_directory: Path) -> dict[int, float]:
    """Loss by step; of a step that was made twice the last."""
    records = read_json_lines(RunDirectory.at(run_directory).metrics)
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def wait_for_step(run_directory: Path, step: int, timeout: float = 180) -> None:
    """Wait until a run has made a step."""
    wait_for(lambda: max(losses(run_directory), default=0) >= step, f"step {step} in {run_directory}", timeout)


def processes_of(run_directory: Path) -> list[str]:
    """Command lines of all processes that were started for the jobs of a run, on whichever node: batch script and srun
    (by their working directory), agents (by their arguments), and everything below them (by its environment)."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command, inherited = process.cmdline(), process.environ().get(JOB_VARIABLE, "")
            if "launcher.cli.main" in command:  # a look at the job, or the test's own question about it
                continue
            is_agent = any(argument.startswith(f"{run_directory}/jobs/") for argument in command)
            if inherited.startswith(f"{run_directory}/") or is_agent or process.cwd() == str(run_directory):
                found.append(" ".join(command)[:200])
    return found


def assert_nothing_left(run_directory: Path) -> None:
    """No process of the run's jobs is left on any node."""
    wait_for(lambda: not processes_of(run_directory), f"end of the processes of {run_directory}", timeout=10)


def write_profile(path: Path, **values: Any) -> Path:
    """A profile of two nodes with one CPU worker each; JSON is YAML."""
    defaults = {"nodes": 2, "workers_per_node": 1, "device": "cpu"}
    path.write_text(json.dumps({**defaults, **values}))
    return path


def workers(run_directory: Path) -> list[dict[str, Any]]:
    """Where each rank of a run's last attempt is."""
    events = read_json_lines(RunDirectory.at(run_directory).events)
    found: list[dict[str, Any]] = next(event["workers"] for event in reversed(events) if event["state"] == "running")
    return found


@pytest.fixture(scope="package")
def workplace() -> Iterator[Path]:
    """A folder that every daemon may enter (munge insists), with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="zfjobs-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.fixture(scope="package")
def zerofleet(workplace: Path) -> Iterator[Zerofleet]:
    recipe = workplace / "tiny.yaml"
    recipe.write_text(RECIPE.format(stdlib=sysconfig.get_path("stdlib"), cache=workplace / "cache"))
    environment = {
        "XDG_STATE_HOME": str(workplace / "state"),
        "XDG_CONFIG_HOME": str(workplace / "config"),
        "RAY_memory_monitor_refresh_ms": "0",  # it looks at the whole machine, where other things run
    }
    command = Zerofleet(recipe, environment)
    command.ok("prepare", str(recipe))
    yield command
    command.end_jobs("local")


@pytest.fixture(scope="package")
def uninterrupted(zerofleet: Zerofleet, workplace: Path) -> Path:
    """The run that others are compared with: on the local backend, on two Ray nodes. It goes on while they run."""
    profile = write_profile(workplace / "local.yaml", backend="local")
    run_directory = workplace / 'uninterrupted,\nand "quoted"'
    zerofleet.submit(profile, run_directory, f"max_steps={LONG}")
    return run_directory


@pytest.fixture(scope="package")
def slurm(zerofleet: Zerofleet) -> Iterator[SlurmCluster]:
    if missing := slurm_cluster.missing_commands():
        pytest.skip(f"not installed: {', '.join(missing)} (see .ci/apt-packages.txt)")
    with tempfile.TemporaryDirectory(prefix="zfslurm-") as name:
        Path(name).chmod(0o755)
        with SlurmCluster(Path(name), nodes=2) as cluster:
            zerofleet.environment.update(cluster.environment)
            yield cluster
            zerofleet.end_jobs("slurm")


@pytest.fixture
def slurm_here(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """The cluster, also for what this process asks of it."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    return slurm


@pytest.fixture(scope="package")
def ssh_server(zerofleet: Zerofleet) -> Iterator[SshServer]:
    if missing := sshd.missing_commands():
        pytest.skip(f"not installed: {', '.join(missing)} (see .ci/apt-packages.txt)")
    with tempfile.TemporaryDirectory(prefix="zfssh-") as name, SshServer(Path(name)) as server:
        yield server
        zerofleet.end_jobs("ssh")


@pytest.fixture(scope="package")
def machines(workplace: Path) -> Iterator[Network]:
    """Two machines of namespaces."""
    if lacking := network.missing():
        pytest.skip(f"hardware: machines need {', '.join(lacking)}")
    with tempfile.TemporaryDirectory(prefix="zfnet-") as name, Network(Path(name)) as lab:
        yield lab


@pytest.fixture(scope="package")
def ray_cluster(zerofleet: Zerofleet, request: pytest.FixtureRequest) -> Iterator[tuple[Zerofleet, dict[str, Any]]]:
    """A Ray cluster of two nodes that runs already: a command line that reaches it, and what its profile says.

    On two machines of namespaces where they can be made, else as two Ray nodes on this one.
    """
    if network.missing():
        with HostRay() as host:
            command = replace(zerofleet, environment={**zerofleet.environment, **host.environment})
            yield command, {"backend": "ray", "ray": {"dashboard_address": host.url, "python": sys.executable}}
            command.end_jobs("ray")
        return
    lab: Network = request.getfixturevalue("machines")
    with ExitStack() as stack:
        with unmeasured():
            cluster = stack.enter_context(NetworkRay(lab))
        environment = {**zerofleet.environment, **cluster.environment}
        command = replace(zerofleet, environment=environment, prefix=lab.machines[1].command)
        yield command, {"backend": "ray", "address": cluster.address, "ray": {"python": sys.executable}}
        command.end_jobs("ray")

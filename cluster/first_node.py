"""The first node's agent: starts the Ray head, waits for the other nodes, runs the driver, says how the job ended."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from cluster.agent import ALIVE_S, POLL_S, START_TRIES, NodeAgent, ProvisionError, agent_command, say
from cluster.processes import prepare_child
from cluster.ray_node import RaySecrets, RayStartError, port_block, start_head
from cluster.start_folder import NodeReport, Outcome, StartFolder
from cluster.types import PHASES_VARIABLE

STOPPED = 130
"""Exit code of a driver that saved and stopped because it was asked to; as of a command that Ctrl-C ended."""

ENDED_BY_SIGNAL = (-signal.SIGTERM, -signal.SIGKILL, signal.SIGTERM, 128 + signal.SIGTERM)
"""Of a driver that was told to stop before it listened for that, with nothing to save; Ray's handler exits with 15."""

PROGRESS_S = 10.0
LEAVE_GRACE_S = 10.0
"""How long to wait for the other nodes to leave."""


class FirstNode(NodeAgent):
    """The node that the driver runs on."""

    _peers: Sequence[subprocess.Popen[bytes]] = ()

    def play(self) -> Outcome:
        """See `NodeAgent.play`."""
        if lost := [name for name in self.spec.secret_names if name not in os.environ]:
            raise ProvisionError(
                f"{', '.join(lost)} of the profile's environment did not get here: what starts the job (sbatch "
                "--export, a container) must hand on the environment that it was submitted with"
            )
        self.folder.mark("started")
        self._peers = self._spawn_peers()
        address, cluster = self._start_head()
        if not self._await_nodes():
            return self._stopped(None, "before the driver ran")
        self.folder.mark("nodes_joined")
        return self._drive(address, cluster)

    def leave(self, outcome: Outcome) -> None:
        """See `NodeAgent.leave`: let the other nodes go, and wait a moment for them."""
        self.folder.forget_head()
        self.folder.end(outcome)
        deadline = time.monotonic() + LEAVE_GRACE_S
        while time.monotonic() < deadline:
            reports = [self.folder.node(index) for index in range(1, self.spec.nodes)]
            if all(report is None or report.state in ("left", "failed") for report in reports):
                break
            time.sleep(POLL_S)
        for peer in self._peers:
            try:
                peer.wait(LEAVE_GRACE_S)
            except subprocess.TimeoutExpired:
                peer.kill()

    def _spawn_peers(self) -> list[subprocess.Popen[bytes]]:
        """Start the other nodes' agents, when they are all on this machine."""
        peers = []
        for index in range(1, self.spec.nodes if self.spec.spawn_peers else 1):
            with self.folder.node_log(index).open("ab") as output:
                peer = subprocess.Popen(
                    agent_command(self.job_directory, index),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=prepare_child,
                )
            peers.append(peer)
        return peers

    def _start_head(self) -> tuple[str, RaySecrets]:
        """Start Ray here, on other ports if something else takes them meanwhile."""
        cluster = RaySecrets(secrets.token_hex(32), self.spec.node_timeout_s)
        for attempt in range(1, START_TRIES + 1):
            ports = port_block(f"{self.place.port_key}/0", self.place.address, skip=attempt - 1)
            log = self.folder.ray_log(0)
            address, ray = start_head(
                self.place.address, ports, self.resources, cluster, dashboard=self.spec.dashboard, log=log
            )
            self.ray = ray
            self.folder.announce_head(address, cluster.token)
            say(f"ray: starting the head at {address}")
            try:
                while not ray.is_up and not self.must_end:
                    ray.check_alive()
                    time.sleep(POLL_S)
                break
            except RayStartError as error:
                self.end_ray(keep_logs=True)
                if attempt == START_TRIES:
                    raise
                say(f"{error}\nray: the head did not start; trying other ports")
        self.folder.mark("ray_head")
        self.report("up")
        return address, cluster

    def _await_nodes(self) -> bool:
        """Wait for all nodes; returns whether they are there (otherwise the job was asked to end).

        An elastic job goes on without nodes that do not come, while there are as many as it needs.

        Raises:
            ProvisionError: some did not come; the text names them.
        """
        fewest = self.spec.min_nodes or self.spec.nodes
        began, shown_at, shown = time.monotonic(), 0.0, -1
        while not self.must_end:
            reports = [self.folder.node(index) for index in range(self.spec.nodes)]
            up = sum(report is not None and report.state == "up" for report in reports)
            failed = sum(report is not None and report.state == "failed" for report in reports)
            waited = time.monotonic() - began
            if up != shown or time.monotonic() - shown_at > PROGRESS_S:
                shown, shown_at = up, time.monotonic()
                say(f"ray: {up} of {self.spec.nodes} nodes are up{self._awaited(reports, waited)}")
            if up == self.spec.nodes:
                return True
            late = waited > self.spec.join_timeout_s
            if self.spec.nodes - failed < fewest or (late and up < fewest):
                raise ProvisionError(self._missing(reports, waited))
            if late or up + failed == self.spec.nodes:
                say(f"{self._missing(reports, waited)}\nray: going on without them; the profile needs {fewest}")
                return True
            if self.ray is not None:
                self.ray.check_alive()
            self.refresh()
            time.sleep(POLL_S)
        return False

    def _awaited(self, reports: list[NodeReport | None], waited: float) -> str:
        names = [self.place.names[index] for index, report in enumerate(reports) if not report or report.state != "up"]
        return f"; waiting for {', '.join(names)} ({waited:.0f} s)" if names else ""

    def _missing(self, reports: list[NodeReport | None], waited: float) -> str:
        lines = []
        for index, report in enumerate(reports):
            name = self.place.names[index]
            if report is None:
                lines.append(f"  {name}: no sign of it; does it see {self.folder.path}?")
            elif report.state == "failed":
                lines.append(f"  {name}: {report.message}")
            elif report.state != "up":
                lines.append(f"  {name}: started, but its Ray has not joined; see {self.folder.ray_log(index)}")
        come = f"{self.spec.nodes - len(lines)} of {self.spec.nodes} nodes are up after {waited:.0f} s"
        return "\n".join([f"{come}; these did not come:", *lines])

    def _drive(self, address: str, cluster: RaySecrets) -> Outcome:
        self.folder.mark("driver_started")
        first = self.folder.path == StartFolder.all_of(self.job_directory)[0].path
        moments = {**({"submitted": self.spec.submitted} if first else {}), **self.folder.phases()}
        environment = {
            **os.environ,
            **self.spec.environment,
            **cluster.environment,
            "RAY_ADDRESS": address,
            PHASES_VARIABLE: json.dumps(moments),
        }
        say("driver: starting")
        sys.stdout.flush()
        driver = subprocess.Popen(
            self.spec.argv,
            env=environment,
            cwd=self.spec.working_directory,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=prepare_child,
        )
        code = self._watch(driver)
        self.folder.mark("driver_ended")
        if code == 0:
            return Outcome("completed", 0)
        if code == STOPPED or (self.must_end and code in ENDED_BY_SIGNAL):
            return self._stopped(code, "saved and ended")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return Outcome("failed", code, f"the driver {how}; see {self.folder.node_log(0)}", self._signal_name)

    def _watch(self, driver: subprocess.Popen[bytes]) -> int:
        """Wait for the driver, handing on what this process is asked."""
        told, head_lost = False, False
        while (code := driver.poll()) is None:
            if self.ending_now:
                driver.kill()
            elif self.signals and not told:
                told = True
                say(f"{self._signal_name}: the driver saves and ends")
                driver.send_signal(signal.SIGTERM)
            if not head_lost and self.ray is not None and self.ray.process.poll() is not None:
                head_lost = True
                say(f"ray: the head ended with code {self.ray.process.returncode}; see {self.folder.ray_log(0)}")
            self.refresh(ALIVE_S)
            time.sleep(POLL_S)
        say(f"driver: ended with code {code}")
        return code

    @property
    def _signal_name(self) -> str:
        return self.signals[0].name if self.signals else ""

    def _stopped(self, code: int | None, how: str) -> Outcome:
        if self.ending_now:
            return Outcome("cancelled", code, "ended at once, as asked")
        return Outcome("stopped", code, f"{self._signal_name or 'asked to stop'}: {how}", self._signal_name)


def exit_code(outcome: Outcome) -> int:
    """What an agent's process ends with: 0 complete, 130 stopped, anything else failed."""
    if outcome.state == "completed":
        return 0
    if outcome.state in ("stopped", "cancelled"):
        return STOPPED
    return outcome.exit_code if outcome.exit_code is not None and outcome.exit_code > 0 else 1

"""Jobs on hosts that ssh reaches with the user's own configuration: an agent on each, detached from the connection."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.agent import agent_command
from cluster.errors import BackendError
from cluster.job_files import log_of, make_job_directory, spec_of, status_from_files
from cluster.processes import ProcessIdentity
from cluster.start_folder import NodeReport, StartFolder
from cluster.types import JobRecord, JobRequest, JobState, JobStatus, Log, Submission

if TYPE_CHECKING:  # see cluster.types
    from cluster.profile_sections import SshSection

CONNECT_TIMEOUT_S = 15
COMMAND_TIMEOUT_S = 120
_SSH_FAILED = 255
_NOT_FOUND = 127

HINTS = {
    "Host key verification failed": "connect to it once by hand and compare the key: ssh {host}",
    "REMOTE HOST IDENTIFICATION HAS CHANGED": "its key is another one than the last time; find out why",
    "Permission denied": "it must let you in without a question: ssh-copy-id {host}, or a key in your ssh-agent",
    "Could not resolve hostname": "no such host; see Host {host} in ~/.ssh/config",
    "Connection refused": "nothing listens there; see Port in ~/.ssh/config or ssh.options in the profile",
    "timed out": "it does not answer",
}


class SshBackend:
    """Starts agents over ssh, and asks the first one's host how it is."""

    def render(self, request: JobRequest) -> str:
        """See `Backend.render`: one command a host."""
        section = _section(request)
        commands = self._commands(request, section)
        shown = [f"{shlex.join(command)}\n" for command in commands]
        return "".join([*shown, f"# of which the first runs\n{shlex.join(request.argv)}\n"])

    def _commands(self, request: JobRequest, section: "SshSection") -> list[list[str]]:
        """How the agents are started, a command a host."""
        commands = []
        for index, host in enumerate(_hosts(section, request.nodes)):
            # The driver, which passes them on to the workers, is on the first host.
            secret = ("--secrets",) if index == 0 and request.profile.secrets else ()
            python, *arguments = agent_command(request.job_directory, index, "--detach", *secret)
            start = shlex.join([section.python or python, *arguments])
            setup = " && ".join(section.setup)
            if setup and secret:
                setup = f"{{ {setup}; }} < /dev/null"  # standard input is for what comes after it
            commands.append(ssh_command(host, section.options, f"{setup} && {start}" if setup else start))
        return commands

    def submit(self, request: JobRequest) -> Submission:
        """See `Backend.submit`."""
        section = _section(request)
        hosts = _hosts(section, request.nodes)
        commands = self._commands(request, section)
        make_job_directory(request.job_directory)
        spec_of(request, addresses=section.addresses[: request.nodes], names=hosts).write(request.job_directory)
        secrets = json.dumps(request.profile.secrets) + "\n" if request.profile.secrets else None
        started = _at_once(
            lambda index: _start(hosts[index], commands[index], secrets if index == 0 else None), range(request.nodes)
        )
        processes = {host: process for host, process in zip(hosts, started, strict=True) if isinstance(process, str)}
        absent = {
            index: (host, why)
            for index, (host, why) in enumerate(zip(hosts, started, strict=True))
            if isinstance(why, BackendError)
        }
        if absent and (0 in absent or len(processes) < (request.profile.min_nodes or request.nodes)):
            _at_once(lambda host: _kill(host, section.options, processes[host], "QUIT"), list(processes))
            problems = [f"  {host}: {why}" for host, why in absent.values()]
            raise BackendError(
                "\n".join([f"the job cannot start on {len(problems)} of {len(hosts)} hosts:", *problems])
            )
        for index, (host, why) in absent.items():  # of an elastic job, which goes on without them
            folder = StartFolder.of(request.job_directory, 1)
            folder.path.mkdir(exist_ok=True)
            folder.report(index, NodeReport(host, "", "", "failed", str(why)))
        facts = {
            "hosts": list(processes),
            "processes": list(processes.values()),
            "options": list(section.options),
        }
        return Submission(f"{hosts[0]}:{ProcessIdentity.parse(processes[hosts[0]]).pid}", facts)

    def states(self, records: Sequence[JobRecord]) -> dict[str, JobStatus]:
        """See `Backend.states`."""
        return dict(zip((record.id for record in records), _at_once(self._state, records), strict=True))

    def _state(self, record: JobRecord) -> JobStatus:
        told = status_from_files(record)
        if told.state.is_final:
            return told
        host, process = record.facts["hosts"][0], record.facts["processes"][0]
        try:
            alive = _is_alive(host, record.facts["options"], process)
        except BackendError as error:
            return JobStatus(JobState.UNKNOWN, "", str(error), told.nodes, told.starts)
        if alive:
            return JobStatus(JobState.RUNNING, "process", told.reason, told.nodes, told.starts)
        told = status_from_files(record)  # it may have ended between the two looks
        if told.state.is_final:
            return told
        reason = f"its process on {host} is gone without a word: killed, or the machine went down"
        return JobStatus(JobState.FAILED, "gone", reason, told.nodes, told.starts)

    def log(self, record: JobRecord, node: int, start: int | None) -> Log:
        """See `Backend.log`."""
        return log_of(record, node, start)

    def cancel(self, record: JobRecord, *, now: bool) -> str:
        """See `Backend.cancel`."""
        facts = record.facts
        pairs = list(zip(facts["hosts"], facts["processes"], strict=True))
        if not now:
            host, process = pairs[0]
            if not _kill(host, facts["options"], process, "TERM"):
                raise BackendError(f"job {record.id} does not run on {host} (any more)")
            return f"the process on {host} saves and ends"
        told = _at_once(lambda pair: _try_kill(pair[0], facts["options"], pair[1]), pairs)
        if problems := [str(problem) for problem in told if problem]:
            raise BackendError("\n".join(problems))
        return f"the processes on {', '.join(facts['hosts'])} end now"


def ssh_command(host: str, options: Sequence[str], remote: str) -> list[str]:
    """The command line of ssh. It never asks: there is nobody to answer."""
    own = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_TIMEOUT_S}")
    return ["ssh", *own, *options, "--", host, remote]


def _section(request: JobRequest) -> "SshSection":
    if request.profile.ssh is None:
        raise BackendError(f"profile {request.profile.name} has no ssh section")
    return request.profile.ssh


def _hosts(section: "SshSection", nodes: int) -> tuple[str, ...]:
    """The hosts of a job.

    Raises:
        BackendError: the hostfile cannot be read or has too few.
    """
    hosts = section.hosts if section.hostfile is None else read_hostfile(Path(section.hostfile).expanduser())
    if len(hosts) < nodes:
        raise BackendError(f"nodes is {nodes}, but {section.hostfile} names {len(hosts)} hosts")
    return hosts[:nodes]


def read_hostfile(path: Path) -> tuple[str, ...]:
    """Hosts of a DeepSpeed hostfile (`HOST slots=N` a line); the slots are left to the profile's workers_per_node.

    Raises:
        BackendError: it cannot be read, or a line is none of that form.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise BackendError(f"hostfile {path} cannot be read: {error.strerror or error}") from error
    hosts, problems = [], []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 2 or words[0].startswith("-") or (len(words) == 2 and not words[1].startswith("slots=")):
            problems.append(f"  line {number}  {line!r} is not of the form HOST slots=N")
        elif words[0] in hosts:
            problems.append(f"  line {number}  {words[0]} is named twice")
        hosts.append(words[0])
    if problems:
        raise BackendError("\n".join([f"hostfile {path}:", *problems]))
    return tuple(hosts)


def _at_once(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Call it for all items at the same time: each call waits for another machine."""
    if not items:
        return []
    with ThreadPoolExecutor(max_workers=min(32, len(items))) as pool:
        return list(pool.map(function, items))


def _start(host: str, command: list[str], secrets: str | None) -> str | BackendError:
    """Start an agent; its process, or why there is none."""
    try:
        return str(ProcessIdentity.parse(_run(host, command, told=secrets).strip().splitlines()[-1]))
    except BackendError as error:
        return error
    except (ValueError, IndexError):
        return BackendError("it answered, but started nothing; does a command in ssh.setup print or exit?")


def _run(host: str, command: list[str], *, may_fail: bool = False, told: str | None = None) -> str:
    """Run an ssh command, with `told` on its standard input, and return its output.

    Raises:
        BackendError: ssh does not get there, or the command fails there (unless it may); the text holds their words.
    """
    try:
        done = subprocess.run(
            command, input=told or "", capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise BackendError("ssh is not installed here") from error
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"{host} does not answer within {COMMAND_TIMEOUT_S} s") from error
    words = done.stderr.strip()
    if done.returncode == _SSH_FAILED:
        hints = [hint.format(host=host) for sign, hint in HINTS.items() if sign in words]
        raise BackendError(f"ssh to {host} fails: {'; '.join([words, *hints[:1]])}")
    if done.returncode == _NOT_FOUND:
        raise BackendError(
            f"{words}; install ZeroFleet there at the path it has here ({sys.prefix}), or set ssh.python"
        )
    if done.returncode and not may_fail:
        raise BackendError(words or f"exit code {done.returncode}")
    return done.stdout


def _is_alive(host: str, options: Sequence[str], process: str) -> bool:
    """Whether this very process runs there.

    Raises:
        BackendError: the host cannot be asked.
    """
    wanted = ProcessIdentity.parse(process)
    remote = f"cat /proc/sys/kernel/random/boot_id /proc/{wanted.pid}/stat"
    boot_id, _, stat = _run(host, ssh_command(host, options, remote), may_fail=True).partition("\n")
    try:
        return bool(stat) and ProcessIdentity.from_stat(boot_id, stat) == wanted
    except ProcessLookupError:
        return False


def _kill(host: str, options: Sequence[str], process: str, number: str) -> bool:
    """Signal this very process; returns whether it was there.

    Raises:
        BackendError: the host cannot be asked.
    """
    if not _is_alive(host, options, process):
        return False
    _run(host, ssh_command(host, options, f"kill -{number} {ProcessIdentity.parse(process).pid}"), may_fail=True)
    return True


def _try_kill(host: str, options: Sequence[str], process: str) -> BackendError | None:
    try:
        _kill(host, options, process, "QUIT")
    except BackendError as error:
        return error
    return None

"""A real Slurm of several nodes on this machine, on loopback, started and ended by pid. No root, no systemd needed.

    python -m tests.support.slurm_cluster FOLDER [--nodes N]     # prints what to export, runs until Ctrl-C

Every "node" is a slurmd of its own name (n1, n2, ...) and port on 127.0.0.1; Debian's build allows several on a host.
Needs the packages slurmctld slurmd slurm-client munge.
"""

import argparse
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

REQUIRED_COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "scancel", "sinfo", "srun")
_CGROUPS = Path("/sys/fs/cgroup")
START_TIMEOUT_S = 30

CONFIGURATION = """
ClusterName=zerofleet
SlurmctldHost={hostname}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job may run again only when its old credential has expired: 120 s if nothing is said.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
# Listen on loopback only.
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/{task}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# Without it a job takes all the memory of its node, so that nothing else fits there. Real limits where cgroups work.
DefMemPerCPU=3000
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
# Nodes may have more CPUs than this machine.
SlurmdParameters=config_overrides
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=5
MinJobAge=300
# Ids of a fresh cluster must not repeat those of the last one.
FirstJobId={first_job_id}
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName=DEFAULT CPUs=4 RealMemory=24000 State=UNKNOWN
{node_lines}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=closed Nodes=n1 Default=NO AllowAccounts=nobody State=UP
PartitionName=short Nodes=ALL Default=NO MaxTime=60 State=UP
"""

GPUS = 2
"""Of the last node: other devices under names that Slurm takes for GPUs'. Nothing computes on them."""


def missing_commands() -> list[str]:
    """What of Slurm is not installed."""
    return [command for command in REQUIRED_COMMANDS if _which(command) is None]


def _which(command: str) -> str | None:
    return shutil.which(command, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass
class SlurmCluster:
    """A running cluster.

    Attributes:
        folder: of configuration, logs and state; every user must be able to enter it and the ones above.
        nodes: how many.
    """

    folder: Path
    nodes: int
    environment: dict[str, str] = field(default_factory=dict)
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> "SlurmCluster":
        try:
            self._configure()
            self._run("munged", *self._munge_options())
            self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
            self._run("slurmctld", "-D")
            for index in range(1, self.nodes + 1):
                self.start_node(f"n{index}")
            self._await_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        jobs = self.command("squeue", "--noheader", "--format=%A").split()
        if jobs:
            self.command("scancel", *jobs)
            deadline = time.monotonic() + 15
            while self.command("squeue", "--noheader", "--format=%A") and time.monotonic() < deadline:
                time.sleep(0.2)
        for name in reversed(list(self._daemons)):
            self.stop(name)
        for controller in ("freezer", "memory", "cpuset", "devices"):
            for index in range(1, self.nodes + 1):
                for path in sorted((_CGROUPS / controller / f"slurm_n{index}").glob("**/"), reverse=True):
                    path.rmdir()

    def _configure(self) -> None:
        shutil.rmtree(self.folder / "ctld", ignore_errors=True)  # of an earlier cluster in this folder
        for name in ("ctld", "log", *(f"spool/n{index}" for index in range(1, self.nodes + 1))):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        cgroups = os.access(_CGROUPS / "freezer", os.W_OK) and os.access(_CGROUPS / "memory", os.W_OK)
        ports = free_ports(self.nodes + 1)
        gpus = [self.folder / f"fakegpu{index}" for index in range(GPUS)]
        for gpu in gpus:
            gpu.unlink(missing_ok=True)
            gpu.symlink_to("/dev/null")
        last = f"n{self.nodes}"
        files = "".join(f"NodeName={last} Name=gpu File={gpu}\n" for gpu in gpus)
        (self.folder / "gres.conf").write_text(files)
        names = [f"n{index}" for index in range(1, self.nodes + 1)]
        hostname = socket.gethostname().split(".")[0]
        here = f"NodeHostname={hostname} NodeAddr=127.0.0.1"
        lines = [f"NodeName={name} {here} Port={port}" for name, port in zip(names, ports[1:], strict=True)]
        text = CONFIGURATION.format(
            hostname=hostname,
            user=pwd.getpwuid(os.getuid()).pw_name,
            folder=self.folder,
            port=ports[0],
            node_lines="\n".join([*lines[:-1], f"{lines[-1]} Gres=gpu:{GPUS}"]),
            first_job_id=int(time.time()) % 1_000_000 + 1,
            proctrack="cgroup" if cgroups else "linuxproc",
            task="cgroup" if cgroups else "none",
        )
        (self.folder / "slurm.conf").write_text(text)
        # Said even where cgroups are not used: slurmd otherwise looks for their version, and ends if it finds none.
        (self.folder / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\nConstrainRAMSpace=yes\nConstrainSwapSpace=no\n"
        )

    def _munge_options(self) -> list[str]:
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        options = [f"--{option}={self.folder / name}" for option, name in names.items()]
        return ["--foreground", f"--seed-file={self.folder / 'munge.seed'}", *options]

    def _run(self, name: str, *arguments: str, key: str | None = None) -> None:
        command = _which(name)
        assert command is not None, f"{name} is not installed"
        with (self.folder / "log" / f"{key or name}.output").open("ab") as output:
            self._daemons[key or name] = subprocess.Popen(
                [command, *arguments],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        self._run("slurmd", "-D", "-N", name, key=name)

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """End a daemon: munged, slurmctld or that of a node (n1, ...)."""
        daemon = self._daemons.pop(name)
        daemon.send_signal(number)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def power_off(self, name: str) -> None:
        """Kill the slurmd of a node and all that runs on it at once."""
        self.stop(name, signal.SIGKILL)
        killed = set(self.processes_of(name))
        killed |= {parent for process in killed for parent in _parents(process) if parent.name() == "slurmstepd"}
        for process in killed:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def processes_of(self, name: str) -> list[psutil.Process]:
        """What runs for jobs on a node."""
        own = (self.environment["SLURM_CONF"], name)  # another cluster on this machine has nodes of the same names
        return [process for process in psutil.process_iter() if _node_of(process) == own]

    def start_munge(self) -> None:
        """Start the authentication daemon again."""
        self._run("munged", *self._munge_options())

    def command(self, *arguments: str) -> str:
        """Run one of Slurm's commands; returns its output, without a look at how it ended."""
        done = subprocess.run(
            arguments, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=30, check=False
        )
        return done.stdout.strip()

    def _await_nodes(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.command("sinfo", "-h", "-p", "debug", "-t", "idle", "-o", "%D") != str(self.nodes):
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-1000:] for path in (self.folder / "log").iterdir())
                raise RuntimeError(f"Slurm did not come up:\n{self.command('sinfo')}\n{logs}")
            time.sleep(0.05)


def _node_of(process: psutil.Process) -> tuple[str, str]:
    """(configuration file of its Slurm, name of its node) of what runs for a job."""
    with suppress(psutil.Error):
        environment = process.environ()
        return environment.get("SLURM_CONF", ""), environment.get("SLURMD_NODENAME", "")
    return "", ""


def _parents(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return list(process.parents())
    return []


def free_ports(count: int) -> list[int]:
    """Neighbouring TCP ports that are free now on loopback."""
    for start in range(16_800, 19_900, count):
        with ExitStack() as stack:
            try:
                for port in range(start, start + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return list(range(start, start + count))
    raise RuntimeError("no free ports")


def main() -> None:
    """Run a cluster until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with SlurmCluster(options.folder.absolute(), options.nodes) as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("ending")


if __name__ == "__main__":
    main()

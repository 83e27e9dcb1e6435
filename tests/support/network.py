"""Machines that are none: Linux namespaces, each with its own address, host name, /dev/shm and processes.

The bridge between them lies in a namespace of its own, so nothing is added to the network of this machine and no packet
leaves it. A machine can be cut off (`cut`, `heal`) and lose its power (`power_off` kills all its processes at once).
Needs root and iproute2.

    python -m tests.support.network FOLDER [--machines N]     # runs until Ctrl-C; then:  nsenter as it prints
"""

import argparse
import itertools
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

HOLDER = """
hostname {name}
mount --make-rprivate /
mount --bind {hosts} /etc/hosts
mount -t tmpfs -o size=1g tmpfs /dev/shm
echo $$ > {ready}
exec sleep infinity
"""
_NUMBERS = itertools.count()
REQUIRED_COMMANDS = ("ip", "nsenter", "unshare", "mount", "hostname")


def missing() -> list[str]:
    """What this machine lacks for it."""
    lacking = [command for command in REQUIRED_COMMANDS if shutil.which(command) is None]
    if not lacking and subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True).returncode != 0:
        lacking.append("root, with leave to make namespaces")
    return lacking


@dataclass
class Machine:
    """One of them.

    Attributes:
        name: its host name.
        address: its address.
        holder: its first process; when that dies, all of them do.
    """

    name: str
    address: str
    network: str
    holder: subprocess.Popen[bytes] | None = None
    first_process: int = 0

    def command(self, *command: str) -> list[str]:
        """The command line that runs a command on this machine."""
        namespaces = ("--net", "--uts", "--ipc", "--mount", "--pid")
        return ["nsenter", "--target", str(self.first_process), *namespaces, "--wd=/", "--", *command]


@dataclass
class Network:
    """A few machines on one bridge.

    Attributes:
        folder: for what belongs to it.
        count: of machines.
    """

    folder: Path
    count: int = 2
    machines: list[Machine] = field(default_factory=list)
    _tag: str = ""

    def __enter__(self) -> "Network":
        self._tag = f"zf{os.getpid()}.{next(_NUMBERS)}"  # one process may have several at a time
        self.machines = [
            Machine(f"n{index}", f"10.77.0.{10 + index}", f"{self._tag}n{index}") for index in range(1, self.count + 1)
        ]
        names = [f"{machine.address} {machine.name}" for machine in self.machines]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")
        try:
            _run("ip", "netns", "add", f"{self._tag}sw")
            _run("ip", "-n", f"{self._tag}sw", "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", f"{self._tag}sw", "link", "set", "bridge", "up")
            for machine in self.machines:
                self._connect(machine)
                self.power_on(machine)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines:
            self.power_off(machine)
            subprocess.run(["ip", "netns", "del", machine.network], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", f"{self._tag}sw"], check=False, capture_output=True)

    def _connect(self, machine: Machine) -> None:
        switch, port = f"{self._tag}sw", f"p{machine.name}"
        _run("ip", "netns", "add", machine.network)
        _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", machine.network)
        _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
        _run("ip", "-n", machine.network, "link", "set", "lo", "up")
        _run("ip", "-n", machine.network, "addr", "add", f"{machine.address}/24", "dev", "eth0")
        _run("ip", "-n", machine.network, "link", "set", "eth0", "up")

    def power_on(self, machine: Machine) -> None:
        """Give a machine its first process."""
        ready = self.folder / f"{machine.name}.ready"
        ready.unlink(missing_ok=True)
        script = HOLDER.format(name=machine.name, hosts=self.folder / "hosts", ready=ready)
        namespaces = ("--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        machine.holder = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{machine.network}", "unshare", *namespaces, "bash", "-c", script],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # unshare complains when its child is killed
            start_new_session=True,
        )
        deadline = time.monotonic() + 10
        while not ready.exists() or not ready.read_text():
            if machine.holder.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{machine.name} did not start")
            time.sleep(0.01)
        children = Path(f"/proc/{machine.holder.pid}/task/{machine.holder.pid}/children")
        machine.first_process = int(children.read_text().split()[0])

    def power_off(self, machine: Machine) -> None:
        """Kill every process of a machine at once."""
        if machine.holder is None:
            return
        os.kill(machine.first_process, signal.SIGKILL)
        machine.holder.wait(10)
        machine.holder = None

    def cut(self, machine: Machine) -> None:
        """Pull a machine's cable."""
        _run("ip", "-n", f"{self._tag}sw", "link", "set", f"p{machine.name}", "down")

    def heal(self, machine: Machine) -> None:
        """Plug it in again."""
        _run("ip", "-n", f"{self._tag}sw", "link", "set", f"p{machine.name}", "up")


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def main() -> None:
    """Run a network until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--machines", type=int, default=2)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with Network(options.folder.absolute(), options.machines) as network:
        for machine in network.machines:
            print(f"{machine.name} {machine.address}: {' '.join(machine.command('bash'))}", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("ending")


if __name__ == "__main__":
    main()

"""A real sshd on loopback with a throw-away key, and the ssh options that reach it. Needs openssh-server."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

HOSTS = ("127.0.1.1", "127.0.1.2")
"""Two addresses of this machine, so that it can play two hosts."""

REQUIRED_COMMANDS = ("sshd", "ssh", "ssh-keygen")


def find(command: str) -> str | None:
    """The path of a command, those of the system's administration included."""
    return shutil.which(command) or shutil.which(command, path="/usr/sbin:/sbin")


def missing_commands() -> list[str]:
    """What is not installed."""
    return [command for command in REQUIRED_COMMANDS if find(command) is None]


@dataclass
class SshServer:
    """A running sshd that lets this user in with the key in `folder`.

    Attributes:
        folder: of keys and configuration.
        options: for ssh; nothing of the tester's own configuration plays a part.
    """

    folder: Path
    port: int = 0
    options: tuple[str, ...] = ()
    _daemon: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __enter__(self) -> "SshServer":
        for name in ("host_key", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True)
        (self.folder / "authorized_keys").write_bytes((self.folder / "key.pub").read_bytes())
        with socket.socket() as probe:
            probe.bind((HOSTS[0], 0))
            self.port = probe.getsockname()[1]
        host_key = (self.folder / "host_key.pub").read_text().split()[:2]
        known = "".join(f"[{host}]:{self.port} {' '.join(host_key)}\n" for host in HOSTS)
        (self.folder / "known_hosts").write_text(known)
        self.options = self.options_with()
        self._start()
        return self

    def options_with(self, *, key: str = "key", known_hosts: str = "known_hosts") -> tuple[str, ...]:
        """Options for ssh with other files of the folder."""
        settings = (
            f"IdentityFile={self.folder / key}",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            f"UserKnownHostsFile={self.folder / known_hosts}",
            "GlobalKnownHostsFile=/dev/null",
            f"Port={self.port}",
            f"User={getpass.getuser()}",
        )
        return ("-F", "/dev/null", *(part for setting in settings for part in ("-o", setting)))

    def _start(self) -> None:
        configuration = [
            *(f"ListenAddress {host}:{self.port}" for host in HOSTS),
            f"HostKey {self.folder / 'host_key'}",
            f"AuthorizedKeysFile {self.folder / 'authorized_keys'}",
            f"PidFile {self.folder / 'pid'}",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "UsePAM no",
            "StrictModes no",
            "PermitRootLogin prohibit-password",
        ]
        (self.folder / "sshd_config").write_text("\n".join(configuration) + "\n")
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # root's sshd wants it; Debian makes it at boot
        command = find("sshd")
        assert command is not None
        with (self.folder / "sshd.log").open("wb") as log:
            # sshd starts itself anew for each connection and wants its whole path for that.
            self._daemon = subprocess.Popen(
                [command, "-D", "-e", "-f", str(self.folder / "sshd_config")], stdin=subprocess.DEVNULL, stderr=log
            )
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection((HOSTS[0], self.port), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > deadline or self._daemon.poll() is not None:
                    raise RuntimeError((self.folder / "sshd.log").read_text()) from None
                time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        if self._daemon is not None:
            self._daemon.send_signal(signal.SIGTERM)
            self._daemon.wait(10)

"""Joining the Ray cluster in RAY_ADDRESS, waiting for one that is just starting."""

import os
import socket
import time
from collections.abc import Callable
from typing import Any

from launcher.errors import ResourceError

CONNECT_TIMEOUT_S = 60.0


def connect(check_alive: Callable[[], None]) -> None:
    """Join the Ray cluster in RAY_ADDRESS, waiting for one that is just starting.

    Args:
        check_alive: raises when the cluster's head is known to have ended.

    Raises:
        ResourceError: there is no address, or nothing answers.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise ResourceError("RAY_ADDRESS is not set: the driver joins a Ray cluster and starts none")
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while not _answers(host, port, address):
        _pause_before(deadline, check_alive, f"no Ray cluster answers at RAY_ADDRESS={address}")
    import ray
    import ray._private.worker

    # Ray prints to stdout what it thinks of workers and nodes that died, among it whole logs of a raylet; no option
    # turns that off (`listen_error_messages` in its worker.py), and stdout may be for a program that reads JSON.
    ray._private.worker.print_to_stdstream = _say_nothing
    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
            return
        except ConnectionError as error:
            # A head listens a moment before it is ready, and says then what it says to a stranger.
            _pause_before(
                deadline, check_alive, f"the Ray cluster at RAY_ADDRESS={address} refuses the driver: {error}"
            )
        except (RuntimeError, ValueError) as error:
            raise ResourceError(f"the Ray cluster at RAY_ADDRESS={address} refuses the driver: {error}") from error


def _say_nothing(data: Any, ignore_prefix: bool) -> None:
    """The supervisor says what happened to workers and nodes."""


def _pause_before(deadline: float, check_alive: Callable[[], None], problem: str) -> None:
    """Wait a moment before the next try.

    Raises:
        ResourceError: the deadline has passed.
    """
    check_alive()
    if time.monotonic() > deadline:
        raise ResourceError(f"{problem} (tried for {CONNECT_TIMEOUT_S:.0f} s)")
    time.sleep(0.1)


def _answers(host: str, port: str, address: str) -> bool:
    """Whether something listens there; looked at first because `ray.init` itself waits for minutes without a word."""
    if not host or not port.isdigit():
        raise ResourceError(f"RAY_ADDRESS={address} is not of the form HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True

"""A `ray start` that has what takes time behind it before it is known which cluster to join: it imports Ray, and waits.

A node would otherwise begin to import Ray only when the head is up. The rest of the command line and the token come as
one line of JSON on standard input; no line, because the agent has ended, and it leaves.

python -P -m cluster.waiting_ray OPTION...
"""

import json
import os
import sys
from pathlib import Path


def main() -> int:
    """Import Ray, wait for the head's address and the token, join."""
    import ray.dashboard.optional_deps  # noqa: F401 - ray start would import it when it is half done
    from ray.scripts.scripts import cli

    line = sys.stdin.readline()
    if not line:
        return 0
    order = json.loads(line)
    os.environ.update(order["environment"])
    with Path(os.devnull).open() as nothing:  # what ray start starts has no business with our pipe
        os.dup2(nothing.fileno(), 0)
    cli(["start", *sys.argv[1:], *order["options"]], prog_name="ray")
    return 0


if __name__ == "__main__":
    sys.exit(main())

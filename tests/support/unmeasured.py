"""Processes whose lines coverage does not count.

Under Python 3.11 a traced process takes half as much time again, all of its code does. Where other processes pass the
same lines, they are the ones to count.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "COVERAGE_PROCESS_CONFIG"
"""By which coverage finds the children of a measured process (its option `patch = subprocess`)."""


def unmeasured_environment() -> dict[str, str]:
    """This process's, for children that are not measured."""
    return {name: value for name, value in os.environ.items() if name != VARIABLE}


@contextmanager
def unmeasured() -> Iterator[None]:
    """Children that are started meanwhile, and theirs, are not measured."""
    value = os.environ.pop(VARIABLE, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[VARIABLE] = value

"""`make install` installs the versions that constraints.txt names."""

from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
BUILD_DEPENDENT = ("nvidia-", "cuda-", "triton")
"""What torch's CUDA build brings along, in the versions that it names itself."""


def pinned() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines) > 100
    return {canonicalize_name(name): Version(version) for name, version in pins.items()}


def needed() -> dict[str, Version]:
    """Every distribution that zerofleet[dev] asks for on this machine, with its installed version."""
    found: dict[str, Version] = {}
    todo, seen = [Requirement("zerofleet[dev]")], set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen or name.startswith(BUILD_DEPENDENT):
            continue
        seen.add((name, *sorted(requirement.extras)))
        installed = distribution(name)
        found[name] = Version(installed.version)
        for text in installed.requires or []:
            inner = Requirement(text)
            if inner.marker is None or any(
                inner.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)
            ):
                todo.append(inner)
    del found["zerofleet"]
    return found


def test_everything_that_is_needed_is_pinned() -> None:
    assert sorted(set(needed()) - set(pinned())) == []


def test_the_pinned_versions_are_installed() -> None:
    pins = pinned()
    installed = {name: version for name, version in needed().items() if version.public != pins[name].public}
    assert installed == {}

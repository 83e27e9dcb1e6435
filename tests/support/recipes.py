"""What the comment at the head of a shipped recipe tells a reader to type."""

import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "recipes"
TEXTS = {path.relative_to(ROOT).with_suffix("").as_posix(): path.read_text() for path in sorted(ROOT.rglob("*.yaml"))}


def lines(text: str) -> list[str]:
    """Lines of the comment at the head; a backslash at the end joins the next one."""
    head = text[: text.index("\nname: ")].splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in head).replace("\\\n", "").splitlines()


def command(name: str, beginning: str) -> list[str] | None:
    """Words of the command that a line begins with, without `zerofleet`; `None` without such a line."""
    found = [line for line in lines(TEXTS[name]) if line.startswith(beginning)]
    return shlex.split(found[0].removeprefix(beginning).strip()) if found else None


PLANNED = {name: words for name in TEXTS if (words := command(name, "zerofleet plan ")) is not None}
"""Arguments of `zerofleet plan`, where a recipe names the cluster that it is for."""
SMOKES = {name: words[1:] for name in TEXTS if (words := command(name, "Smoke: zerofleet run ")) is not None}
"""Overrides with which a recipe for GPUs runs on two CPU cores in a minute."""

"""What the documents tell a reader to type."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ON_SLURM = "On a Slurm cluster"
"""Section of the README whose commands need one; tests/jobs/test_slurm.py runs them."""


def section(document: str, heading: str) -> str:
    """The text below a heading of the second level, up to the next one."""
    parts = re.split(r"^## (.*)$", (ROOT / document).read_text(), flags=re.MULTILINE)
    return parts[parts.index(heading) + 1]


def blocks(document: str, language: str, heading: str | None = None) -> list[str]:
    """The code blocks of a document, or of one of its sections."""
    text = (ROOT / document).read_text() if heading is None else section(document, heading)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(document: str, heading: str | None = None) -> list[str]:
    """The lines of its shell blocks."""
    return [line for block in blocks(document, "bash", heading) for line in block.splitlines() if line.strip()]

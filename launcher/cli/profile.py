"""`zerofleet profile`: list and show profiles, and write one from what the machine tells."""

import sys
from pathlib import Path
from typing import Annotated

import typer

profile = typer.Typer(no_args_is_help=True, help="List, show and write profiles: where to train.")


@profile.command("ls")
def list_profiles() -> None:
    """List your own and the shipped profiles."""
    from cluster.profile import load_profile, profile_names

    for name in profile_names():
        loaded = load_profile(name)
        print(f"{name:<16}{loaded.backend:<8}{loaded.description}")


@profile.command("show")
def show(name: Annotated[str, typer.Argument(help="Name or file of a profile.")]) -> None:
    """Print a profile's file."""
    from cluster.profile import find_profile

    print(find_profile(name).read_text(), end="")


@profile.command("init")
def init(
    backend: Annotated[str, typer.Argument(help="slurm, ssh, ray or local.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write. Default: print it.")] = None,
) -> None:
    """Write a profile from what this machine tells: its GPUs, and Slurm's partitions."""
    from launcher.errors import ExpectedError
    from launcher.jobs import draft_profile

    text = draft_profile(backend)
    if output is None:
        print(text, end="")
        return
    if output.exists():
        raise ExpectedError(f"{output} exists; name another file")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    print(f"wrote {output}; use it with --profile {output}", file=sys.stderr)

"""The `zerofleet` command: its verbs, and how errors end it.

Every verb imports what it needs when it is called, so that `--help` and `plan` never load torch, ray or deepspeed.
"""

import sys
from typing import Annotated

import typer

from cluster.errors import ExpectedError
from launcher.cli.checkpoint import checkpoint
from launcher.cli.doctor import doctor
from launcher.cli.evaluate import evaluate, generate, predict
from launcher.cli.export import export
from launcher.cli.foreign import import_
from launcher.cli.jobs import cancel, jobs, status
from launcher.cli.logs import attach, logs
from launcher.cli.plan import plan
from launcher.cli.prepare import prepare
from launcher.cli.profile import profile
from launcher.cli.recipes import recipes
from launcher.cli.report import report
from launcher.cli.run import run
from launcher.cli.schema import schema
from launcher.cli.simulate import simulate
from launcher.cli.submit import submit, sweep
from launcher.cli.tensorboard import tensorboard

EXPECTED_ERROR = 2
"""Exit code when a person must change something; also that of a wrong command line."""

app = typer.Typer(
    name="zerofleet",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run)
app.command()(submit)
app.command()(jobs)
app.command()(status)
app.command()(logs)
app.command()(attach)
app.command()(cancel)
app.command()(report)
app.command()(sweep)
app.command()(plan)
app.command()(doctor)
app.command()(simulate)
app.command()(prepare)
app.command()(export)
app.command()(evaluate)
app.command()(predict)
app.command()(generate)
app.command()(tensorboard)
app.command("import")(import_)
app.add_typer(recipes, name="recipes")
app.add_typer(profile, name="profile")
app.add_typer(checkpoint, name="checkpoint")
app.command()(schema)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("zerofleet"))
        raise typer.Exit


@app.callback()
def zerofleet(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Declarative distributed training: one recipe, supervised by Ray, trained by DeepSpeed."""


def main() -> None:
    """Run the command line; an expected error becomes text on stderr and exit code 2."""
    try:
        app()
    except ExpectedError as error:
        print(error, file=sys.stderr)
        raise SystemExit(EXPECTED_ERROR) from None


if __name__ == "__main__":
    main()

"""`zerofleet report`: where a run's time went."""

import json
from pathlib import Path
from typing import Annotated

import typer

from launcher.run_directory import RunDirectory, write_atomically


def report(
    run_dir: Annotated[Path, typer.Argument(help="Run directory.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.md and report.html. Default: the run's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the account as JSON, write nothing.")] = False,
) -> None:
    """Say where every minute of a run went: goodput, parts of the time, incidents and what each cost.

    Prints Markdown, and writes it with a self-contained HTML page that has a timeline of attempts.
    """
    from launcher.errors import RunDirectoryError
    from launcher.orchestration.journal import read_account
    from launcher.orchestration.report import as_html, as_markdown

    directory = RunDirectory.at(run_dir)
    account = read_account(directory)
    if not account.spans:
        raise RunDirectoryError(f"{directory.path} holds no events.jsonl: no run was started there")
    if as_json:
        print(json.dumps(account.as_json(), indent=1))
        return
    name = directory.path.name
    text = as_markdown(account, name)
    folder = (output or directory.path).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.md", text)
    write_atomically(folder / "report.html", as_html(account, name))
    print(text)
    print(f"written: {folder / 'report.md'}, {folder / 'report.html'}")

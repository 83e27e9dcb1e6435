"""`zerofleet import`: a recipe out of another tool's file."""

import json
from pathlib import Path
from typing import Annotated

import typer


def import_(
    file: Annotated[Path, typer.Argument(help="Of Axolotl, LLaMA-Factory, TrainingArguments or DeepSpeed.")],
    output: Annotated[Path | None, typer.Option(help="Recipe to write. Default: print it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write what another tool's file says as a recipe, and name what could not be carried over."""
    from launcher.errors import ExpectedError
    from launcher.recipe.foreign import import_file

    found = import_file(file)
    if output is not None:
        if output.exists():
            raise ExpectedError(f"{output} is there already; name another file")
        output.write_text(found.yaml(), encoding="utf-8")
    if as_json:
        facts = {"tool": found.tool, "recipe": found.recipe, "left_out": found.left_out, "open": found.open}
        print(json.dumps(facts, indent=2))
    elif output is None:
        print(found.yaml(), end="")
    else:
        print(f"{found.tool} -> {output}")
        for name in found.open:
            print(f"  to be filled in: {name}")
        for key, reason in found.left_out.items():
            print(f"  not carried over: {key}: {reason}")

"""`zerofleet recipes`: the recipes that ship with ZeroFleet."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

recipes = typer.Typer(no_args_is_help=True, help="List, show or copy the shipped recipes.")

Name = Annotated[str, typer.Argument(help="Name of a shipped recipe, as `recipes ls` prints it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@recipes.command("ls")
def list_names(as_json: AsJson = False) -> None:
    """List the shipped recipes with the command that runs each."""
    from launcher.recipe.catalogue import list_recipes

    entries = list_recipes()
    if as_json:
        facts = [_facts(entry.name, entry.path, entry.command, entry.description) for entry in entries]
        print(json.dumps(facts, indent=2))
        return
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        print(f"{entry.name:<{width}}  {entry.description or entry.command}")


@recipes.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Print a shipped recipe as it is written; as JSON, with its defaults and references filled in."""
    from launcher.recipe.catalogue import shipped_recipe
    from launcher.recipe.loading import load_recipe

    entry = shipped_recipe(name)
    if as_json:
        facts = _facts(entry.name, entry.path, entry.command, entry.description)
        print(json.dumps({**facts, "recipe": load_recipe(entry.path).model_dump(mode="json")}, indent=2))
    else:
        print(entry.path.read_text(encoding="utf-8"), end="")


@recipes.command()
def copy(
    name: Name,
    destination: Annotated[Path, typer.Argument(help="File to write, or a folder to write it into.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Copy a shipped recipe to a file of your own."""
    from launcher.recipe.catalogue import copy_recipe

    target = copy_recipe(name, destination)
    print(json.dumps({"path": str(target)}) if as_json else f"{target}: run it with `zerofleet run {target}`")


def _facts(name: str, path: Path, command: str, description: str) -> dict[str, Any]:
    return {"name": name, "path": str(path), "command": command, "description": description}

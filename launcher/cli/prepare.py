"""`zerofleet prepare`: tokenise and pack the data of a recipe ahead of its run."""

import json
from typing import Annotated

import typer


def prepare(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, laid over the recipe.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print where the data is as JSON.")] = False,
) -> None:
    """Tokenise and pack a recipe's data.

    The result lies in a cache, where `zerofleet run` and a second call find it.
    """
    from launcher.data.prepare import prepare as prepare_data
    from launcher.recipe.loading import read_recipe

    loaded = read_recipe(recipe, overrides or ())
    with loaded.locating():
        prepared = prepare_data(loaded.recipe)
    if as_json:
        facts = {"directory": str(prepared.directory), "fingerprint": prepared.fingerprint}
        print(json.dumps({**facts, "statistics": prepared.statistics}, indent=2))
        return
    print(f"{loaded.recipe.name}: prepared in {prepared.directory}")
    for split in ("train", "validation"):
        counts = prepared.statistics[split]
        print(
            f"  {split:<10}  {counts['documents']:,} documents, {counts['tokens']:,} tokens in {counts['sequences']:,} "
            f"sequences of {loaded.recipe.data.sequence_length:,} ({counts['utilization']:.1%} used)"
        )

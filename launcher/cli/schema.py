"""`zerofleet schema`: the JSON Schema that an editor completes and checks recipes with."""

import json
from typing import Annotated

import typer


def schema(
    profile: Annotated[bool, typer.Option("--profile", help="The schema of profiles instead of recipes.")] = False,
) -> None:
    """Print the JSON Schema of recipes.

    In an editor with the YAML language server: `zerofleet schema > recipe.schema.json`, and at the top of a recipe
    `# yaml-language-server: $schema=recipe.schema.json`.
    """
    from cluster.profile import Profile
    from launcher.recipe.schema import Recipe

    document = (Profile if profile else Recipe).model_json_schema()
    print(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **document}, indent=2))

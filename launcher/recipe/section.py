"""What every part of a recipe is made from."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every part of a recipe: frozen, unknown keys refused, documented by the strings under its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

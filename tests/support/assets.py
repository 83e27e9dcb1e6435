"""The rows that `benchmarks/make_rows.py` makes, for the recipes that read them."""

import importlib.util
from pathlib import Path
from types import ModuleType

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "make_rows.py"


def make_rows() -> ModuleType:
    """The script, imported."""
    spec = importlib.util.spec_from_file_location("make_rows", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

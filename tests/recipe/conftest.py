"""A small recipe that every test of this folder may start from."""

from collections.abc import Callable
from pathlib import Path

import pytest

MINIMAL = """\
# zerofleet run small.yaml
name: small
description: For the tests
model:
  config:
    model_type: llama
    hidden_size: 64
tokenizer:
  train:
    vocab_size: 512
data:
  sources:
    - type: text
      files: [texts/*.txt]
  sequence_length: 32
training:
  max_steps: 10
  micro_batch_size: 2
  learning_rate: 1e-4
"""


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe: the minimal one with replacements, or another text."""

    def write(*replacements: tuple[str, str], text: str = MINIMAL, name: str = "small.yaml") -> Path:
        for old, new in replacements:
            assert text.count(old) == 1, f"{old!r} must stand in the recipe once"
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return path

    return write

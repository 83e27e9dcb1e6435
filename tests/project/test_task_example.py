"""The task of docs/tasks.md is one file and one line, as it says there, and trains."""

import re
import sys
from pathlib import Path

import pytest
import torch

from launcher.data.prepare import prepare
from launcher.planning.layout import Resources
from launcher.planning.plan import make_plan
from launcher.recipe.loading import load_recipe
from launcher.recipe.tasks import TASKS, TaskEntry
from launcher.tasks import make_task
from tests.training.task_runs import BERT, STDLIB, write_recipe

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "tasks.md"


def test_the_example_is_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, line = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "swapped_halves.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    for name, entry in eval(f"{{{line}}}", {"TaskEntry": TaskEntry}).items():
        monkeypatch.setitem(TASKS, name, entry)
    source = {"type": "text", "files": [f"{STDLIB}/json/*.py", f"{STDLIB}/email/*.py"], "sample_by": "paragraph"}
    recipe = write_recipe(
        tmp_path, "swapped_halves", f"{{config: {BERT}}}", [source],
        data={"sequence_length": 48}, tokenizer={"train": {"vocab_size": 400}},
    )  # fmt: skip
    loaded = load_recipe(recipe)
    prepared = prepare(loaded, progress=False)
    assert prepared.facts["labels"] == ["in order", "swapped"]
    task = make_task(make_plan(loaded, Resources(nodes=1, workers_per_node=1)), prepared.facts)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    (dataset,) = prepared.split("train")
    batch = task.collate([dataset[index] for index in range(16)])
    losses = []
    for _ in range(12):
        output = task.loss(model, batch)
        (output.loss_sum / output.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss_sum.item())
    assert losses[-1] < 0.8 * losses[0]
    sys.modules.pop("swapped_halves")


def test_every_task_is_in_the_table() -> None:
    listed = re.findall(r"^\| `(\w+)` \| ", DOCUMENT.read_text(), flags=re.MULTILINE)
    assert sorted(set(listed) - {"task"}) == sorted(TASKS)
    for name, entry in TASKS.items():
        assert entry.load().__doc__, name

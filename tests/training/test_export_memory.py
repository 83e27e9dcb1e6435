"""An export needs memory for a weight, not for the model."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from launcher.data.store import PreparedData
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory
from tests.support.forked import ForkServer

MODEL = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 4}


@pytest.mark.distributed
def test_memory_holds_a_part_of_the_model(
    make_run: Callable[..., tuple[RunDirectory, Plan]], fork_server: ForkServer, prepared: PreparedData, tmp_path: Path
) -> None:
    """The checkpoint has three times the model's size, and the largest weight a fiftieth of it."""
    sizes = [f"model.config.{name}={value}" for name, value in MODEL.items()]
    directory, _ = make_run("max_steps=1", "zero.stage=2", "max_eval_samples=2", *sizes)
    places = {"run_directory": str(directory.path), "data": str(prepared.directory)}
    fork_server.results(2, "cases:run", **places)
    (growth,) = fork_server.results(1, "cases:memory_of_an_export", **places, target=str(tmp_path / "export"))
    with safe_open(tmp_path / "export/model.safetensors", framework="pt") as file:
        size = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (it is no dictionary)
    assert size > 80e6
    assert growth < size / 4
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

"""The sizes that a run can have with the same global batch; no profile can ask for them yet."""

import sysconfig
from pathlib import Path

import pytest

from launcher.orchestration.elastic import Elastic
from launcher.planning.layout import Resources
from launcher.planning.plan import Plan, make_plan
from launcher.recipe.loading import read_recipe
from launcher.run_directory import RunDirectory

RECIPE = """
name: tiny
seed: 7
model:
  config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, max_position_embeddings: 64}}
tokenizer: {{train: {{vocab_size: 320}}}}
data:
  sources: [{{type: text, sample_by: paragraph, files: ["{stdlib}/json/*.py", "{stdlib}/email/*.py"]}}]
  sequence_length: 32
  preprocessing_num_workers: 1
  cache_directory: {cache}
training: {{max_steps: 100, micro_batch_size: 2, global_batch_size: 12, precision: fp32, learning_rate: 3.0e-3}}
checkpoint: {{save_steps: 10}}
logging: {{logging_steps: 1, tensorboard: false}}
fault_tolerance: {{resize_interval_seconds: 1, preflight: false, restart_delay_seconds: 0.1}}
export: {{at_end: false}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(stdlib=sysconfig.get_path("stdlib"), cache=tmp_path / "cache"))
    return path


def test_the_sizes_are_those_that_keep_the_global_batch(recipe: Path, tmp_path: Path) -> None:
    directory = RunDirectory.at(tmp_path / "run")
    directory.create()
    plan = make_plan(read_recipe(str(recipe), ()).recipe, Resources(nodes=6, workers_per_node=1, min_nodes=2))
    elastic = Elastic(plan, directory)
    assert [elastic.largest(available) for available in range(8)] == [None, None, 2, 3, 4, 4, 6, 6]
    small = elastic.write(4)
    assert (small.batch.global_batch_size, small.layout.data_parallel_size) == (12, 4)
    assert Plan.model_validate_json(directory.plan.read_text()) == small
    assert Plan.model_validate_json(directory.full_plan.read_text()) == plan
    elastic.write(6)
    assert Plan.model_validate_json(directory.plan.read_text()) == plan
    assert not directory.full_plan.exists()

"""Real ranks, real data and a real (tiny, random) Llama folder, shared by the tests of training."""

import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from launcher.data.prepare import prepare
from launcher.data.store import PreparedData
from launcher.planning.layout import Resources
from launcher.planning.plan import Plan, make_plan
from launcher.recipe.loading import load_recipe
from launcher.recipe.schema import Recipe
from launcher.run_directory import RunDirectory
from launcher.submit import write_run
from tests.support.assets import make_rows
from tests.support.equality import Equality
from tests.support.forked import ForkServer
from tests.support.ranks import Ranks

VOCAB = 320


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(1, tmp_path_factory.mktemp("rank"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(4, tmp_path_factory.mktemp("ranks"), measured=False)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def eight_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Not for the session: eight processes are much memory."""
    ranks = Ranks(8, tmp_path_factory.mktemp("ranks"), measured=False)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which recipes look for rows that a script makes (`ZEROFLEET_ASSETS`)."""
    folder = tmp_path_factory.mktemp("assets")
    make_rows().write_rows(folder / "rows")
    return folder


@pytest.fixture
def ranks_of(request: pytest.FixtureRequest) -> Callable[[int], Ranks]:
    """Live ranks by number, started when first asked for."""

    def start(size: int) -> Ranks:
        ranks: Ranks = request.getfixturevalue({1: "one_rank", 2: "two_ranks", 4: "four_ranks", 8: "eight_ranks"}[size])
        return ranks

    return start


@pytest.fixture
def fp16_on_any_cpu(two_ranks: Ranks) -> Iterator[None]:
    """The switch under which fp16 runs here: DeepSpeed refuses processors without AVX512-FP16 or AMX."""
    two_ranks.call("cases:pretend_fp16", supported=True)
    yield
    two_ranks.call("cases:pretend_fp16", supported=None)


@pytest.fixture(scope="session")
def equality(tmp_path_factory: pytest.TempPathFactory, base_recipe: Path, prepared: PreparedData) -> Equality:
    return Equality(tmp_path_factory.mktemp("equality"), base_recipe, prepared.tokenizer_directory)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("forked"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def base_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe on a few files of the standard library; padding makes the counts of targets uneven."""
    folder = tmp_path_factory.mktemp("recipe")
    stdlib = sysconfig.get_path("stdlib")
    path = folder / "tiny.yaml"
    path.write_text(
        f"""
name: tiny
seed: 7
model:
  config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, max_position_embeddings: 64}}
tokenizer: {{train: {{vocab_size: {VOCAB}}}}}
data:
  sources: [{{type: text, sample_by: paragraph, files: ["{stdlib}/json/*.py", "{stdlib}/email/*.py"]}}]
  validation_fraction: 0.1
  sequence_length: 32
  packing: first_fit_decreasing
  preprocessing_num_workers: 1
  cache_directory: {folder / "cache"}
training:
  max_steps: 20
  micro_batch_size: 2
  gradient_accumulation_steps: 2
  precision: fp32
  learning_rate: 3.0e-3
  warmup_steps: 5
  max_grad_norm: 0.2
optimizer: {{weight_decay: 0.05}}
evaluation: {{max_eval_samples: 16}}
logging: {{logging_steps: 1, sample_ids: true, tensorboard: false}}
export: {{at_end: false}}
"""
    )
    return path


@pytest.fixture(scope="session")
def prepared(base_recipe: Path) -> PreparedData:
    return prepare(load_recipe(base_recipe), progress=False)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, prepared: PreparedData) -> Path:
    """Random weights as a Hugging Face folder, with the trained tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(prepared.tokenizer_directory).save_pretrained(folder)
    return folder


@pytest.fixture
def make_run(tmp_path: Path, base_recipe: Path) -> Callable[..., tuple[RunDirectory, Plan]]:
    """Write a run directory for the base recipe with overrides; the plan is for `workers` CPU workers."""

    def make(*overrides: str, workers: int = 2, name: str = "run") -> tuple[RunDirectory, Plan]:
        recipe: Recipe = load_recipe(base_recipe, overrides)
        plan = make_plan(recipe, Resources(nodes=1, workers_per_node=workers))
        directory = RunDirectory.at(tmp_path / name)
        write_run(directory, plan)
        return directory, plan

    return make

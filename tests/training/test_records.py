"""What a run leaves for people: TensorBoard events, metrics, samples, an export, and exact evaluation."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from launcher.checkpoints import folders
from launcher.data.store import PreparedData
from launcher.planning.measured import planned_memory, planned_seconds
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory, read_json_lines
from launcher.training.export import export_checkpoint
from tests.support.ranks import Ranks

MakeRun = Callable[..., tuple[RunDirectory, Plan]]


@pytest.mark.distributed
def test_tensorboard_reads_what_was_written(two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData) -> None:
    directory, plan = make_run(
        "max_steps=6", "eval_steps=3", "logging.tensorboard=true", 'evaluation.generate.prompts=["def "]'
    )
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    events = EventAccumulator(str(directory.tensorboard), size_guidance={"tensors": 0}).Reload()
    logged = {record["step"]: record for record in read_json_lines(directory.metrics) if "loss" in record}
    for tag, key in (
        ("train/loss", "loss"),
        ("train/learning_rate", "learning_rate"),
        ("train/grad_norm", "grad_norm"),
        ("performance/tokens_per_second", "tokens_per_second"),
        ("performance/samples_per_second", "samples_per_second"),
        ("performance/model_flops_per_second", "model_flops_per_second"),
        ("performance/memory_bytes", "memory_bytes"),
    ):
        scalars = events.Scalars(tag)
        assert [event.step for event in scalars] == [1, 2, 3, 4, 5, 6], tag
        assert [event.value for event in scalars] == pytest.approx([logged[s][key] for s in range(1, 7)], rel=1e-6), tag
    assert plan.step is not None
    planned = {
        "performance/step_seconds_planned": plan.step.seconds,
        "performance/memory_bytes_planned": planned_memory(plan),
        "phases/backward_seconds_planned": planned_seconds(plan)["backward"],
    }
    for tag, value in planned.items():
        assert [event.value for event in events.Scalars(tag)] == pytest.approx([value] * 6, rel=1e-6), tag
    for phase in ("data", "forward", "agree", "backward", "optimizer"):
        measured = [logged[step]["phase_seconds"][phase] for step in range(1, 7)]
        assert all(seconds > 0 for seconds in measured), phase
        scalars = events.Scalars(f"phases/{phase}_seconds")
        assert [event.value for event in scalars] == pytest.approx(measured, rel=1e-6)
    evaluations = [record for record in read_json_lines(directory.metrics) if "eval_loss" in record]
    assert [event.step for event in events.Scalars("evaluation/loss")] == [3, 6]
    assert [e.value for e in events.Scalars("evaluation/loss")] == pytest.approx([e["eval_loss"] for e in evaluations])
    assert evaluations[0]["eval_perplexity"] == pytest.approx(math.exp(evaluations[0]["eval_loss"]))
    tags = events.Tags()["tensors"]
    assert {"recipe/text_summary", "deepspeed/text_summary", "samples/0/text_summary"} <= set(tags)
    assert b"hidden_size: 32" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]
    assert "performance/mfu" not in events.Tags()["scalars"], "a CPU's peak is not known, so there is no MFU"
    assert not any("loss" in key and value is None for record in logged.values() for key, value in record.items())


@pytest.fixture
def engine_case(two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData) -> Callable[..., None]:
    """Train a few steps, then compare the engine's logits with the export's."""

    def check(*overrides: str, tolerance: float) -> None:
        directory, plan = make_run("max_steps=3", *overrides)
        two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
        ids = [[5, 9, 200, 3, 77, 150, 8, 1]]
        expected = two_ranks.call(
            "cases:logits", run_directory=str(directory.path), data=str(prepared.directory), input_ids=ids
        )[0]
        folder = folders.complete(directory.checkpoints)[-1]
        export_checkpoint(folder, plan, prepared.tokenizer_directory, directory.export)
        model = AutoModelForCausalLM.from_pretrained(directory.export)
        with torch.no_grad():
            actual = model(torch.tensor(ids), use_cache=False).logits.float()
        torch.testing.assert_close(actual, torch.tensor(expected), atol=tolerance, rtol=0)
        _check_folder(directory.export, prepared)

    return check


def _check_folder(export: Path, prepared: PreparedData) -> None:
    names = {path.name for path in export.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert (
        tokenizer("import os")["input_ids"]
        == AutoTokenizer.from_pretrained(prepared.tokenizer_directory)("import os")["input_ids"]
    )
    assert GenerationConfig.from_pretrained(export).eos_token_id == tokenizer.eos_token_id


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_export_has_the_engine_s_logits(stage: int, engine_case: Callable[..., None]) -> None:
    engine_case(f"zero.stage={stage}", tolerance=1e-6)


@pytest.mark.distributed
def test_export_of_tied_embeddings(engine_case: Callable[..., None]) -> None:
    engine_case("model.config.tie_word_embeddings=true", "zero.stage=2", tolerance=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 3])
def test_export_of_bf16_training(stage: int, engine_case: Callable[..., None]) -> None:
    engine_case("precision=bf16", f"zero.stage={stage}", tolerance=1e-6)


@pytest.mark.distributed
def test_evaluation_is_exact_over_all_tokens(
    one_rank: Ranks, two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData, model_folder: Path
) -> None:
    """17 samples on 2 ranks with micro batches of 2: no multiple of anything, and each counted once."""
    overrides = (
        *("model.config=null", f"model.model_name_or_path={model_folder}", "tokenizer.train=null"),
        *("max_steps=1", "eval_steps=1", "max_eval_samples=17", "learning_rate=1e-12"),
    )
    results = []
    for ranks, workers in ((one_rank, 1), (two_ranks, 2)):
        directory, plan = make_run(*overrides, workers=workers, name=f"eval{workers}")
        from launcher.data.prepare import prepare

        data = prepare(plan.recipe, progress=False)
        ranks.call("cases:run", run_directory=str(directory.path), data=str(data.directory))
        (record,) = [r for r in read_json_lines(directory.metrics) if "eval_loss" in r]
        results.append((record["eval_loss"], record["eval_targets"]))
    (rows,) = data.split("validation")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    total, count = 0.0, 0
    for index in range(17):
        row = rows[index * len(rows) // 17]  # spread evenly
        ids, labels, positions = (torch.from_numpy(row[k])[None] for k in ("input_ids", "labels", "position_ids"))
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        targets = labels[:, 1:].flatten()
        total += float(
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum")
        )
        count += int((targets != -100).sum())
    assert results[0] == (pytest.approx(total / count, abs=1e-6), count)
    assert results[1] == (pytest.approx(total / count, abs=1e-6), count)


@pytest.mark.distributed
def test_early_stopping(two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData) -> None:
    directory, _ = make_run("max_steps=20", "eval_steps=2", "early_stopping_patience=2", "early_stopping_threshold=100")
    result, _ = two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    # The first evaluation sets the best; the next two are no improvement by 100 nats.
    assert (result["status"], result["early_stopped"], result["step"]) == ("complete", True, 6)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 3])
def test_generated_samples_are_recorded(
    stage: int, two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData
) -> None:
    directory, _ = make_run(
        "max_steps=2", f"zero.stage={stage}", 'evaluation.generate={prompts: ["import ", "def "], max_new_tokens: 5}'
    )
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    records = read_json_lines(directory.path / "samples.jsonl")
    assert [(record["step"], record["prompt"]) for record in records] == [(2, "import "), (2, "def ")]
    assert all(record["text"] for record in records)


@pytest.mark.distributed
def test_gradient_checkpointing_changes_no_loss(two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData) -> None:
    losses = []
    for value in ("false", "true"):
        directory, _ = make_run("max_steps=4", f"gradient_checkpointing={value}", name=f"checkpointing-{value}")
        two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
        losses.append([record["loss"] for record in read_json_lines(directory.metrics) if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)

"""Sequence to sequence under ZeRO 3: what it writes is measured, stops, and is what the exported model writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sacrebleu.metrics import CHRF
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from typer.testing import CliRunner

from launcher.checkpoints import folders
from launcher.cli.main import app
from launcher.errors import RecipeError
from launcher.training.export import export_checkpoint
from tests.support.ranks import Ranks
from tests.training.task_runs import STDLIB, run_of, write_recipe

T5 = "{model_type: t5, d_model: 48, d_kv: 12, d_ff: 96, num_layers: 2, num_heads: 4, dropout_rate: 0.0}"
SOURCE = {
    "type": "text", "files": [f"{STDLIB}/email/*.py", f"{STDLIB}/asyncio/*.py", f"{STDLIB}/json/*.py"],
    "pattern": r'(?P<source>def \w+)\([^)]*\):\n\s+"""(?P<target>[^"\n]{5,30})',
}  # fmt: skip


def make(folder: Path, *overrides: str, **sections: Any) -> Any:
    recipe = write_recipe(
        folder, "seq2seq_lm", f"{{config: {T5}}}", [SOURCE], data={"sequence_length": 24},
        tokenizer={"train": {"vocab_size": 400}}, seq2seq={"metrics": ["chrf", "rouge"], "max_new_tokens": 20},
        logging={"tensorboard": True}, **sections,
    )  # fmt: skip
    return run_of(recipe, folder / "run", *overrides)


@pytest.mark.distributed
def test_two_workers_write_what_the_exported_model_writes(tmp_path: Path, two_ranks: Ranks) -> None:
    directory, plan, prepared = make(
        tmp_path, "zero.stage=3", "training.max_steps=40", "training.micro_batch_size=8", "training.learning_rate=1e-2",
        "evaluation.max_eval_samples=21", "evaluation.eval_steps=20",
    )  # fmt: skip
    results = two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    evaluation = json.loads((directory.path / "evaluation.json").read_text())
    assert results[0]["metrics"]["eval_chrf"] == evaluation["metrics"]["chrf"]
    newest = folders.complete(directory.checkpoints)[-1]
    export_checkpoint(newest, plan, prepared.tokenizer_directory, directory.export)
    model = AutoModelForSeq2SeqLM.from_pretrained(directory.export).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory.export)
    (dataset,) = prepared.split("validation")
    chosen = [dataset[index * len(dataset) // 21] for index in range(21)]
    written, tokens = [], []
    for sample in chosen:
        ids = torch.from_numpy(sample["input_ids"].astype(np.int64))[None]
        tokens.append(model.generate(ids, max_new_tokens=20, do_sample=False)[0])
        written.append(tokenizer.decode(tokens[-1], skip_special_tokens=True))
    assert any(len(row) < 21 for row in tokens), "it has learnt to stop"
    shown = evaluation["report"]["samples"]
    assert [sample["written"] for sample in shown] == written[: len(shown)]
    targets = [bytes(sample["target"]).decode() for sample in chosen]
    assert evaluation["metrics"]["chrf"] == pytest.approx(CHRF().corpus_score(written, [targets]).score, abs=1e-9)
    assert set(evaluation["metrics"]) == {"token_accuracy", "chrf", "rouge1", "rouge2", "rougeL"}

    events = EventAccumulator(str(directory.tensorboard)).Reload()
    *_, text = events.Tensors("samples/0/text_summary")
    assert shown[0]["written"] in text.tensor_proto.string_val[0].decode()
    assert events.Scalars("evaluation/rougeL")[-1].value == pytest.approx(evaluation["metrics"]["rougeL"])

    (directory.path / "data.json").write_text(json.dumps({"directory": str(prepared.directory)}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"source": sample["source"]}) + "\n" for sample in shown))
    done = CliRunner().invoke(app, ["predict", str(directory.path), str(rows)])
    assert done.exit_code == 0, done.output
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [answer["text"] for answer in answers] == written[: len(shown)]
    done = CliRunner().invoke(
        app, ["generate", str(directory.path), shown[0]["source"], "--json", "--max-new-tokens", "20"]
    )
    assert json.loads(done.stdout.splitlines()[-1])["text"] == written[0]


def test_prompts_of_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"behind what prompt_tuning learns: leave seq2seq\.metrics out"):
        make(tmp_path, adapter={"method": "prompt_tuning"})

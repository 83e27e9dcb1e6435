"""Exports in 8 bits and as ONNX: what they compute, that others load them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, CLIPConfig
from typer.testing import CliRunner

from launcher.checkpoints import folders
from launcher.cli.main import app
from launcher.errors import ExpectedError
from launcher.tasks.image_text_contrastive import ImageTextContrastive
from launcher.training.offline import evaluate_checkpoint, restore_scalars, whole_model
from launcher.training.onnx_export import _call_of, _convert, _difference, _Plain, export_onnx
from tests.support.ranks import Ranks
from tests.training.task_runs import BERT, STDLIB, run_of, write_recipe

PARAGRAPHS = {"type": "text", "files": [f"{STDLIB}/json/*.py", f"{STDLIB}/email/*.py"], "sample_by": "paragraph",
              "label_from_folder": True}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, two_ranks: Ranks) -> Any:
    folder = tmp_path_factory.mktemp("changed")
    recipe = write_recipe(
        folder, "sequence_classification", f"{{config: {BERT}}}", [PARAGRAPHS], data={"sequence_length": 32},
        tokenizer={"train": {"vocab_size": 400}}, training={"max_steps": 40, "micro_batch_size": 8},
        adapter={"method": "lora", "target_modules": ["query", "value"]}, evaluation={"max_eval_samples": 60},
    )  # fmt: skip
    directory, plan, prepared = run_of(recipe, folder / "run", "training.learning_rate=1e-2")
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    (directory.path / "data.json").write_text(json.dumps({"directory": str(prepared.directory)}))
    return directory, plan, prepared


def export(run: Any, target: Path, *options: str) -> Any:
    done = CliRunner().invoke(app, ["export", str(run[0].path), "--output", str(target), "--json", *options])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.distributed
def test_eight_bits_are_measured_and_loaded_by_transformers(run: Any, tmp_path: Path) -> None:
    directory, plan, prepared = run
    found = export(run, tmp_path / "small", "--quantize", "int8", "--max-samples", "60")["quantized"]
    (checkpoint,) = folders.complete(directory.checkpoints)
    whole, metrics = evaluate_checkpoint(checkpoint, plan, prepared, 60)
    assert found["before"] == pytest.approx({"loss": whole.loss, **metrics.values}, abs=1e-5)
    assert 0 < abs(found["after"]["loss"] - whole.loss) < 0.1
    assert found["bytes_after"] < found["bytes_before"]
    export(run, tmp_path / "whole")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").eval()
    linear = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    assert found["layers"] == len(linear)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    inputs = tokenizer("json.dumps(obj, indent=4)", return_tensors="pt")
    with torch.no_grad():
        expected, got = model(**inputs).logits, small(**inputs).logits
    assert 0 < float((expected - got).abs().max()) < 0.3 * float(expected.abs().max())
    weight = model.get_submodule(linear[0]).weight.detach()
    rows = weight.abs().amax(dim=1, keepdim=True) / 127
    assert float((small.get_submodule(linear[0]).weight.dequantize() - weight).abs().max()) <= float(rows.max()) * 0.51


@pytest.mark.distributed
def test_onnx_runtime_computes_what_the_export_does(run: Any, tmp_path: Path) -> None:
    found = export(run, tmp_path / "onnx", "--onnx")["onnx"]
    assert found["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert found["difference"] < 1e-4
    export(run, tmp_path / "whole")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    for texts in (["import json"], ["def f(self):\n    return 1", "msg = Message()", "x", "a b c", "json"]):
        inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=True)
        (logits,) = session.run(["logits"], {name: inputs[name].numpy() for name in found["inputs"]})
        with torch.no_grad():
            assert logits == pytest.approx(model(**inputs).logits.numpy(), abs=1e-4)


FAMILIES = {
    "causal_lm": "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,"
    " num_attention_heads: 4, max_position_embeddings: 64}",
    "image_classification": "{model_type: resnet, num_channels: 1, embedding_size: 8, hidden_sizes: [8, 16],"
    " depths: [1, 1], layer_type: basic}",
    "seq2seq_lm": "{model_type: t5, d_model: 32, d_kv: 8, d_ff: 64, num_layers: 2, num_heads: 4, dropout_rate: 0.0}",
    "token_classification": BERT,
    "question_answering": BERT,
}


@pytest.mark.matrix
@pytest.mark.parametrize("task", FAMILIES)
def test_other_families_are_converted(task: str, tmp_path: Path, assets: Path) -> None:
    rows = {"token_classification": "tags", "question_answering": "questions"}
    source: dict[str, Any] = {"type": "text", "files": [f"{STDLIB}/json/*.py", f"{STDLIB}/email/*.py"]}
    if task in rows:
        source = {"type": "jsonl", "files": [f"{assets}/rows/{rows[task]}.jsonl"]}
    elif task == "seq2seq_lm":
        source = {**source, "pattern": r'(?P<source>def \w+)\([^)]*\):\n\s+"""(?P<target>[^"\n]{5,30})'}
    pictures = task == "image_classification"
    if pictures:
        source = {"type": "sklearn", "name": "digits"}
    recipe = write_recipe(
        tmp_path, task, f"{{config: {FAMILIES[task]}}}", [source], data={"sequence_length": 1 if pictures else 64},
        **({"image": {"size": 8}} if pictures else {"tokenizer": {"train": {"vocab_size": 400}}}),
    )  # fmt: skip
    _, plan, prepared = run_of(recipe, tmp_path / "run")
    _, task_of, model = whole_model(plan, prepared)
    (dataset,) = prepared.split("train")
    batches = [task_of.collate([dataset[index] for index in chosen]) for chosen in ((0, 1, 2), (3, 4, 5, 6, 7))]
    inputs, fixed, outputs = _call_of(task_of, model, batches[0])
    plain = _Plain(model, tuple(inputs), fixed, tuple(outputs)).eval()
    _convert(plain, tuple(inputs.values()), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch in batches:
        assert _difference(session, plain, _call_of(task_of, model, batch)[0]) < 1e-4


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--prune", "0.5", "--onnx"], "--prune and --onnx do not go together: export one after the other"),
        (["--max-samples", "9"], "--max-samples says on how much is measured, and only --prune and --quantize measure"),
        (["--max-samples", "9", "--onnx"], "only --prune and --quantize measure"),
        (["--quantize", "int4"], "--quantize int4: use int8"),
        (["--dtype", "int8"], "--dtype int8: use fp32, bf16 or fp16"),
        (["--onnx", "--dtype", "bf16"], "model.onnx is written in fp32; leave --dtype out"),
    ],
)
def test_options_that_say_nothing_are_refused(options: list[str], text: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(tmp_path), *options])
    assert isinstance(done.exception, ExpectedError)
    assert text in str(done.exception)


@pytest.mark.distributed
@pytest.mark.parametrize(("package", "option"), [("torchao", "--quantize=int8"), ("onnxruntime", "--onnx")])
def test_a_missing_package_is_named(run: Any, package: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    for module in [name for name in __import__("sys").modules if name.startswith(f"{package}.")]:
        monkeypatch.setitem(__import__("sys").modules, module, None)
    done = CliRunner().invoke(app, ["export", str(run[0].path), option])
    assert isinstance(done.exception, ExpectedError)
    assert f"needs the package {package}: pip install 'zerofleet[" in str(done.exception)


@pytest.mark.distributed
def test_a_file_that_computes_something_else_is_not_left(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, plan, prepared = run
    (checkpoint,) = folders.complete(directory.checkpoints)

    def wrong(plain: Any, tensors: Any, file: Path) -> None:
        with torch.no_grad():
            plain.model.classifier.bias += 1
        _convert(plain, tensors, file)
        with torch.no_grad():
            plain.model.classifier.bias -= 1

    monkeypatch.setattr("launcher.training.onnx_export._convert", wrong)
    with pytest.raises(ExpectedError, match="the converted bert computes something else"):
        export_onnx(checkpoint, plan, prepared, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_scalars_get_their_shape_again() -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 50}, vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )  # fmt: skip
    model = ImageTextContrastive.auto_class.from_config(config)
    value = float(model.logit_scale.detach())
    model.logit_scale.data = model.logit_scale.data.view(1)
    task: Any = ImageTextContrastive
    restore_scalars(model, task)
    assert model.logit_scale.shape == ()
    assert float(model.logit_scale.detach()) == value
    assert np.isfinite(value)

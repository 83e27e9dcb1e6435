"""Each bad recipe and the text that says what to mend."""

import pytest

from launcher.errors import RecipeError
from launcher.recipe.loading import load_recipe


def problems(path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{path}: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("replacement", "expected"),
    [
        (
            ("name: small", "nmae: small"),
            ["name: is missing: Names the run", "line 2  nmae: unknown key; did you mean name?"],
        ),
        (
            ("training:", "trainng:"),
            ["training: is missing: Batch sizes", "line 16  trainng: unknown key; did you mean training?"],
        ),
        (("name: small", "name: a b"), ["line 2  name: is 'a b', but must match"]),
        (
            ("name: small", "name: small\nlearning_rate: 1"),
            ["line 3  learning_rate: unknown key; did you mean training.learning_rate?"],
        ),
        (("    hidden_size: 64\n", "  confg: {}\n"), ["line 7  model.confg: unknown key; did you mean config?"]),
        (
            ("vocab_size: 512", "vocab_size: 512\n    vocabsize: 3"),
            ["line 11  tokenizer.train.vocabsize: unknown key; did you mean vocab_size?"],
        ),
        (
            ("      files: [texts/*.txt]", "      files: [a]\n      fils: [b]"),
            ["line 15  data.sources.0.fils: unknown key; did you mean files?"],
        ),
        (
            ("  sequence_length: 32", "  sequence_length: 32\n  sequencelength: 1"),
            ["line 16  data.sequencelength: unknown key; did you mean sequence_length?"],
        ),
        (
            ("  learning_rate: 1e-4", "  learnin_rate: 1e-4"),
            ["line 19  training.learnin_rate: unknown key; did you mean learning_rate?"],
        ),
        (
            ("type: text", "type: txt"),
            ["line 13  data.sources.0.type: is 'txt', but must be one of text, json, jsonl, csv, parquet,"],
        ),
        (("type: text", "weight: 2"), ["line 13  data.sources.0.type: is missing: one of text, json,"]),
        (
            ("[texts/*.txt]", "texts/*.txt"),
            ["line 14  data.sources.0.files: must be a list, not 'texts/*.txt'; write it as ['texts/*.txt']"],
        ),
        (("max_steps: 10", "max_steps: ten"), ["line 17  training.max_steps: must be a whole number, not 'ten'"]),
        (("max_steps: 10", "max_steps: true"), ["line 17  training.max_steps: must be a whole number, not true"]),
        (
            ("max_steps: 10", "max_steps: '10'"),
            ["line 17  training.max_steps: must be a whole number, not '10'; write it without quotes"],
        ),
        (("max_steps: 10", "max_steps: 10.0"), ["line 17  training.max_steps: must be a whole number, not 10.0"]),
        (
            ("max_steps: 10", "max_steps: 10\n  max_steps: 11"),
            ["line 18  training.max_steps: is set twice, first on line 17; keep one of the two"],
        ),
        (
            ("max_steps: 10", "max_steps: 10\n  num_train_epochs: 1"),
            ["line 16  training: set exactly one of max_steps and num_train_epochs"],
        ),
        (
            ("learning_rate: 1e-4", "learning_rate: .nan"),
            ["line 19  training.learning_rate: .nan is not a finite number"],
        ),
        (
            ("learning_rate: 1e-4", "learning_rate: 0"),
            ["line 19  training.learning_rate: is 0, but must be greater than 0"],
        ),
        (("model:", "zero: {stage: true}\nmodel:"), ["line 4  zero.stage: must be a whole number, not true"]),
        (("model:", "zero: {stage: 4}\nmodel:"), ["line 4  zero.stage: is 4, but must be at most 3"]),
        (
            ("model:", "evaluation:\nmodel:"),
            ["line 4  evaluation: must be a mapping (key: value), not null; remove the key, or give it a value"],
        ),
        (("    model_type: llama\n", ""), ["line 4  model: config needs a model_type, such as llama, qwen3 or gpt2"]),
        (
            ("tokenizer:\n  train:\n    vocab_size: 512\n", ""),
            ["a model from config needs tokenizer.tokenizer_name_or_path or tokenizer.train"],
        ),
        (
            ("description: For the tests", "description: !!python/name:os.system"),
            ["line 3  description: the tag !!python/name:os.system is refused: only plain values are read here"],
        ),
        (
            ("description: For the tests", "description: a: b"),
            ["line 3  is not YAML: mapping values are not allowed here; text that holds ': ' needs quotes"],
        ),
        (("For the tests", "${HOME}"), ["line 3  description: unknown reference ${HOME}; there are ${env:NAME},"]),
        (
            ("For the tests", "${env:ZF_NOT_SET}"),
            ["line 3  description: the environment variable ZF_NOT_SET is not set; set it, or give a default"],
        ),
        (
            ("[texts/*.txt]", "['${sysconfig:stdlb}/*.py']"),
            ["line 14  data.sources.0.files.0: Python's sysconfig has no path 'stdlb'; did you mean stdlib?"],
        ),
        (
            ("hidden_size: 64", "token: ${env:HF_TOKEN}"),
            ["line 7  model.config.token: ${env:HF_TOKEN} looks like a secret"],
        ),
    ],
)
def test_a_bad_recipe_is_refused_with_its_line(write_recipe, monkeypatch, replacement, expected):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.delenv("ZF_NOT_SET", raising=False)
    lines = sorted(problems(write_recipe(replacement)))
    assert len(lines) == len(expected)
    for line, start in zip(lines, sorted(expected), strict=True):
        assert line.startswith(start)
        assert "hf_very_secret" not in line


def test_all_problems_of_a_recipe_at_once(write_recipe):
    path = write_recipe(
        ("name: small", "name: small\nname: again"),
        ("model_type: llama", "model_type: ${foo}"),
        ("vocab_size: 512", "vocab_size: 3"),
        ("type: text", "type: text\n      wieght: 2"),
        ("max_steps: 10", "max_steps: x"),
    )
    lines = problems(path, "optimizer.adam_beta1=2", "nonsense", "type=json")
    assert [line.partition(":")[0] for line in lines] == [
        "line 3  name",
        "line 7  model.config.model_type",
        "line 11  tokenizer.train.vocab_size",
        "line 15  data.sources.0.wieght",
        "line 19  training.max_steps",
        "override nonsense",
        "optimizer.type",
        "optimizer.adam_beta1",
    ]


def test_a_recipe_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,) = problems("no/such.yaml")
    assert line.startswith("no such file, and no shipped recipe of this name; ")


def test_a_folder_is_no_recipe(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    assert problems(tmp_path / "folder.yaml") == ["cannot be read: Is a directory"]

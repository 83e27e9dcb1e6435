"""Masked language modelling: which tokens are hidden, transformers' loss, next-sentence prediction."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForPreTraining

from launcher.data.loader import EPOCH, without_targets
from launcher.errors import SourceError
from launcher.recipe.task_sections import MaskedLanguageModellingSection
from launcher.tasks import make_task
from launcher.tasks.masked_lm import NO_WORD, hide
from tests.training.task_runs import BERT, STDLIB, run_of, write_recipe

SOURCE = {"type": "text", "files": [f"{STDLIB}/json/*.py", f"{STDLIB}/email/*.py"]}
FACTS = {"mask_token_id": 3, "vocab_size": 400, "special_ids": [0, 1, 2, 3]}


def make(folder: Path, source: dict[str, Any] = SOURCE, **sections: Any) -> Any:
    recipe = write_recipe(
        folder,
        "masked_lm",
        f"{{config: {BERT}}}",
        [source],
        **{"data": {"sequence_length": 32}, "tokenizer": {"train": {"vocab_size": 400}}, **sections},
    )
    return run_of(recipe, folder / "run")


def example(length: int = 1000) -> dict[str, Any]:
    words = np.arange(length) // 3
    words[0] = words[-1] = NO_WORD
    return {"input_ids": 10 + np.arange(length, dtype=np.uint32) % 390, "words": words.astype(np.uint16)}


def test_fifteen_of_a_hundred_are_hidden_eighty_ten_ten() -> None:
    section = MaskedLanguageModellingSection()
    kinds = np.zeros(3)
    for epoch in range(20):
        ids, labels = hide({**example(), EPOCH: epoch}, section, FACTS, seed=1)
        chosen = labels != -100
        assert chosen.sum() == round(998 * 0.15)
        assert not chosen[[0, -1]].any(), "special tokens are never hidden"
        original = example()["input_ids"].astype(np.int64)
        assert (labels[chosen] == original[chosen]).all()
        assert (ids[~chosen] == original[~chosen]).all()
        masked, same = ids[chosen] == 3, ids[chosen] == original[chosen]
        kinds += [masked.sum(), same.sum(), (~masked & ~same).sum()]
        assert not np.isin(ids[chosen & (ids != 3)], FACTS["special_ids"]).any()
    shares = kinds / kinds.sum()
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)  # 3,000 draws: two standard deviations are 0.015


def test_other_tokens_are_hidden_in_each_epoch_and_the_same_ones_after_a_resume() -> None:
    section = MaskedLanguageModellingSection()
    first, again, second = (hide({**example(), EPOCH: epoch}, section, FACTS, seed=1) for epoch in (0, 0, 1))
    assert (first[1] == again[1]).all()
    assert (first[0] == again[0]).all()
    assert 0 < ((first[1] != -100) & (second[1] != -100)).sum() < 60, "about 15 % of 150 by chance"


def test_whole_words_are_hidden_or_not_at_all() -> None:
    section = MaskedLanguageModellingSection(whole_word=True)
    _, labels = hide({**example(), EPOCH: 0}, section, FACTS, seed=1)
    words = example()["words"]
    hidden = {word: set((labels[words == word] != -100).tolist()) for word in np.unique(words) if word != NO_WORD}
    assert all(len(kinds) == 1 for kinds in hidden.values())
    assert round(998 * 0.15) <= (labels != -100).sum() <= round(998 * 0.15) + 2


def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    _, plan, prepared = make(tmp_path)
    task = make_task(plan, prepared.facts)
    model = task.build_model().eval()
    (dataset,) = prepared.split("train")
    samples = [dataset[index] for index in range(5)]
    batch = task.collate([*samples, without_targets(samples[0])])
    output = task.loss(model, batch)
    assert task.num_targets(batch) == int(output.num_targets) == int((batch["labels"][:5] != -100).sum())
    expected = model(**batch).loss
    assert (output.loss_sum / output.num_targets).item() == pytest.approx(expected.item(), abs=1e-5)


def test_both_losses_are_those_of_bert(tmp_path: Path) -> None:
    _, plan, prepared = make(tmp_path, masked_lm={"next_sentence": True})
    task = make_task(plan, prepared.facts)
    model = task.build_model().eval()
    assert isinstance(model, BertForPreTraining)
    (dataset,) = prepared.split("train")
    labels = np.array([int(dataset[index]["next_sentence_labels"]) for index in range(len(dataset))])
    assert 0.25 < labels.mean() < 0.75
    batch = task.collate([dataset[index] for index in range(6)])
    output = task.loss(model, batch)
    names = ("input_ids", "attention_mask", "token_type_ids")
    reference = model(
        **{name: batch[name] for name in names},
        labels=batch["labels"],
        next_sentence_label=batch["next_sentence_labels"],
    )
    mean = output.loss_sum / output.num_targets
    assert mean.item() == pytest.approx(reference.loss.item(), abs=1e-5)
    # The next-sentence loss once more, by NumPy.
    logits = reference.seq_relationship_logits.detach().double().numpy()
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    by_numpy = -np.log(shares[np.arange(6), batch["next_sentence_labels"].numpy()]).mean()
    rows = [{k: v[i].numpy() for k, v in output.predictions.items()} for i in range(6)]
    metrics = task.metrics(rows, []).values
    assert metrics["next_sentence_loss"] == pytest.approx(by_numpy, abs=1e-5)
    assert metrics["masked_lm_loss"] + by_numpy == pytest.approx(reference.loss.item(), abs=1e-5)


def test_pairs_that_follow_are_neighbours_in_the_text(tmp_path: Path) -> None:
    _, _, prepared = make(tmp_path, masked_lm={"next_sentence": True})
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_directory)
    everything = "".join(path.read_text() for name in ("json", "email") for path in Path(STDLIB, name).glob("*.py"))
    (dataset,) = prepared.split("train")
    follow = {0: [], 1: []}
    for index in range(len(dataset)):
        sample = dataset[index]
        ids, types = sample["input_ids"].astype(int), sample["token_type_ids"]
        assert ids[0] == tokenizer.cls_token_id
        assert (ids == tokenizer.sep_token_id).sum() == 2
        first, second = ids[1 : np.argmax(types) - 1], ids[np.argmax(types) : -1]
        joined = tokenizer.decode(first) + tokenizer.decode(second)
        follow[int(sample["next_sentence_labels"])].append(joined in everything)
    assert np.mean(follow[0]) > 0.97, "but where a cut falls into a character of several bytes"
    assert np.mean(follow[1]) < 0.05


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(SourceError, match="tokenizer: the tokenizer has no mask token"):
        make(tmp_path, tokenizer={"tokenizer_name_or_path": str(model_folder), "train": None})


def test_empty_texts_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": "" if i % 2 else f"some words {i}"}) + "\n" for i in range(30)))
    with pytest.raises(SourceError, match="15 of 30 examples cannot be used: 15 x its text is empty"):
        make(tmp_path, {"type": "jsonl", "files": [str(file)]})


def test_rows_are_cut_into_samples(tmp_path: Path) -> None:
    _, _, prepared = make(tmp_path)
    lengths = [len(part[index]["input_ids"]) for part in prepared.split("train") for index in range(len(part))]
    assert max(lengths) == 32
    assert len(lengths) > 20
    assert torch.tensor(lengths).float().mean() > 28

"""Supervised fine-tuning: only what the assistant says is learnt, as decoding the labels shows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from launcher.data.loader import without_targets
from launcher.errors import RecipeError, SourceError
from launcher.recipe.loading import load_recipe
from launcher.tasks import make_task
from launcher.tasks.conversations import learnt_spans
from tests.training.task_runs import run_of, write_recipe

LLAMA = "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4}"
CHATS = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"What is {i} + {i}?"},
        {"role": "assistant", "content": f"It is {2 * i}."},
        {"role": "user", "content": "And once more?"},
        {"role": "assistant", "content": f"Now {3 * i}, my friend."},
    ]
    for i in range(40)
]


def make(folder: Path, rows: list[dict[str, Any]], *overrides: str, **sections: Any) -> Any:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"tokenizer": {"train": {"vocab_size": 300, "min_frequency": 50}, "chat_template": "chatml"}, **sections}
    recipe = write_recipe(
        folder, "causal_lm", f"{{config: {LLAMA}}}", [{"type": "jsonl", "files": [str(file)]}], **options
    )
    return run_of(recipe, folder / "run", *overrides)


def learnt(prepared: Any, index: int) -> list[str]:
    """The stretches of a sample that are learnt, decoded."""
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_directory)
    (dataset,) = prepared.split("train")
    sample = dataset[index]
    stretches: list[list[int]] = [[]]
    for token, label in zip(sample["input_ids"].tolist(), sample["labels"].tolist(), strict=True):
        if label == -100:
            stretches.append([])
        else:
            assert token == label
            stretches[-1].append(label)
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def test_only_the_assistants_words_are_learnt(tmp_path: Path) -> None:
    _, _, prepared = make(tmp_path, [{"messages": m} for m in CHATS], data={"format": "chat", "sequence_length": 400})
    (dataset,) = prepared.split("train")
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_directory)
    expected = {f"It is {2 * i}.<|im_end|>": f"Now {3 * i}, my friend.<|im_end|>" for i in range(40)}
    for index in range(len(dataset)):
        first, second = learnt(prepared, index)
        assert expected[first] == second
        whole = tokenizer.decode(dataset[index]["input_ids"].astype(int))
        assert whole.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is")


def test_completions_are_learnt_with_their_end(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} and {i} make ", "completion": f"{2 * i}!"} for i in range(40)]
    _, plan, prepared = make(tmp_path, rows, data={"format": "prompt_completion", "sequence_length": 64})
    (text,) = learnt(prepared, 3)
    assert text.endswith("!<|endoftext|>")
    assert text.removesuffix("!<|endoftext|>").isdigit()
    task = make_task(plan, prepared.facts)
    model = task.build_model().eval()
    (dataset,) = prepared.split("train")
    samples = [dataset[index] for index in range(6)]
    batch = task.collate([*samples, without_targets(samples[0])])
    output = task.loss(model, batch)
    # transformers shifts labels itself; padding and prompts are ignored there too.
    labels = torch.full_like(batch["labels"], -100)
    labels[:, 1:] = batch["labels"][:, :-1]
    lengths = torch.tensor([[len(sample["input_ids"])] for sample in [*samples, samples[0]]])
    attention = (torch.arange(batch["input_ids"].shape[1]) < lengths).long()
    expected = model(input_ids=batch["input_ids"], attention_mask=attention, labels=labels).loss
    assert (output.loss_sum / output.num_targets).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("form", ["chat", "prompt_completion"])
def test_packed_conversations_lose_what_they_lose_apart(tmp_path: Path, form: str) -> None:
    """The same tokens, targets, loss and gradient, in fewer rows; the shape of rows is all that differs."""
    rows = [{"messages": m} for m in CHATS]
    if form == "prompt_completion":
        rows = [{"prompt": "" if i % 3 else f"{i}: ", "completion": "yes " * (1 + i % 5)} for i in range(40)]
    found = []
    for packing in ("none", "first_fit_decreasing"):
        folder = tmp_path / packing
        folder.mkdir()
        _, plan, prepared = make(folder, rows, data={"format": form, "sequence_length": 800, "packing": packing})
        (dataset,) = prepared.split("train")
        task = make_task(plan, prepared.facts)
        model = task.build_model().train()
        loss_sum, targets, learnt_tokens = 0.0, 0, []
        step = 3 if packing != "none" else 1  # a batch of rows of different lengths, and one without targets
        for start in range(0, len(dataset), step):
            samples = [dataset[index] for index in range(start, min(start + step, len(dataset)))]
            batch = task.collate([*samples, without_targets(samples[0])] if step > 1 else samples)
            output = task.loss(model, batch)
            output.loss_sum.backward()
            loss_sum, targets = loss_sum + output.loss_sum.item(), targets + int(output.num_targets)
            learnt_tokens += batch["labels"][batch["labels"] >= 0].tolist()
        grads = {name: values.grad / targets for name, values in model.named_parameters()}
        found.append((len(dataset), prepared.statistics["train"], targets, loss_sum / targets, grads, learnt_tokens))
    (apart, counts, *one), (packed, packed_counts, *other) = found
    assert packed * 2 < apart == counts["documents"] == packed_counts["documents"] == counts["sequences"]
    assert packed_counts["sequences"] == packed
    assert packed_counts["tokens"] == counts["tokens"]
    assert one[0] == other[0], "as many targets"
    assert one[1] == pytest.approx(other[1], abs=1e-5)
    for name, values in one[2].items():
        torch.testing.assert_close(other[2][name], values, atol=1e-6, rtol=1e-4)
    assert sorted(one[3]) == sorted(other[3])


def test_messages_that_the_template_refuses_are_counted(tmp_path: Path) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}{{ raise_exception('no ' + m['role']) }}"
        "{% endif %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    options = {
        "tokenizer": {"train": {"vocab_size": 300}, "chat_template": str(template)},
        "data": {"format": "chat", "sequence_length": 400},
    }
    rows = [{"messages": m[1:]} for m in CHATS]
    with pytest.raises(SourceError, match=r"1 of 41 .*: 1 x the chat template refuses it \(TemplateError: no system\)"):
        make(tmp_path, [*rows, {"messages": CHATS[0]}], **options)
    _, _, prepared = make(tmp_path, [*rows, {"messages": CHATS[0]}], "data.max_bad_fraction=0.1", **options)
    assert prepared.statistics["sources"][0]["bad_examples"] == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}]}, "no message is the assistant's"),
        ({"messages": []}, "it has no list of messages"),
        (
            {
                "messages": [
                    {"role": "user", "content": "".join(chr(97 + i * i % 23) for i in range(900))},
                    {"role": "assistant", "content": "y"},
                ]
            },
            "nothing that is to be learnt is within data.sequence_length",
        ),
    ],
)
def test_chats_without_anything_to_learn_are_counted(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(SourceError, match=f"1 x {reason}"):
        make(tmp_path, [{"messages": CHATS[0]}, row], data={"format": "chat", "sequence_length": 200})


def test_a_template_that_rewrites_earlier_messages_is_found_out(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    reason = learnt_spans(tokenizer, CHATS[0])
    assert reason == "the chat template writes earlier messages in another way when later ones follow"


def test_what_does_not_go_together_is_refused(tmp_path: Path, model_folder: Path) -> None:
    rows = [{"messages": m} for m in CHATS]
    chat = {"format": "chat", "sequence_length": 400}
    with pytest.raises(SourceError, match=r"tokenizer.chat_template: the tokenizer has no chat template"):
        make(tmp_path, rows, data=chat, tokenizer={"train": {"vocab_size": 300}, "chat_template": None})
    with pytest.raises(SourceError, match=r"there is no column messages .*; the columns are prompt"):
        make(tmp_path, [{"prompt": "a"}], data=chat)
    packed = {**chat, "packing": "first_fit_decreasing"}
    with pytest.raises(RecipeError, match=r"never see one another: leave cross_document_attention out"):
        make(tmp_path, rows, data={**packed, "cross_document_attention": True})
    with pytest.raises(RecipeError, match=r"puts one prompt before each row"):
        make(tmp_path, rows, data=packed, adapter={"method": "prompt_tuning"})
    with pytest.raises(RecipeError, match=r"only in micro batches of one row"):
        make(tmp_path, rows, "model.attn_implementation=flash_attention_2", data=packed)
    with pytest.raises(RecipeError, match=r"there is no task 'causal_ml'; did you mean causal_lm\?"):
        load_recipe(tmp_path / "recipe.yaml", ["task=causal_ml"])

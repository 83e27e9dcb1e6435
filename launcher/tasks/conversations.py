"""Supervised fine-tuning data: prompts with completions, and chats; only what the model should say is learnt."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from launcher.data.examples import BadExample, EncodingError, Example, Field, Row
from launcher.data.packed_examples import FIELDS, ExamplePacker, OneASample, PackedExamples
from launcher.recipe.schema import Recipe

IGNORED = -100
"""Label of a position that is no target, as in transformers."""


class ConversationEncoder:
    """Rows with `prompt` and `completion`, or with `messages` (a list of `{role, content}`)."""

    optional_roles: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe) -> None:
        self.chat = recipe.data.format == "chat"
        self.roles: tuple[str, ...] = ("messages",) if self.chat else ("prompt", "completion")
        self.length = recipe.data.sequence_length
        self.packs = recipe.data.packing == "first_fit_decreasing"
        self.tokenizer: Any = None

    def identity(self) -> Any:
        """The form of the rows, and whether they share samples."""
        form = "chat" if self.chat else "prompt_completion"
        return [form, "packed"] if self.packs else form

    def packer(self) -> ExamplePacker:
        """Make what joins conversations to samples, or leaves them as they are."""
        return PackedExamples(self.length) if self.packs else OneASample()

    def texts(self, row: Row) -> list[str]:
        """All that is said."""
        if not self.chat:
            return [str(row["prompt"] or ""), str(row["completion"] or "")]
        return [str(message.get("content") or "") for message in row["messages"] or () if isinstance(message, Mapping)]

    def begin(self, tokenizer: Any, training_rows: Iterable[Sequence[Row]]) -> None:
        """Check that there is a chat template, and a token that ends a text."""
        self.tokenizer = tokenizer
        if self.chat and tokenizer.chat_template is None:
            raise EncodingError(
                "the tokenizer has no chat template; name a Jinja file, or chatml", "tokenizer.chat_template"
            )
        if tokenizer.eos_token_id is None:
            raise EncodingError("the tokenizer has no end-of-text token", "tokenizer")

    def fields(self) -> dict[str, Field]:
        """Tokens, the same tokens as labels where they are learnt, and where conversations that share a row begin."""
        return FIELDS if self.packs else {"input_ids": Field("uint32"), "labels": Field("int32")}

    def encode(self, rows: Sequence[Row]) -> list[Example | BadExample]:
        """Tokenise, and mark what is learnt."""
        return [self._chat(row) if self.chat else self.completion(row) for row in rows]

    def completion(self, row: Row) -> Example | BadExample:
        """Tokenise a prompt and its completion by themselves, as the prompt will be when the model is used."""
        prompt, completion = str(row["prompt"] or ""), str(row["completion"] or "")
        if not completion.strip():
            return BadExample("its completion is empty")
        before = list(self.tokenizer(prompt)["input_ids"]) if prompt else []
        if before and before[-1] in (self.tokenizer.sep_token_id, self.tokenizer.eos_token_id):
            before.pop()
        after = [*self.tokenizer(completion, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        return self._cut([*before, *after], [False] * len(before) + [True] * len(after))

    def _chat(self, row: Row) -> Example | BadExample:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            return BadExample("it has no list of messages")
        rendered = learnt_spans(self.tokenizer, messages)
        if isinstance(rendered, str):
            return BadExample(rendered)
        text, spans = rendered
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        learnt = [
            any(start < high and end > low for low, high in spans) and end > start
            for start, end in encoded["offset_mapping"]
        ]
        return self._cut(list(encoded["input_ids"]), learnt)

    def _cut(self, ids: list[int], learnt: list[bool]) -> Example | BadExample:
        input_ids = np.array(ids[: self.length], np.uint32)
        labels = np.where(learnt[: self.length], input_ids.astype(np.int32), IGNORED).astype(np.int32)
        if not (labels[1:] != IGNORED).any():
            return BadExample("nothing that is to be learnt is within data.sequence_length")
        return {"input_ids": input_ids, "labels": labels}

    def facts(self) -> dict[str, Any]:
        """What fills up a batch: it is never seen, because nothing looks ahead."""
        return {"pad_token_id": int(self.tokenizer.eos_token_id)}


def learnt_spans(tokenizer: Any, messages: list[Any]) -> tuple[str, list[tuple[int, int]]] | str:
    """Write a chat through its template, and find what the assistant says in it, the mark that ends it included.

    That is what a message adds to the chat before it and the generation prompt of the template: that is how
    the model will be asked.

    Returns:
        The text and the spans of its characters; or why it cannot be used.
    """
    import jinja2

    def write(some: list[Any], *, ask: bool = False) -> str:
        return str(tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=ask))

    try:
        text = write(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                asked, said = write(messages[:index], ask=True), write(messages[: index + 1])
                if not said.startswith(asked) or not text.startswith(said.rstrip()):
                    return "the chat template writes earlier messages in another way when later ones follow"
                spans.append((len(asked), len(said.rstrip())))
    except (jinja2.TemplateError, KeyError, TypeError, ValueError) as error:
        return (
            f"the chat template refuses it ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        )
    return (text, spans) if spans else "no message is the assistant's"

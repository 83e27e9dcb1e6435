"""The kinds of training by name: what a recipe may say, and which class does it. Imports none of them.

The classes stand on a floor above, with torch; only their names stand here, so that planning needs no torch.
"""

import importlib
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema

from cluster.validation import near_match


@dataclass(frozen=True)
class TaskEntry:
    """One kind of training.

    Attributes:
        path: `module:class` of its `launcher.tasks.Task`.
        tokens: it reads text, so it needs a tokenizer and a sequence length.
        encoder_tokens: a tokenizer that is trained for it gets begin, separator and mask tokens, as BERT's has.
        generates: its model continues text.
        rewrites: its model writes a text for another one.
        packed_text: it reads plain text in packed rows; otherwise the class's `encoder` makes examples of rows.
        built_whole: each worker builds its model whole, under ZeRO 3 too, where others are partitioned while built.
    """

    path: str
    tokens: bool = True
    encoder_tokens: bool = False
    packed_text: bool = False
    generates: bool = False
    rewrites: bool = False
    built_whole: bool = False

    def load(self) -> Any:
        """Import the class."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(module), name)


TASKS = {
    # Weight norm, which these models have, cannot be put on weights that ZeRO 3 has partitioned.
    "audio_classification": TaskEntry(
        "launcher.tasks.audio_classification:AudioClassification", tokens=False, built_whole=True
    ),
    "causal_lm": TaskEntry("launcher.tasks.causal_lm:CausalLanguageModelling", packed_text=True, generates=True),
    "image_classification": TaskEntry("launcher.tasks.image_classification:ImageClassification", tokens=False),
    # A scalar, such as CLIP's temperature, cannot be partitioned while it is built.
    "image_text_contrastive": TaskEntry(
        "launcher.tasks.image_text_contrastive:ImageTextContrastive", encoder_tokens=True, built_whole=True
    ),
    "kto": TaskEntry("launcher.tasks.kto:Kto", generates=True),
    "masked_lm": TaskEntry("launcher.tasks.masked_lm:MaskedLanguageModelling", encoder_tokens=True),
    "preference": TaskEntry("launcher.tasks.preference:Preference", generates=True),
    "question_answering": TaskEntry("launcher.tasks.question_answering:QuestionAnswering", encoder_tokens=True),
    "reward_model": TaskEntry("launcher.tasks.preference:RewardModel"),
    "sentence_embedding": TaskEntry("launcher.tasks.sentence_embedding:SentenceEmbedding", encoder_tokens=True),
    "seq2seq_lm": TaskEntry("launcher.tasks.seq2seq_lm:SequenceToSequence", encoder_tokens=True, rewrites=True),
    "sequence_classification": TaskEntry(
        "launcher.tasks.sequence_classification:SequenceClassification", encoder_tokens=True
    ),
    "token_classification": TaskEntry("launcher.tasks.token_classification:TokenClassification", encoder_tokens=True),
}
"""Name in a recipe -> the task."""


def _known(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; {near_match(name, list(TASKS))}")
    return name


TaskName = Annotated[str, AfterValidator(_known), WithJsonSchema({"type": "string", "enum": list(TASKS)})]

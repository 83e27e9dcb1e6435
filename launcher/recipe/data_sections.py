"""Sections of a recipe about the data: where it comes from, and how documents become samples."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from launcher.recipe.section import Section


class _SourceBase(Section):
    text_column: str = "text"
    """Column that holds the text."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Which column holds what a task reads (`{text: review, label: stars}`), where its name is another one."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this source in the mixture, relative to the other sources' weights."""


class TextSource(_SourceBase):
    """Plain text files."""

    type: Literal["text"]
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs (`**` crosses folders); relative ones are taken from the folder of the recipe."""
    exclude: tuple[str, ...] = ()
    """Globs of files to leave out, matched against the whole path; a relative one matches at any depth, one that begins
    with `./` or `../` from the folder of the recipe."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """What one document is: a file, a paragraph (separated by an empty line) or a line."""
    pattern: str | None = None
    """A Python regular expression: each match in a file is one example, its named groups (`(?P<prompt>...)`) are the
    columns. In place of sample_by."""
    label_from_folder: bool = False
    """Give each document the name of its file's folder as `label`."""

    @model_validator(mode="after")
    def _pattern_has_groups(self) -> "TextSource":
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groupindex
            except re.error as error:
                raise ValueError(f"pattern is no regular expression: {error}") from error
            if not groups:
                raise ValueError("pattern names no group: write (?P<text>...) for what is to be read")
        return self


class TableSource(_SourceBase):
    """JSON (lines or array), CSV or Parquet files."""

    type: Literal["json", "jsonl", "csv", "parquet"]
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs (`**` crosses folders); relative ones are taken from the folder of the recipe."""
    exclude: tuple[str, ...] = ()
    """Globs of files to leave out, matched against the whole path; a relative one matches at any depth, one that begins
    with `./` or `../` from the folder of the recipe."""


class SavedSource(_SourceBase):
    """A folder written by `Dataset.save_to_disk`."""

    type: Literal["saved"]
    path: str
    """The folder; relative ones are taken from the folder of the recipe."""
    split: str = "train"
    """Split, when the folder holds a DatasetDict."""


class ImageFolderSource(_SourceBase):
    """Image files in one folder a class: `images/CLASS/*.png`."""

    type: Literal["image_folder"]
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs (`**` crosses folders); relative ones are taken from the folder of the recipe."""
    exclude: tuple[str, ...] = ()
    """Globs of files to leave out, matched against the whole path; a relative one matches at any depth, one that begins
    with `./` or `../` from the folder of the recipe."""


class AudioFolderSource(_SourceBase):
    """WAV files in one folder a class: `sounds/CLASS/*.wav`."""

    type: Literal["audio_folder"]
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs (`**` crosses folders); relative ones are taken from the folder of the recipe."""
    exclude: tuple[str, ...] = ()
    """Globs of files to leave out, matched against the whole path; a relative one matches at any depth, one that begins
    with `./` or `../` from the folder of the recipe."""


class ScikitLearnSource(_SourceBase):
    """A data set that comes inside scikit-learn's own package."""

    type: Literal["sklearn"]
    name: Literal["digits"]
    """`digits`: 1,797 images of 8 x 8 pixels, in ten classes."""


class HubSource(_SourceBase):
    """A data set by hub name."""

    type: Literal["hub"]
    path: str
    """Name on the hub, such as `HuggingFaceFW/fineweb`."""
    name: str | None = None
    """Configuration of the data set."""
    split: str = "train"
    """Split, with datasets' slicing syntax (`train[:1%]`)."""
    revision: str | None = None
    """Commit or tag, to pin what is read."""


Source = Annotated[
    TextSource | TableSource | SavedSource | ImageFolderSource | AudioFolderSource | ScikitLearnSource | HubSource,
    Field(discriminator="type"),
]


class DataSection(Section):
    """Which data, and how documents become samples."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Training data; several sources are mixed by weight."""
    validation_sources: tuple[Source, ...] = ()
    """Held-out data; default: split off the sources by `validation_fraction`."""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the documents that is held out; a document's side depends on its text alone, never on file order."""
    sequence_length: int = Field(default=1, ge=1)
    """Tokens per sample, at most; 1 for tasks without text."""
    format: Literal["text", "prompt_completion", "chat"] = "text"
    """What `causal_lm` reads: plain text; a `prompt` and its `completion`; or a list of `messages`, as the tokenizer's
    chat template writes them. Of the last two only completions and the assistant's words are learnt."""
    packing: Literal["concat", "first_fit_decreasing", "none"] = "concat"
    """`concat`: one stream cut every sequence_length tokens, nothing wasted, documents are cut; `first_fit_decreasing`:
    documents that fit are kept whole, a little padding; `none`: one document a sample, cut or padded. Examples of the
    formats `prompt_completion` and `chat` are never cut up: they share rows with `first_fit_decreasing`, and are one a
    sample otherwise."""
    cross_document_attention: bool = False
    """Let packed documents attend to each other and predict each other's first token."""
    max_bad_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Share of the examples of labelled tasks that may be unusable (empty texts, unreadable images, answers that are
    not in their context): they are left out and counted; more of them is an error."""
    preprocessing_num_workers: int | None = Field(default=None, ge=1)
    """Threads that tokenise; default: the number of cores."""
    on_change: Literal["error", "continue", "restart"] = "error"
    """When a run resumes and the data is not what it was: refuse; go on at the same position of the new data's order;
    or begin the new data from its start, with the model and the schedule as they are."""
    cache_directory: str | None = None
    """Where prepared data is kept, on a file system that all nodes see; default: `$ZEROFLEET_CACHE` or
    `~/.cache/zerofleet`."""

    @model_validator(mode="after")
    def _one_validation(self) -> "DataSection":
        if self.validation_sources and self.validation_fraction:
            raise ValueError("set validation_sources or validation_fraction, not both")
        return self

"""From a recipe's sources to rows of tokens on disk, once: the same content and settings are never prepared twice."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from cluster.errors import Problem
from launcher.data.cache import building, cache_directory, only_one
from launcher.data.derived import derive
from launcher.data.encoding import DocumentEncoder, EncodedDocuments, map_in_order
from launcher.data.packing import Rows, make_packer
from launcher.data.prepare_examples import prepare_examples
from launcher.data.progress import ProgressReporter
from launcher.data.sampler import mixture_shares
from launcher.data.sources import (
    LocatedSource,
    is_held_out,
    locate_sources,
    open_documents,
    raise_if_full,
    text_batches,
)
from launcher.data.store import (
    TOKENIZER,
    UNIGRAM_COUNTS,
    PreparedData,
    RowsWriter,
    Split,
    is_complete,
    split_folder,
    token_dtype,
    write_marker,
)
from launcher.data.tokenizer import TokenizerFacts, load_tokenizer, tokenizer_identity, train_tokenizer
from launcher.errors import DataError, SourceError
from launcher.recipe.schema import Recipe, derives_data, reads_packed_text
from launcher.recipe.tasks import TASKS

FORMAT = 1
"""Of prepared folders; part of the fingerprint, so that a newer form is prepared anew."""


def prepare(recipe: Recipe, *, progress: bool = True) -> PreparedData:
    """Bring the recipe's data into the form that its task reads, in the cache, unless it is there already.

    Text is tokenised and packed here; other tasks' rows become examples (`prepare_examples`). What a model is asked for
    ahead of training (a teacher's logits, a reference's log-probabilities) is added to them (`derive`).

    Files are read once to hash them; later calls trust their size and time. Safe to call from several processes at
    once, and to kill at any moment.

    Args:
        recipe: its data, tokenizer and seed count.
        progress: report on standard error: bars on a terminal, plain lines otherwise.

    Returns:
        The prepared data.

    Raises:
        SourceError: lists what is wrong with the sources or the tokenizer, by field of the recipe.
        StorageError: the cache cannot be written, or the disk is full.
    """
    _check_weights(recipe)
    reporter = ProgressReporter(progress)
    if reads_packed_text(recipe):
        prepared = _prepare_rows(recipe, reporter)
    else:
        prepared = prepare_examples(recipe, TASKS[recipe.task].load().encoder(recipe), progress=progress)
    for derivation in TASKS[recipe.task].load().derivations(recipe, prepared) if derives_data(recipe) else ():
        prepared = derive(recipe, prepared, derivation, reporter)
    return prepared


def _prepare_rows(recipe: Recipe, reporter: ProgressReporter) -> PreparedData:
    cache = cache_directory(recipe)
    located = locate_sources(recipe, cache)
    name = fingerprint(recipe, located)
    directory = cache / name
    if not is_complete(directory):
        with only_one(cache, name, lambda: reporter.say("another process is preparing this data; waiting for it")):
            if not is_complete(directory):
                try:
                    with building(cache, name, is_complete) as folder:
                        _Build(recipe, located, name, folder, reporter).run()
                except OSError as error:
                    raise_if_full(error, cache)
                    raise
    prepared = PreparedData.load(directory)
    _check_vocabulary(recipe, prepared)
    for note in prepared.statistics["notes"]:
        reporter.say(note)
    return prepared


def fingerprint(recipe: Recipe, located: list[LocatedSource]) -> str:
    """Hash what decides the prepared data: content of the files, tokenizer and settings; no path, no time."""
    data = recipe.data
    identity = {
        "format": FORMAT,
        "sources": [source.identity() for source in located],
        "tokenizer": tokenizer_identity(recipe),
        "split": [data.validation_fraction, recipe.seed],
        "rows": [data.sequence_length, data.packing, data.cross_document_attention],
    }
    return xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())


def _check_vocabulary(recipe: Recipe, prepared: PreparedData) -> None:
    config = recipe.model.config
    size = config.get("vocab_size") if isinstance(config, dict) else None
    largest = prepared.settings["largest_token_id"]
    if isinstance(size, int) and size <= largest:
        text = f"{size}, but the data holds token ids up to {largest}; set {largest + 1} or more"
        raise SourceError(recipe.name, [Problem(text, "model.config.vocab_size")])


def _check_weights(recipe: Recipe) -> None:
    try:
        mixture_shares([source.weight for source in recipe.data.sources])
    except DataError as error:
        raise SourceError(recipe.name, [Problem(str(error), "data.sources")]) from error


class _Destination:
    """One source's rows of one split, while they are made."""

    def __init__(self, folder: Path, recipe: Recipe, facts: TokenizerFacts) -> None:
        data = recipe.data
        self.filler = facts.eos_token_id
        self.packer = make_packer(data.packing, data.sequence_length, self.filler)
        self.writer = RowsWriter(folder, data.sequence_length, token_dtype(facts.vocab_size))
        self.counts = np.zeros(facts.vocab_size, np.int64)
        self.documents = 0
        self.truncated_tokens = 0

    def add(self, tokens: NDArray[np.uint32], lengths: NDArray[np.int64]) -> None:
        """Take documents."""
        self.documents += len(lengths)
        self._write(self.packer.add(tokens, lengths))

    def close(self) -> dict[str, Any]:
        """Write what the packer held back; return the statistics."""
        self._write(self.packer.finish())
        self.writer.close()
        slots = self.writer.tokens.rows * self.writer.tokens.row_shape[0]
        self.counts[self.filler] -= slots - self.writer.num_tokens
        return {
            "documents": self.documents,
            "tokens": self.writer.num_tokens,
            "sequences": self.writer.tokens.rows,
            "utilization": self.writer.num_tokens / max(slots, 1),
            "truncated_tokens": self.truncated_tokens,
        }

    def _write(self, rows: Rows) -> None:
        self.writer.append(rows)
        self.counts += np.bincount(rows.tokens.ravel(), minlength=len(self.counts))
        self.truncated_tokens += rows.truncated


class _Build:
    """One preparation, in a folder of its own."""

    def __init__(
        self, recipe: Recipe, located: list[LocatedSource], name: str, folder: Path, reporter: ProgressReporter
    ) -> None:
        self.recipe = recipe
        self.located = located
        self.name = name
        self.folder = folder
        self.scratch = folder / "scratch"
        self.reporter = reporter
        self.notes: list[str] = []

    def run(self) -> None:
        """Read, tokenise, pack and write everything; the marker comes last."""
        data = self.recipe.data
        self.scratch.mkdir()
        opened = [self._open(source) for source in self.located]
        facts = self._tokenizer(opened)
        counts: dict[Split, NDArray[np.int64]] = {
            "train": np.zeros(facts.vocab_size, np.int64),
            "validation": np.zeros(facts.vocab_size, np.int64),
        }
        sources = [
            self._tokenise(source, dataset, facts, counts) for source, dataset in zip(self.located, opened, strict=True)
        ]
        self._check(sources)
        shutil.rmtree(self.scratch)
        np.save(self.folder / UNIGRAM_COUNTS, counts["train"])
        statistics = {
            "train": _total(sources, "train", data.sequence_length),
            "validation": _total(sources, "validation", data.sequence_length),
            "sources": sources,
            "notes": self.notes,
        }
        settings = data.model_dump(include={"sequence_length", "packing", "cross_document_attention"})
        settings |= {"validation_fraction": data.validation_fraction, "seed": self.recipe.seed, **facts.model_dump()}
        settings["largest_token_id"] = int(np.flatnonzero(counts["train"] + counts["validation"]).max())
        write_marker(self.folder, self.name, settings, statistics)

    def _open(self, located: LocatedSource) -> Any:
        scratch = self.scratch / located.where
        scratch.mkdir()
        with self.reporter.stage(f"reading {located.where}", None, "documents") as advance:
            dataset = open_documents(located, scratch, self.recipe.name)
            advance(len(dataset))
        return dataset

    def _tokenizer(self, opened: list[Any]) -> TokenizerFacts:
        section = self.recipe.tokenizer.train
        directory = self.folder / TOKENIZER
        if section is None:
            return load_tokenizer(self.recipe, directory)
        with self.reporter.stage("training the tokenizer", None, "documents") as advance:
            facts = train_tokenizer(self._training_documents(opened, advance), section, directory)
        if facts.vocab_size < section.vocab_size:
            self.notes.append(
                f"tokenizer.train.vocab_size: the text gives {facts.vocab_size} tokens, fewer than {section.vocab_size}"
            )
        return facts

    def _training_documents(self, opened: list[Any], advance: Callable[[int], None]) -> Iterator[str]:
        data, seed = self.recipe.data, self.recipe.seed
        for located, dataset in zip(self.located, opened, strict=True):
            if located.serves == "validation":
                continue
            for batch in text_batches(dataset):
                yield from (
                    text for text in batch if text and not is_held_out(text.encode(), seed, data.validation_fraction)
                )
                advance(len(batch))

    def _tokenise(
        self, located: LocatedSource, dataset: Any, facts: TokenizerFacts, counts: dict[Split, NDArray[np.int64]]
    ) -> dict[str, Any]:
        """Tokenise and pack one source; add how often each token occurs to `counts`; return its statistics."""
        splits: tuple[Split, ...] = ("train", "validation") if located.serves == "both" else (located.serves,)
        index = int(located.where.rpartition(".")[2])
        destinations = {
            split: _Destination(split_folder(self.folder, split, index), self.recipe, facts) for split in splits
        }
        encoder = DocumentEncoder(
            self.folder / TOKENIZER, facts, self.recipe.seed, self.recipe.data.validation_fraction
        )
        workers = self.recipe.data.preprocessing_num_workers or os.cpu_count() or 1
        empty = text_bytes = 0
        with ExitStack() as stack:
            for destination in destinations.values():
                stack.callback(destination.writer.abandon)
            advance = stack.enter_context(self.reporter.stage(f"tokenising {located.where}", len(dataset), "documents"))
            for encoded in map_in_order(encoder, text_batches(dataset), workers):
                _distribute(encoded, located, destinations)
                empty += encoded.empty
                text_bytes += encoded.text_bytes
                advance(len(encoded.lengths) + encoded.empty)
            statistics = {split: destination.close() for split, destination in destinations.items()}
        for split, destination in destinations.items():
            counts[split] += destination.counts
        undecodable = located.undecodable if located.source.type == "text" else []
        self._note(located.where, empty, undecodable, statistics)
        return {
            "source": located.where,
            "type": located.source.type,
            "files": len(located.files),
            "text_bytes": text_bytes,
            "empty_documents": empty,
            "undecodable_files": len(undecodable),
            **{str(split): counts for split, counts in statistics.items()},
        }

    def _note(self, where: str, empty: int, undecodable: list[str], statistics: dict[Split, dict[str, Any]]) -> None:
        if undecodable:
            shown = ", ".join(undecodable[:3]) + (f" and {len(undecodable) - 3} more" if len(undecodable) > 3 else "")
            self.notes.append(f"{where}: bytes that are not UTF-8 were replaced by U+FFFD in {shown}")
        if empty:
            self.notes.append(f"{where}: {empty} empty documents were left out")
        if truncated := sum(counts["truncated_tokens"] for counts in statistics.values()):
            self.notes.append(
                f"{where}: {truncated} tokens beyond sequence_length were cut off; the other ways of packing keep them"
            )

    def _check(self, sources: list[dict[str, Any]]) -> None:
        """Refuse splits without samples, and files that changed on the way."""
        problems = [
            Problem(f"{file.path} changed while it was prepared; try again when it is complete", located.where)
            for located in self.located
            for file in located.files
            if not file.is_current()
        ]
        for source in sources:
            if "train" in source and not source["train"]["sequences"]:
                held_out = source.get("validation", {}).get("documents", 0)
                reason = f"all {held_out} documents are held out" if held_out else "no document holds any text"
                problems.append(Problem(f"{reason}, nothing is left to train on", source["source"]))
        held_out = sum(source["validation"]["sequences"] for source in sources if "validation" in source)
        if any("validation" in source for source in sources) and not held_out and not problems:
            data = self.recipe.data
            documents = sum(source.get("train", {}).get("documents", 0) for source in sources)
            problems.append(
                Problem(
                    f"{data.validation_fraction:g} of {documents} documents holds out none; raise it",
                    "data.validation_fraction",
                )
                if data.validation_fraction
                else Problem("no document holds any text", "data.validation_sources")
            )
        if problems:
            raise SourceError(self.recipe.name, problems)


def _distribute(encoded: EncodedDocuments, located: LocatedSource, destinations: dict[Split, _Destination]) -> None:
    if located.serves != "both":
        destinations[located.serves].add(encoded.tokens, encoded.lengths)
        return
    sides: dict[Split, NDArray[np.bool_]] = {"train": ~encoded.held_out, "validation": encoded.held_out}
    for split, side in sides.items():
        destinations[split].add(encoded.tokens[np.repeat(side, encoded.lengths)], encoded.lengths[side])


def _total(sources: list[dict[str, Any]], split: Split, sequence_length: int) -> dict[str, Any]:
    names = ("documents", "tokens", "sequences", "truncated_tokens")
    total: dict[str, Any] = {name: sum(source.get(split, {}).get(name, 0) for source in sources) for name in names}
    return total | {"utilization": total["tokens"] / max(total["sequences"] * sequence_length, 1)}

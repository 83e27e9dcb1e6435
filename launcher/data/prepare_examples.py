"""From a recipe's sources to labelled examples on disk, once; the counterpart of `prepare` for tasks with labels."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from cluster.errors import Problem
from launcher.data.cache import building, cache_directory, only_one
from launcher.data.examples import FIELDS, BadExample, EncodingError, Example, ExampleEncoder, Field, Row
from launcher.data.packed_examples import OneASample
from launcher.data.progress import ProgressReporter
from launcher.data.rows import Rows
from launcher.data.sources import LocatedSource, is_held_out, locate_sources, raise_if_full
from launcher.data.store import TOKENIZER, GrowingArray, PreparedData, Split, is_complete, split_folder, write_marker
from launcher.data.tokenizer import load_tokenizer, read_chat_template, tokenizer_identity, train_tokenizer
from launcher.errors import SourceError
from launcher.recipe.schema import Recipe
from launcher.recipe.tasks import TASKS

FORMAT = 1
"""Of folders of examples; part of the fingerprint, so that a newer form is prepared anew."""
SHOWN = 3


def prepare_examples(recipe: Recipe, encoder: ExampleEncoder, *, progress: bool = True) -> PreparedData:
    """Encode the recipe's data into the cache, unless it is there already.

    Args:
        recipe: its data, tokenizer and seed count.
        encoder: of the recipe's task.
        progress: report on standard error.

    Raises:
        SourceError: lists what is wrong with the sources, the labels or the tokenizer, by field of the recipe.
        StorageError: the cache cannot be written, or the disk is full.
    """
    cache = cache_directory(recipe)
    reporter = ProgressReporter(progress)
    located = locate_sources(recipe, cache)
    name = fingerprint(recipe, located, encoder)
    directory = cache / name
    if not is_complete(directory):
        with only_one(cache, name, lambda: reporter.say("another process is preparing this data; waiting for it")):
            if not is_complete(directory):
                try:
                    with building(cache, name, is_complete) as folder:
                        _Build(recipe, located, encoder, name, folder, reporter).run()
                except OSError as error:
                    raise_if_full(error, cache)
                    raise
    prepared = PreparedData.load(directory)
    for note in prepared.statistics["notes"]:
        reporter.say(note)
    return prepared


def fingerprint(recipe: Recipe, located: list[LocatedSource], encoder: ExampleEncoder) -> str:
    """Hash what decides the examples: content of the files, tokenizer and settings; no path, no time."""
    data = recipe.data
    identity = {
        "format": ["examples", FORMAT],
        "task": [recipe.task, encoder.identity()],
        "sources": [source.identity() for source in located],
        "chat_template": read_chat_template(recipe) if recipe.tokenizer.chat_template else None,
        "tokenizer": tokenizer_identity(recipe) if TASKS[recipe.task].tokens else None,
        "split": [data.validation_fraction, recipe.seed],
        "form": [data.sequence_length, data.max_bad_fraction],
    }
    return xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())


class ExamplesWriter:
    """Writes one source's examples of one split."""

    def __init__(self, folder: Path, fields: dict[str, Field]) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.fields = fields
        self.rows = 0
        self.tokens = 0
        self._values = {
            name: GrowingArray(folder / f"{name}.npy", field.dtype, field.shape or ()) for name, field in fields.items()
        }
        self._offsets = {
            name: GrowingArray(folder / f"{name}.offsets.npy", np.int64)
            for name, field in fields.items()
            if field.shape is None
        }
        self._ends = dict.fromkeys(self._offsets, 0)
        for offsets in self._offsets.values():
            offsets.append(np.zeros(1, np.int64))

    def append(self, examples: list[Example]) -> None:
        """Add examples."""
        if not examples:
            return
        self.rows += len(examples)
        for name, values in self._values.items():
            parts = [np.asarray(example[name]) for example in examples]
            if name not in self._offsets:
                values.append(np.stack(parts))
                continue
            lengths = np.array([len(part) for part in parts], np.int64)
            values.append(np.concatenate(parts))
            self._offsets[name].append(self._ends[name] + np.cumsum(lengths))
            self._ends[name] += int(lengths.sum())

    def close(self) -> dict[str, int]:
        """Complete the files; return the statistics."""
        for array in (*self._values.values(), *self._offsets.values()):
            array.close()
        forms = {name: {"dtype": field.dtype, "shape": field.shape} for name, field in self.fields.items()}
        (self.folder / FIELDS).write_text(json.dumps({"rows": self.rows, "fields": forms}) + "\n")
        tokens = sum(end for name, end in self._ends.items() if name.endswith("input_ids"))
        return {"documents": self.rows, "sequences": self.rows, "tokens": tokens, "truncated_tokens": 0}


class _Build:
    """One preparation, in a folder of its own."""

    def __init__(
        self,
        recipe: Recipe,
        located: list[LocatedSource],
        encoder: ExampleEncoder,
        name: str,
        folder: Path,
        reporter: ProgressReporter,
    ) -> None:
        self.recipe = recipe
        self.located = located
        self.encoder = encoder
        self.name = name
        self.folder = folder
        self.scratch = folder / "scratch"
        self.reporter = reporter
        self.notes: list[str] = []

    def run(self) -> None:
        """Read, encode and write everything; the marker comes last."""
        self.scratch.mkdir()
        opened = []
        for source in self.located:
            own = self.scratch / source.where
            own.mkdir()
            opened.append(Rows(source, self.encoder, own, self.recipe.name))
        tokenizer = self._tokenizer(opened)
        with self._located("data.sources"):
            self.encoder.begin(tokenizer, self._training_rows(opened))
        sources = [self._encode(rows) for rows in opened]
        self._check(sources)
        shutil.rmtree(self.scratch)
        statistics = {
            "train": _total(sources, "train", self.recipe.data.sequence_length),
            "validation": _total(sources, "validation", self.recipe.data.sequence_length),
            "sources": sources,
            "notes": self.notes,
        }
        settings = {"facts": self.encoder.facts(), "seed": self.recipe.seed}
        write_marker(self.folder, self.name, settings, statistics)

    def _tokenizer(self, opened: list[Rows]) -> Any:
        entry = TASKS[self.recipe.task]
        directory = self.folder / TOKENIZER
        directory.mkdir()
        if not entry.tokens:
            return None
        section = self.recipe.tokenizer.train
        if section is None:
            load_tokenizer(self.recipe, directory)
        else:
            with self.reporter.stage("training the tokenizer", None, "documents") as advance:
                train_tokenizer(self._training_texts(opened, advance), section, directory, entry.encoder_tokens)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory)
        if self.recipe.tokenizer.chat_template is not None:
            tokenizer.chat_template = read_chat_template(self.recipe)
            tokenizer.save_pretrained(directory)
        return tokenizer

    def _training_rows(self, opened: list[Rows]) -> Iterator[list[Row]]:
        for rows in opened:
            if rows.located.serves != "validation":
                for batch in rows.batches():
                    yield [row for row in batch if not (rows.located.serves == "both" and self._is_held_out(row))]

    def _training_texts(self, opened: list[Rows], advance: Any) -> Iterator[str]:
        for batch in self._training_rows(opened):
            for row in batch:
                yield from (text for text in self.encoder.texts(row) if text)
            advance(len(batch))

    def _is_held_out(self, row: Row) -> bool:
        own_key = getattr(self.encoder, "split_key", None)
        key = "\x1e".join(self.encoder.texts(row)) if own_key is None else own_key(row)
        return is_held_out(key.encode(), self.recipe.seed, self.recipe.data.validation_fraction)

    def _encode(self, rows: Rows) -> dict[str, Any]:
        """Encode one source; return its statistics."""
        located = rows.located
        splits: tuple[Split, ...] = ("train", "validation") if located.serves == "both" else (located.serves,)
        index = int(located.where.rpartition(".")[2])
        writers = {
            split: ExamplesWriter(split_folder(self.folder, split, index), self.encoder.fields()) for split in splits
        }
        packs = getattr(self.encoder, "packer", OneASample)
        packers = {split: packs() for split in splits}
        counts: Counter[str] = Counter()
        bad: Counter[str] = Counter()
        seen = 0
        with self.reporter.stage(f"encoding {located.where}", None, "examples") as advance:
            for batch in rows.batches():
                with self._located(located.where):
                    encoded = self.encoder.encode(batch)
                sides: dict[Split, list[Example]] = {split: [] for split in splits}
                for row, example in zip(batch, encoded, strict=True):
                    if isinstance(example, BadExample):
                        bad[example.reason] += 1
                        continue
                    held_out = located.serves == "both" and self._is_held_out(row)
                    made = example if isinstance(example, list) else [example]
                    sides["validation" if held_out else splits[0]] += made
                for split, examples in sides.items():
                    counts[split] += len(examples)
                    writers[split].append(packers[split].add(examples))
                seen += len(batch)
                advance(len(batch))
        statistics = {}
        for split, writer in writers.items():
            writer.append(packers[split].finish())
            statistics[split] = {**writer.close(), "documents": counts[split]}
        self._judge(located.where, bad, seen)
        return {
            "source": located.where,
            "type": located.source.type,
            "files": len(located.files),
            "bad_examples": sum(bad.values()),
            **{str(split): counted for split, counted in statistics.items()},
        }

    def _judge(self, where: str, bad: Counter[str], seen: int) -> None:
        """Note the examples that were left out, or refuse a source with too many of them."""
        if not bad:
            return
        reasons = "; ".join(f"{count} x {reason}" for reason, count in bad.most_common(SHOWN))
        text = f"{sum(bad.values())} of {seen} examples cannot be used: {reasons}"
        if sum(bad.values()) > self.recipe.data.max_bad_fraction * seen:
            bound = f"{text}. More than data.max_bad_fraction ({self.recipe.data.max_bad_fraction:g}) may be left out"
            raise SourceError(self.recipe.name, [Problem(bound, where)])
        self.notes.append(f"{where}: {text}; they were left out")

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
                problems.append(Problem("it holds no example to train on", source["source"]))
        splits = [source["validation"]["sequences"] for source in sources if "validation" in source]
        if splits and not sum(splits) and not problems:
            where = "data.validation_fraction" if self.recipe.data.validation_fraction else "data.validation_sources"
            problems.append(Problem("no example is held out", where))
        if problems:
            raise SourceError(self.recipe.name, problems)

    def _located(self, where: str) -> "_Located":
        return _Located(self.recipe.name, where)


class _Located:
    """Turns an encoder's error into one that names the recipe's field."""

    def __init__(self, recipe_name: str, where: str) -> None:
        self.recipe_name = recipe_name
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, EncodingError):
            raise SourceError(self.recipe_name, [Problem(str(error), error.where or self.where)]) from error


def _total(sources: list[dict[str, Any]], split: Split, sequence_length: int) -> dict[str, Any]:
    names = ("documents", "tokens", "sequences", "truncated_tokens")
    total: dict[str, Any] = {name: sum(source.get(split, {}).get(name, 0) for source in sources) for name in names}
    return total | {"utilization": total["tokens"] / max(total["sequences"] * sequence_length, 1)}

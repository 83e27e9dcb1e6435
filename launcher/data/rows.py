"""Rows of a source by what a task reads of them (its roles: text, label, image, ...), whatever form the source has."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import Problem
from cluster.validation import near_match
from launcher.data.examples import ExampleEncoder, Row
from launcher.data.sources import LocatedSource, open_table
from launcher.errors import SourceError
from launcher.recipe.data_sections import AudioFolderSource, ImageFolderSource, ScikitLearnSource, Source, TextSource

ROWS_AT_ONCE = 512
_EMPTY_LINE = re.compile(r"\n[ \t]*\n")


class Rows:
    """Rows of one source, which can be read more than once.

    Args:
        located: the source.
        encoder: says which roles are read.
        scratch: folder for Arrow copies of JSON, CSV and Parquet files.
        recipe_name: for errors.

    Raises:
        SourceError: a column is missing (says which there are), or the files cannot be read.
    """

    def __init__(self, located: LocatedSource, encoder: ExampleEncoder, scratch: Path, recipe_name: str) -> None:
        self.located = located
        self.source: Source = located.source
        self._table: Any = None
        if isinstance(self.source, TextSource | ImageFolderSource | AudioFolderSource | ScikitLearnSource):
            offered = _renamed(_offered(self.source), self.source)
            missing = [role for role in encoder.roles if role not in offered]
            if missing:
                text = f"type {self.source.type} has {_listed(offered)}, but the task also reads {_listed(missing)}"
                if isinstance(self.source, TextSource) and "label" in missing:
                    text += "; label_from_folder: true takes the folders' names for labels"
                raise SourceError(recipe_name, [Problem(text, located.where)])
        else:
            self._table = _select(open_table(located, scratch, recipe_name), located, encoder, recipe_name)

    def __len__(self) -> int:
        """Number of rows, or of files where they are read one by one."""
        if self._table is not None:
            return len(self._table)
        return len(self.located.files) or 1

    def batches(self) -> Iterator[list[Row]]:
        """Read the rows in order, some at a time."""
        batch: list[Row] = []
        for row in self._rows():
            batch.append(row)
            if len(batch) == ROWS_AT_ONCE:
                yield batch
                batch = []
        if batch:
            yield batch

    def _rows(self) -> Iterator[Row]:
        source = self.source
        if self._table is not None:
            yield from self._table
        else:
            for row in self._from_files():
                yield {**row, **{role: row[column] for role, column in source.columns.items() if column in row}}

    def _from_files(self) -> Iterator[Row]:
        source = self.source
        if isinstance(source, ScikitLearnSource):
            yield from _digits()
        for file in self.located.files:
            path = Path(file.path)
            if isinstance(source, TextSource):
                label = {"label": path.parent.name} if source.label_from_folder else {}
                yield from (columns | label for columns in _documents(path, source))
            else:
                role = "audio" if isinstance(source, AudioFolderSource) else "image"
                yield {role: {"bytes": path.read_bytes(), "path": file.path}, "label": path.parent.name}


def _offered(source: Source) -> list[str]:
    if isinstance(source, TextSource):
        names = ["text"] if source.pattern is None else list(re.compile(source.pattern).groupindex)
        return [*names, "label"] if source.label_from_folder else names
    return ["audio" if isinstance(source, AudioFolderSource) else "image", "label"]


def _renamed(offered: list[str], source: Source) -> list[str]:
    """What is offered, with the names that the source gives to some of it (`columns: {text: label}`)."""
    return [*offered, *(role for role, column in source.columns.items() if column in offered and role not in offered)]


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _documents(path: Path, source: TextSource) -> Iterator[dict[str, str]]:
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if source.pattern is not None:
        yield from (match.groupdict(default="") for match in re.finditer(source.pattern, text))
    elif source.sample_by == "document":
        yield {"text": text}
    else:
        parts = text.splitlines() if source.sample_by == "line" else _EMPTY_LINE.split(text)
        yield from ({"text": part} for part in parts if part.strip())


def _digits() -> Iterator[Row]:
    from sklearn.datasets import load_digits

    data = load_digits()
    for image, target in zip(data.images, data.target, strict=True):
        yield {"image": (image * (255 / 16)).round().astype("uint8"), "label": str(target)}


def _select(table: Any, located: LocatedSource, encoder: ExampleEncoder, recipe_name: str) -> Any:
    """Keep the columns that the task reads, under the names of their roles."""
    import datasets

    names = {"text": located.source.text_column, **located.source.columns}
    roles = (*encoder.roles, *encoder.optional_roles)
    columns = table.column_names
    problems = [
        Problem(f"{role}: the task reads {_listed(roles)}; {near_match(role, roles)}", f"{located.where}.columns")
        for role in located.source.columns
        if role not in roles
    ]
    for role in roles:
        column = names.get(role, role)
        if column not in columns and (role in encoder.roles or role in located.source.columns):
            text = f"there is no column {column} for the task's {role}; the columns are {', '.join(columns)}"
            if role not in located.source.columns:
                text += f"; name the one that holds it: columns: {{{role}: NAME}}"
            problems.append(Problem(text, f"{located.where}.columns"))
    if problems:
        raise SourceError(recipe_name, problems)
    kept = {names.get(role, role): role for role in roles if names.get(role, role) in columns}
    table = table.select_columns(list(kept)).rename_columns(kept)
    for role, feature in table.features.items():
        if isinstance(feature, datasets.Image | datasets.Audio):
            table = table.cast_column(role, type(feature)(decode=False))
        elif isinstance(feature, datasets.ClassLabel):
            table = table.map(lambda row, role=role, feature=feature: {role: feature.int2str(row[role])})
    return table

"""Labelled rows to learn from where nothing can be downloaded: made of Python's standard library and of digits.

    python benchmarks/make_rows.py [FOLDER]

writes FOLDER/*.jsonl, FOLDER/prompts.yaml and FOLDER/pictures/CLASS/*.png, where the recipes look for them.
"""

import argparse
import ast
import io
import json
import math
import os
import sysconfig
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("asyncio", "email", "json", "logging", "unittest", "xml/dom", "importlib", "concurrent/futures", "http")
STATEMENTS = {
    "loop": (ast.For, ast.While, ast.AsyncFor),
    "condition": (ast.If, ast.IfExp),
    "exception": (ast.Try, ast.Raise),
    "result": (ast.Return, ast.Yield),
}
Row = dict[str, Any]
Function = tuple[str, ast.FunctionDef]
"""Its source without its docstring, and its tree."""


def texts() -> list[str]:
    """Sources of some packages, and of the modules on top."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for package in PACKAGES for path in sorted((library / package).glob("*.py"))]
    return [path.read_text(encoding="utf-8") for path in [*files, *sorted(library.glob("[a-d]*.py"))]]


def functions(sources: list[str]) -> Iterator[Function]:
    """Every function with a docstring; its source begins with `def`."""
    for text in sources:
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                head = lines[node.lineno - 1 : node.body[0].lineno - 1]
                rest = lines[node.body[1].lineno - 1 : node.end_lineno]
                yield textwrap.dedent("\n".join([*head, *rest])), node


def summary(node: ast.FunctionDef) -> str:
    """First line of its docstring."""
    return (ast.get_docstring(node) or "").splitlines()[0]


def tags(sources: list[str]) -> Iterator[Row]:
    """Lines of code, and which of their words name a function, a class or a module (`B-`, `I-` and `O`)."""
    kinds = {"def": "FUNCTION", "class": "CLASS", "import": "MODULE", "from": "MODULE"}
    for text in sources:
        words: list[str] = []
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER):
                words.append(token.string)
            elif token.type == tokenize.NEWLINE:
                kind = kinds.get(words[0] if words else "")
                if 3 < len(words) < 40 or kind:
                    yield {"tokens": words, "tags": _tags_of(words, kind)}
                words = []


def _tags_of(words: list[str], kind: str | None) -> list[str]:
    found, inside, named = [], False, False
    for index, word in enumerate(words):
        part = kind is not None and index > 0 and word not in ("import", "as", ",", "(", ")", ":", "*") and not named
        found.append("O" if not part else f"{'I' if inside else 'B'}-{kind}")
        named = named or (inside and not part and (kind != "MODULE" or words[0] == "from" or word == "as"))
        inside = part
    return found


def questions(found: list[Function]) -> Iterator[Row]:
    """What a function is called, and what its last argument is."""
    for text, node in found:
        context = text[:160]
        asked = {"What is it called?": node.name}
        if node.args.args:
            asked["What is its last argument?"] = node.args.args[-1].arg
        for question, answer in asked.items():
            start = context.find(answer, 4 if question.endswith("called?") else context.find("("))
            if start >= 0:
                yield {"question": question, "context": context, "answers": {"text": [answer], "answer_start": [start]}}


def statements(found: list[Function]) -> Iterator[Row]:
    """Functions, and all kinds of statements in each."""
    for text, node in found:
        inside = [kind for kind, types in STATEMENTS.items() if any(isinstance(one, types) for one in ast.walk(node))]
        yield {"text": text[:600], "label": inside}


def lengths(found: list[Function]) -> Iterator[Row]:
    """Beginnings of functions, and the base-2 logarithm of their number of lines."""
    for text, _ in found:
        yield {"text": text[:300], "label": round(math.log2(1 + text.count("\n")), 4)}


def pairs(found: list[Function]) -> Iterator[Row]:
    """Two halves of what a function does, in their order or in the other one."""
    for index, (text, _) in enumerate(found):
        lines = text.splitlines()[1:]
        if len(lines) >= 4:
            halves = ["\n".join(part)[:200] for part in (lines[: len(lines) // 2], lines[len(lines) // 2 :])]
            first, second = halves if index % 2 else reversed(halves)
            yield {"text": first, "text_pair": second, "label": "in order" if index % 2 else "swapped"}


def chats(found: list[Function]) -> Iterator[Row]:
    """Somebody asks for a docstring, and gets it."""
    for text, node in found:
        asked = f"What does this do?\n{text[:160]}"
        yield {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": summary(node)}]}


def answers(found: list[Function]) -> Iterator[Row]:
    """Docstrings, which are good answers, and first lines of code, which are not."""
    for index, (text, node) in enumerate(found):
        good = index % 2 == 0
        head, code = [*text.splitlines(), "pass"][:2]
        yield {"prompt": f"{head[:100]}\n", "completion": summary(node) if good else code.strip(), "label": good}


def asked(found: list[Function]) -> Iterator[Row]:
    """Functions, and whether they return something; as text to continue, and as rows to ask about."""
    for text, node in found:
        returns = any(isinstance(one, ast.Return) and one.value is not None for one in ast.walk(node))
        answer = "yes" if returns else "no"
        yield {"prompt": f"{text[:240]}\n# returns:", "completion": f" {answer}", "text": text[:240], "label": answer}


ROWS: dict[str, Callable[[list[Function]], Iterator[Row]]] = {
    each.__name__: each for each in (questions, statements, lengths, pairs, chats, answers, asked)
}
PROMPTS = """\
file: asked-about.jsonl
template: "{text}\\n# returns:"
verbalizers: {"yes": " yes", "no": " no"}
"""


def write_rows(folder: Path) -> dict[str, int]:
    """Write everything; returns the number of rows by file."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = texts()
    found = list(functions(sources))
    counts = {"tags": _write(folder / "tags.jsonl", list(tags(sources[::3])))}
    for name, make in ROWS.items():
        rows = list(make(found))
        if name == "asked":  # what is asked about is not trained on
            counts["asked-about"] = _write(folder / "asked-about.jsonl", rows[::8])
            rows = [row for index, row in enumerate(rows) if index % 8]
        counts[name] = _write(folder / f"{name}.jsonl", rows)
    (folder / "prompts.yaml").write_text(PROMPTS)
    counts["pictures"] = _write_pictures(folder / "pictures")
    return counts


def _write(file: Path, rows: list[Row]) -> int:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def _write_pictures(folder: Path) -> int:
    """scikit-learn's digits as pictures of 32 x 32, in a folder each."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    for number, (image, target) in enumerate(zip(data.images, data.target, strict=True)):
        (folder / str(target)).mkdir(parents=True, exist_ok=True)
        pixels = (image * (255 / 16)).round().astype("uint8")
        picture = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)
        picture.save(folder / str(target) / f"{number:04d}.png")
    return len(data.images)


def main() -> None:
    """Read the arguments and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("ZEROFLEET_ASSETS", "/var/tmp/zerofleet-assets")) / "rows"  # as in the recipes
    parser.add_argument("folder", type=Path, nargs="?", default=default)
    arguments = parser.parse_args()
    for name, count in write_rows(arguments.folder).items():
        print(f"{count:6,} {name}")


if __name__ == "__main__":
    main()

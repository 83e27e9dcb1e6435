"""References in text values, and nothing that could run code."""

import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.strict_yaml import Document
from launcher.recipe.references import escape, resolve_references


def resolve(text: str, directory: Path = Path("/recipes")) -> tuple[object, list[str]]:
    document = Document("f.yaml", {"a": {"b": [text]}}, {"a.b.0": 7})
    resolve_references(document, directory)
    return document.data["a"]["b"][0], [f"{problem}" for problem in document.problems]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("ZF_SET", "value")
    monkeypatch.setenv("ZF_EMPTY", "")
    monkeypatch.setenv("ZF_NESTED", "${env:ZF_SET}")
    monkeypatch.setenv("ZF_BYTES", "caf\udce9")
    monkeypatch.delenv("ZF_UNSET", raising=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("a${env:ZF_SET}b${env:ZF_SET}", "avaluebvalue"),
        ("${env:ZF_UNSET:-other}", "other"),
        ("${env:ZF_EMPTY:-other}", "other"),
        ("${env:ZF_EMPTY}", ""),
        ("${env:ZF_UNSET:-}", ""),
        ("${env:ZF_SET:-a:-b}", "value"),
        ("${env:ZF_UNSET:-a:-b}", "a:-b"),
        ("${sysconfig:stdlib}/**/*.py", f"{sysconfig.get_paths()['stdlib']}/**/*.py"),
        ("${recipe_dir}/x", "/recipes/x"),
        ("${env:ZF_NESTED}", "${env:ZF_SET}"),
        ("$${env:ZF_SET}", "${env:ZF_SET}"),
        ("$HOME $(ls) `ls` {a} $", "$HOME $(ls) `ls` {a} $"),
    ],
)
def test_what_a_reference_stands_for(text, expected):
    assert resolve(text) == (expected, [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "${env:ZF_UNSET}",
            "the environment variable ZF_UNSET is not set; set it, or give a default: ${env:ZF_UNSET:-default}",
        ),
        ("${env:}", "${env:}: '' is no name of an environment variable"),
        ("${env:A B}", "${env:A B}: 'A B' is no name of an environment variable"),
        (
            "${env}",
            "unknown reference ${env}; there are ${env:NAME}, ${env:NAME:-default}, ${sysconfig:NAME}",
        ),
        ("${}", "unknown reference ${}"),
        ("${python:1+1}", "unknown reference ${python:1+1}"),
        ("${recipe_dir:x}", "unknown reference ${recipe_dir:x}"),
        ("${sysconfig:stdlb}", "Python's sysconfig has no path 'stdlb'; did you mean stdlib?"),
        ("${env:ZF_UNSET:-${env:ZF_SET}}", "holds a ${ without its }, or a reference inside a reference"),
        ("${env:ZF_SET", "holds a ${ without its }"),
        ("${env:ZF_BYTES}", "${env:ZF_BYTES} stands for something that is not UTF-8 text"),
    ],
)
def test_a_bad_reference_is_a_problem_with_its_line(text, expected):
    value, problems = resolve(text)
    assert value == text
    (problem,) = problems
    assert problem.startswith(f"line 7  a.b.0: {expected}")


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "aws_secret_access", "DB_PASSWORD", "PGPASSWD", "MY_CREDENTIALS"]
)
@pytest.mark.parametrize("default", ["", ":-x"])
def test_secrets_are_refused_set_or_not(monkeypatch, name, default):
    monkeypatch.setenv(name, "s3cret")
    value, problems = resolve(f"${{env:{name}{default}}}")
    assert problems[0].startswith(f"line 7  a.b.0: ${{env:{name}}} looks like a secret")
    assert "s3cret" not in f"{value}{problems}"


def test_only_text_values_are_resolved():
    document = Document("f.yaml", {"${env:ZF_SET}": 3, "b": True, "c": None, "d": 0.5})
    resolve_references(document, Path("/recipes"))
    assert document.data == {"${env:ZF_SET}": 3, "b": True, "c": None, "d": 0.5}
    assert document.problems == []


@given(st.text(alphabet="${}ab:", max_size=12))
def test_escaped_text_is_given_back(text):
    assert resolve(escape(text)) == (text, [])

"""The light verbs of the command line, called as the installed command calls them."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest

import launcher.planning.plan
from cluster.profile import Profile
from launcher.cli.main import main
from launcher.orchestration.progress import readable_bytes
from launcher.planning.plan import Plan
from launcher.recipe.catalogue import recipe_names
from launcher.recipe.loading import load_recipe

RECIPE = """\
# zerofleet run small.yaml
name: small
model:
  config: {model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4}
tokenizer:
  train: {vocab_size: 512}
data:
  sources:
    - {type: text, files: [texts/*.txt]}
  sequence_length: 32
training:
  max_steps: 10
  micro_batch_size: 2
  gradient_accumulation_steps: 3
  precision: fp32
"""

HEAVY = ("torch", "ray", "deepspeed", "transformers", "tokenizers", "datasets", "tensorboard", "rich")


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def zerofleet(tmp_path, monkeypatch, capsys):
    """Call the command line inside this process, in a folder with one small recipe and a machine without GPUs."""
    (tmp_path / "small.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["zerofleet", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return Outcome(caught.value.code or 0, captured.out, captured.err)

    return call


def test_help_names_every_verb(zerofleet):
    outcome = zerofleet("--help")
    assert outcome.code == 0
    listed = [line.split()[0] for line in outcome.out.partition("Commands:")[2].splitlines() if line.strip()]
    assert listed == [
        *("run", "submit", "jobs", "status", "logs", "attach", "cancel", "report", "sweep"),
        *("plan", "doctor", "simulate", "prepare", "export", "evaluate", "predict", "generate", "tensorboard"),
        *("import", "schema", "recipes", "profile", "checkpoint"),
    ]
    for verb in listed:
        assert zerofleet(verb, "--help").code == 0


def test_version(zerofleet):
    assert zerofleet("--version").out.strip() == version("zerofleet")


def test_plan_as_text_shows_the_arithmetic(zerofleet):
    outcome = zerofleet("plan", "small.yaml", "max_steps=20")
    assert outcome.code == 0
    assert outcome.err == ""
    for line in (
        "  workers       2 = 1 node x 2 a node, on cpu",
        "  layout        2 = data-parallel 2",
        "  global batch  12 samples = micro batch 2 x accumulation 3 x data-parallel 2",
        "  a step        384 tokens = 12 samples x sequence length 32",
        "  all steps     7,680 tokens = 20 steps x 384",
        "  precision     fp32, ZeRO stage 2",
    ):
        assert line in outcome.out.splitlines()
    assert "llama: 2 layers, hidden size 64, 4 heads (4 for keys and values), vocabulary 512" in outcome.out
    stages = [line[:8] for line in outcome.out.splitlines() if line[2:7] == "ZeRO "]
    assert stages == ["  ZeRO 0", "  ZeRO 1", "> ZeRO 2", "  ZeRO 3"]


def test_plan_as_text_shows_what_a_rank_holds(zerofleet):
    lines = zerofleet("plan", "small.yaml").out.splitlines()
    (header,) = (index for index, line in enumerate(lines) if line.startswith("Memory of each rank"))
    assert lines[header + 1].split() == ["states", "activations", "buffers", "backward", "step", "host"]
    plan = Plan.model_validate_json(zerofleet("plan", "small.yaml", "--json").out)
    assert plan.ranks is not None
    (rank,) = plan.ranks
    shown = [readable_bytes(size) for size in (rank.states.device_bytes, rank.backward_bytes, rank.step_bytes)]
    assert all(size in lines[header + 2] for size in shown)
    assert max(map(len, lines[header : header + 3])) <= 80


def test_plan_as_json_is_the_plan_that_text_shows(zerofleet, tmp_path):
    outcome = zerofleet("plan", "small.yaml", "--json", "zero.stage=1")
    plan = Plan.model_validate_json(outcome.out)
    assert plan.recipe == load_recipe(tmp_path / "small.yaml", ["zero.stage=1"])
    assert plan.zero_stage == 1
    text = zerofleet("plan", "small.yaml", "zero.stage=1").out
    assert f"{plan.model.num_parameters:,}" in text
    assert json.dumps(plan.deepspeed_config, indent=2) in text


def test_plan_takes_the_resources_from_the_profile(zerofleet, tmp_path):
    (tmp_path / "wide.yaml").write_text("backend: ray\nnodes: 2\nworkers_per_node: 3\n")
    outcome = zerofleet("plan", "small.yaml", "--profile", "wide.yaml")
    assert "  workers       6 = 2 nodes x 3 a node, on cpu\n" in outcome.out
    assert "  global batch  36 samples = micro batch 2 x accumulation 3 x data-parallel 6\n" in outcome.out


def test_plan_names_the_line_of_a_clash(zerofleet):
    outcome = zerofleet("plan", "small.yaml", "global_batch_size=7")
    assert outcome.code == 2
    assert outcome.out == ""
    first, problem = outcome.err.splitlines()
    assert first == "small.yaml: 1 problem"
    assert problem.startswith("  training.global_batch_size: ")
    assert problem.endswith("(override global_batch_size=7)")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan", "none.yaml"], "none.yaml: 1 problem\n  no such file, and no shipped recipe of this name"),
        (["plan", "small.yaml", "max_stepz=1"], "override max_stepz=1: unknown key; did you mean training.max_steps?"),
        (["plan", "small.yaml", "--profile", "lokal"], "no profile has this name; did you mean local?"),
        (["plan", "quickstrt"], "did you mean quickstart?"),
        (["recipes", "show", "quickstrt"], "did you mean quickstart?"),
        (["recipes", "copy", "quickstart", "small.yaml"], "small.yaml exists already; name another file"),
        (["prepare", "small.yaml", "sequence_length=x"], "data.sequence_length: must be a whole number, not 'x'"),
        (["tensorboard", "nowhere"], "nowhere is no run directory: neither nowhere/tensorboard nor"),
        (["plan"], "Missing argument"),
        (["plna"], "No such command"),
    ],
)
def test_a_wrong_call_ends_with_2_and_no_traceback(zerofleet, arguments, expected):
    outcome = zerofleet(*arguments)
    assert outcome.code == 2
    assert expected in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


def test_a_defect_of_ours_keeps_its_traceback(zerofleet, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(launcher.planning.plan, "make_plan", broken)
    with pytest.raises(ZeroDivisionError):
        zerofleet("plan", "small.yaml")


def test_schema_accepts_the_recipe_and_completes_an_editor(zerofleet, tmp_path):
    schema = json.loads(zerofleet("schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    recipe = load_recipe(tmp_path / "small.yaml").model_dump(mode="json")
    assert list(validator.iter_errors(recipe)) == []
    assert list(validator.iter_errors({**recipe, "traning": {}}))
    assert schema["$defs"]["TrainingSection"]["properties"]["max_steps"]["description"] == "Optimizer steps to make."


def test_schema_of_profiles(zerofleet):
    schema = json.loads(zerofleet("schema", "--profile").out)
    validator = jsonschema.Draft202012Validator(schema)
    assert list(validator.iter_errors(Profile().model_dump(mode="json"))) == []
    assert list(validator.iter_errors({"backend": "cloud"}))


def test_recipes_ls(zerofleet):
    lines = zerofleet("recipes", "ls").out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    listed = json.loads(zerofleet("recipes", "ls", "--json").out)
    assert [entry["name"] for entry in listed] == recipe_names()
    assert all(Path(entry["path"]).is_file() and entry["command"].startswith("zerofleet run") for entry in listed)


def test_recipes_show(zerofleet):
    text = zerofleet("recipes", "show", "quickstart").out
    shown = json.loads(zerofleet("recipes", "show", "quickstart", "--json").out)
    assert text == Path(shown["path"]).read_text()
    assert shown["recipe"]["name"] == "quickstart"
    assert shown["recipe"]["optimizer"]["type"] == "adamw"


def test_a_copied_recipe_can_be_planned(zerofleet, tmp_path):
    assert "run it with `zerofleet run mine.yaml`" in zerofleet("recipes", "copy", "quickstart", "mine.yaml").out
    assert zerofleet("plan", "mine.yaml").code == 0
    assert json.loads(zerofleet("recipes", "copy", "quickstart", "--json").out) == {"path": "quickstart.yaml"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["plan", "small.yaml"],
        ["plan", "small.yaml", "--json"],
        ["schema"],
        ["recipes", "ls"],
    ],
)
def test_light_verbs_load_nothing_heavy(tmp_path, arguments):
    (tmp_path / "small.yaml").write_text(RECIPE)
    program = (
        "import sys; from launcher.cli.main import main\n"
        f"sys.argv = ['zerofleet', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n"
        f"    print('HEAVY', end.code, *sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "XDG_CONFIG_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "HEAVY 0", done.stderr


def test_the_installed_command_is_this_one(tmp_path):
    command = Path(sys.executable).parent / "zerofleet"
    done = subprocess.run([command, "plan", "no.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("no.yaml: 1 problem\n")


def test_prepare_says_where_the_data_is_and_a_second_call_finds_it(zerofleet, tmp_path, monkeypatch):
    monkeypatch.setenv("ZEROFLEET_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    for index in range(8):
        (tmp_path / "texts" / f"{index}.txt").write_text(f"Text number {index} of eight. " * 50)
    first = zerofleet("prepare", "small.yaml", "--json", "preprocessing_num_workers=1")
    assert first.code == 0, first.err
    facts = json.loads(first.out)
    assert Path(facts["directory"]).is_relative_to(tmp_path / "cache")
    assert facts["statistics"]["train"]["documents"] == 8
    text = zerofleet("prepare", "small.yaml").out
    assert text.startswith(f"small: prepared in {facts['directory']}\n  train       8 documents, ")
    assert f"{facts['statistics']['train']['tokens']:,} tokens in " in text


def test_prepare_names_the_line_of_missing_files(zerofleet, tmp_path, monkeypatch):
    monkeypatch.setenv("ZEROFLEET_CACHE", str(tmp_path / "cache"))
    outcome = zerofleet("prepare", "small.yaml")
    assert outcome.code == 2
    assert outcome.err.startswith("small.yaml: 1 problem\n  line 9  data.sources.0.files")
    assert "texts/*.txt" in outcome.err

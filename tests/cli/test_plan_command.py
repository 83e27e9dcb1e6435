"""`zerofleet plan` for machines that are not here: `--gpu`, `--search`, `--explain`."""

import json
import shlex
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from launcher.cli.main import app
from launcher.errors import ExpectedError, PlanError

RECIPE = "parallel/llama3-8b"


def zerofleet(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def told(*arguments: str) -> Any:
    outcome = zerofleet(*arguments, "--json")
    assert outcome.exit_code == 0, outcome.output + repr(outcome.exception)
    return json.loads(outcome.stdout)


def test_a_plan_for_another_machine_says_how_long_a_step_takes() -> None:
    plan = told(RECIPE, "--gpu", "H100-80GB", "--nodes", "2", "--network", "HDR-200", "--host-memory", "512")
    resources = plan["resources"]
    assert (resources["nodes"], resources["workers_per_node"], resources["device"]) == (2, 8, "cuda")
    assert (resources["network"], resources["host_memory"]) == ("HDR-200", 512 * 2**30)
    text = zerofleet(RECIPE, "--gpu", "H100-80GB", "--nodes", "2", "--network", "HDR-200").output
    assert "Time of a step on H100-80GB, estimated: " in text
    assert f"{plan['step']['tokens_per_second_per_device']:,.0f} tokens/s a device" in text
    assert "  matrix products" in text


def test_a_gpu_that_is_not_here_has_a_host_memory_that_is_not_known() -> None:
    assert told(RECIPE, "--gpu", "H100-80GB")["resources"]["host_memory"] is None


def test_the_best_of_a_search_can_be_pasted() -> None:
    found = told(RECIPE, "--gpu", "H100-80GB", "--search")
    assert len(found["best"]) == 10
    assert 10 < found["fitting"] <= found["choices"]
    text = zerofleet(RECIPE, "--gpu", "H100-80GB", "--search").output
    rows = [line for line in text.splitlines() if " tokens/s" not in line and "% " in line and "slower" not in line]
    assert len(rows) >= 10
    assert "slower: " in text
    command = text.splitlines()[-1]
    assert command == f"zerofleet plan {RECIPE} {' '.join(found['best'][0]['overrides'])}"
    plan = told(*shlex.split(command)[2:], "--gpu", "H100-80GB")
    assert plan["step"]["seconds"] == pytest.approx(found["best"][0]["seconds"])


def test_a_search_in_which_nothing_fits_says_how_far_it_is() -> None:
    arguments = ("parallel/llama3-70b", "--gpu", "RTX4090-24GB", "--search")
    assert "none of " in zerofleet(*arguments).output
    assert told(*arguments)["best"] == []


def test_what_a_change_does_is_shown_part_by_part() -> None:
    changes = "tensor_parallel_size=4,zero.stage=1"
    rows = {row["name"]: row for row in told(RECIPE, "--gpu", "H100-80GB", "--explain", changes)}
    assert (rows["tensor-parallel ranks"]["before"], rows["tensor-parallel ranks"]["after"]) == (1, 4)
    assert rows["global batch"]["before"] == rows["global batch"]["after"]
    text = zerofleet(RECIPE, "--gpu", "H100-80GB", "--explain", changes).output
    assert text.startswith("llama3-8b: tensor_parallel_size=4 zero.stage=1\n")
    assert any(line.split()[:3] == ["tensor-parallel", "ranks", "1"] for line in text.splitlines())
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((RECIPE, "--search", "--explain", "zero.stage=1"), ExpectedError, "leave one of them out"),
        ((RECIPE, "--gpu", "H1000"), PlanError, "H1000 is not in the catalogue"),
        (
            ("parallel/llama3-70b", "--gpu", "H100-80GB"),
            PlanError,
            r"llama3-70b.yaml: 1 problem\n +line \d+ .*a rank needs",
        ),
        ((RECIPE, "--gpu", "H100-80GB", "--explain", "zero.stag=1"), ExpectedError, "zero.stag"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)

"""Asking a run for a checkpoint, with a thread in the place of the run's rank 0."""

import threading
import time
from pathlib import Path

import pytest

from launcher.checkpoints import requests
from launcher.checkpoints.requests import Answer, Inbox
from launcher.errors import CheckpointError
from launcher.recipe.run_sections import CheckpointSection
from launcher.run_directory import RunDirectory


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setattr(requests, "LOOK_INTERVAL_S", 0.0)
    return RunDirectory.at(tmp_path)


def answer_one(directory: RunDirectory, *, saved: bool) -> None:
    inbox = Inbox(directory)
    while (request := inbox.look()) is None:
        time.sleep(0.01)
    inbox.answer(Answer(request, 42, saved))


@pytest.mark.parametrize("saved", [True, False])
def test_a_request_is_answered(directory: RunDirectory, saved: bool) -> None:
    run = threading.Thread(target=answer_one, args=(directory,), kwargs={"saved": saved})
    run.start()
    answer = requests.ask_and_wait(directory, timeout_s=20)
    run.join()
    assert (answer.step, answer.saved) == (42, saved)
    assert not directory.save_request.exists()


def test_two_who_ask_get_one_checkpoint(directory: RunDirectory) -> None:
    first = requests.ask(directory)
    assert requests.ask(directory) == first
    answer_one(directory, saved=True)
    assert requests.ask(directory) != first


def test_an_old_answer_is_no_answer(directory: RunDirectory) -> None:
    requests.ask(directory)
    answer_one(directory, saved=True)
    with pytest.raises(CheckpointError, match="did not answer within 0 s"):
        requests.ask_and_wait(directory, timeout_s=0.3)
    assert not directory.save_request.exists(), "nobody waits for it any more"


def test_rubbish_in_the_place_of_a_request_is_no_request(directory: RunDirectory) -> None:
    directory.save_request.write_text('{"request"')
    assert Inbox(directory).look() is None


def test_the_section_bounds_what_a_recipe_may_ask() -> None:
    for wrong in ({"save_minutes": 0}, {"keep_every": 0}, {"keep_best": -1}, {"save_total_limit": 0}):
        with pytest.raises(ValueError, match="greater than"):
            CheckpointSection.model_validate(wrong)

"""The batch script: every field of a profile in its place, and what sbatch is sent is what the dry run shows.

After a change that is meant, record the golden file anew and look at the difference:

    UPDATE_GOLDEN=1 .venv/bin/pytest tests/cluster/test_slurm_script.py && git diff tests/cluster/golden
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import BackendError
from cluster.slurm import SlurmBackend

GOLDEN = Path(__file__).parent / "golden" / "sbatch.sh"


def script(make_request, **profile) -> str:
    request = make_request(run_directory=Path("/shared/me/runs/gpt"), **profile)
    return SlurmBackend().render(request).replace(sys.executable, "/venv/bin/python")


def test_the_golden_script(make_request):
    text = script(
        make_request,
        nodes=4,
        gpus_per_node=8,
        slurm={
            "partition": "gpu",
            "account": "my-project",
            "qos": "long",
            "constraint": "a100&ib",
            "exclude": "gpu[7-9]",
            "dependency": "afterok:1234",
            "time_limit": "1-12:00:00",
            "memory_per_node": "0",
            "exclusive": True,
            "options": {"reservation": "maintenance", "mail-type": "END", "spread-job": True, "array": "1-3%1"},
            "srun_arguments": ["--cpu-bind=none"],
            "setup": ["module load cuda/13", "export NCCL_DEBUG=WARN"],
        },
    )
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def directives(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_what_is_left_out_is_left_to_the_site(make_request):
    found = directives(script(make_request, nodes=1))
    assert found == {
        "chdir": "/shared/me/runs/gpt",
        "cpus-per-task": "2",
        "job-name": "gpt",
        "nodes": "1",
        "ntasks-per-node": "1",
        "open-mode": "append",
        "output": "/shared/me/runs/gpt/jobs/0001/%j_0_log.out",
        "requeue": "",
        "signal": "USR2@300",
    }


def test_an_elastic_job_asks_for_a_range_of_nodes_and_outlives_those_that_slurm_loses(make_request):
    text = script(make_request, nodes=4, min_nodes=2)
    found = directives(text)
    assert (found["nodes"], found["no-kill"]) == ("2-4", "")
    assert "ntasks-per-node" not in found, "with it, Slurm gives no more than the fewest"
    command = next(line for line in text.splitlines() if line.startswith("srun"))
    assert " --ntasks-per-node=1 --no-kill " in command
    assert "kill-on-bad-exit" not in command
    code = "/shared/me/runs/gpt/jobs/0001/exit_code"
    assert f"status=$?\nif [ -e {code} ]; then status=$(cat {code}); rm -f {code}; fi\n" in text
    for fixed in (
        script(make_request, nodes=4, min_nodes=4),
        script(make_request, nodes=4, min_nodes=2, slurm={"options": {"no-kill": False}}),
        script(make_request, nodes=4, min_nodes=2, slurm={"container": {"image": "reg/zf:1"}}),
    ):
        assert "no-kill" not in fixed
        assert "--kill-on-bad-exit=1" in fixed
        assert "exit_code" not in fixed


def test_memory_of_the_workers_and_of_ray(make_request):
    request = replace(make_request(), memory_per_node=3 * 2**30 + 1)
    assert "#SBATCH --mem=4097M\n" in SlurmBackend().render(request)


def test_an_option_that_is_false_is_left_out(make_request):
    found = directives(
        script(make_request, slurm={"options": {"requeue": False, "no-kill": True, "spread-job": False}})
    )
    assert "requeue" not in found
    assert "spread-job" not in found
    assert found["no-kill"] == ""


def test_gpus_by_gres_are_not_asked_for_twice(make_request):
    found = directives(script(make_request, gpus_per_node=8, slurm={"gres": "gpu:a100:8"}))
    assert found["gres"] == "gpu:a100:8"
    assert "gpus-per-node" not in found


def test_a_time_limit_that_is_all_spent_on_saving_is_refused(make_request):
    text = "save_before_end_seconds is 300, and Slurm may warn 60 s earlier, but slurm.time_limit 6 is all the time"
    with pytest.raises(BackendError, match=text):
        script(make_request, slurm={"time_limit": "6"})
    assert "#SBATCH --time=7\n" in script(make_request, slurm={"time_limit": "7"})


def test_containers(make_request):
    image = {"image": "reg/zf:1", "mounts": ["/shared:/shared", "/data:/data"], "arguments": ["--nv"]}
    pyxis = script(make_request, slurm={"container": {**image, "arguments": ["--container-writable"]}})
    command = next(line for line in pyxis.splitlines() if line.startswith("srun"))
    assert "--container-image=reg/zf:1 --container-mounts=/shared:/shared,/data:/data --container-writable" in command
    assert " python3 -P -u -m submitit.core._submit /shared" in command
    apptainer = script(make_request, slurm={"container": {**image, "runtime": "apptainer"}})
    command = next(line for line in apptainer.splitlines() if line.startswith("srun"))
    assert (
        " apptainer exec --bind /shared:/shared --bind /data:/data --nv reg/zf:1 python3 -P -u -m submitit" in command
    )


def test_no_secret_of_the_profile_is_in_the_script(make_request):
    assert "hunter2" not in script(make_request, environment={"WANDB_API_KEY": "hunter2"})


@pytest.mark.parametrize("name", ["100%j", "line\nbreak", "back\\slash"])
def test_paths_that_slurm_cannot_write_to_are_refused_before_anything_is_sent(make_request, tmp_path, name):
    request = make_request(run_directory=tmp_path / name)
    with pytest.raises(BackendError, match="Slurm cannot write logs into a path that holds"):
        SlurmBackend().submit(request)
    assert not request.job_directory.exists()


def test_sbatch_gets_the_script_of_the_dry_run_and_a_task_that_is_plain_data(
    make_request, fake_command, tmp_path, monkeypatch
):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    fake_command("sbatch", f'cp "$1" {tmp_path}/sent.sh; env > {tmp_path}/environment; echo Submitted batch job 4711')
    request = make_request(run_directory=tmp_path / 'it\'s a "run"', environment={"HF_TOKEN": "hunter2"})
    shown = SlurmBackend().render(request)
    assert SlurmBackend().submit(request).backend_id == "4711"
    assert (tmp_path / "sent.sh").read_bytes() == shown.encode()
    pickled = (request.job_directory / "4711_submitted.pkl").read_bytes()
    assert b"slurm_task" in pickled
    assert len(pickled) < 1000, "the task must travel by name, not by value"
    spec = request.job_directory / "spec.json"
    assert spec.stat().st_mode & 0o777 == 0o600
    assert json.loads(spec.read_text())["secret_names"] == ["HF_TOKEN"]
    assert not [path for path in request.run_directory.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert "HF_TOKEN=hunter2" in (tmp_path / "environment").read_text().splitlines(), "Slurm hands it on to the job"
    assert "HF_TOKEN" not in os.environ


def test_every_task_of_an_array_finds_the_submission(make_request, fake_command):
    fake_command("sbatch", "echo Submitted batch job 4711")
    request = make_request(slurm={"options": {"array": "1-5:2,9%1"}})
    SlurmBackend().submit(request)
    links = sorted(path.name for path in request.job_directory.glob("4711_*_submitted.pkl"))
    assert links == [f"4711_{task}_submitted.pkl" for task in (1, 3, 5, 9)]
    assert all((request.job_directory / name).read_bytes() for name in links)


def test_a_refusal_is_passed_on_with_what_was_sent_and_leaves_nothing(make_request, fake_command):
    fake_command("sbatch", "echo 'sbatch: error: invalid partition specified: gpux' >&2; exit 1")
    request = make_request(slurm={"partition": "gpux"})
    with pytest.raises(BackendError) as caught:
        SlurmBackend().submit(request)
    assert "sbatch refused the job: error: invalid partition specified: gpux\nIt was sent:\n#!/bin/bash" in str(
        caught.value
    )
    assert "#SBATCH --partition=gpux" in str(caught.value)
    assert not request.job_directory.exists()


def test_an_answer_that_nobody_understands_is_passed_on(make_request, fake_command):
    fake_command("sbatch", "echo all is well")
    with pytest.raises(BackendError, match="Could not make sense of sbatch output"):
        SlurmBackend().submit(make_request())


def test_without_sbatch(make_request, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match="sbatch is not installed here"):
        SlurmBackend().submit(make_request())

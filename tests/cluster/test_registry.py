"""The registry: facts that any number of processes write and read, found again by what a person types."""

import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cluster import registry
from cluster.errors import JobLookupError


def test_a_record_comes_back_as_it_was_and_only_its_owner_reads_it(state_home: Path, make_record):
    record = make_record(
        facts={"hosts": ["a", "b"]}, argv=("python", "two words", "line\nbreak", "it's"), sweep="ab12", point=("a=1",)
    )
    registry.add(record)
    assert registry.records() == [record]
    for path in (state_home / "bakemotu.json", Path(record.job_directory) / "record.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(state_home.stat().st_mode) == 0o700
    assert sorted(path.name for path in state_home.iterdir()) == ["bakemotu.json"]


def test_a_job_is_found_by_id_unique_beginning_backend_id_and_run_directory(
    state_home: Path, make_record, tmp_path: Path
):
    first = make_record(id="bakemotu", backend_id="77", submitted=1.0)
    second = make_record(id="bakolina", backend_id="78", submitted=2.0, run_directory=tmp_path / "other")
    third = make_record(id="dusatiro", backend_id="79", submitted=3.0, job_directory=tmp_path / "run" / "jobs" / "0002")
    for record in (first, second, third):
        registry.add(record)
    assert registry.find("bakemotu") == first
    assert registry.find("bakol") == second
    assert registry.find("79") == third
    assert registry.find("run", tmp_path / "run" / "jobs") == third, "the newest of the run"
    with pytest.raises(JobLookupError, match=r"bak is the beginning of 2 job ids: bakemotu \(gpt, .* ago\), bakolina"):
        registry.find("bak")
    with pytest.raises(JobLookupError, match=r"no job 'zz': .*; the newest are dusatiro"):
        registry.find("zz")
    with pytest.raises(JobLookupError, match=r"no job ''"):
        registry.find("")


def test_without_any_job_it_says_so(state_home: Path, tmp_path: Path):
    with pytest.raises(JobLookupError, match="none was submitted yet"):
        registry.find("bakemotu")
    (tmp_path / "run").mkdir()
    with pytest.raises(JobLookupError, match="has no job: nothing was submitted for it"):
        registry.find("run", tmp_path / "run" / "jobs")


def test_a_lost_record_is_adopted_by_the_run_directory_even_when_that_was_moved(
    state_home: Path, make_record, tmp_path
):
    record = make_record()
    registry.add(record)
    (state_home / "bakemotu.json").unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    adopted = registry.find("moved", tmp_path / "moved" / "jobs")
    assert adopted == replace(
        record, run_directory=str(tmp_path / "moved"), job_directory=str(tmp_path / "moved" / "jobs" / "0001")
    )
    assert registry.find("bakemotu") == adopted, "it is in the registry again"


def test_a_run_that_was_copied_has_no_job_of_the_first_one(state_home: Path, make_record, tmp_path: Path):
    registry.add(make_record())
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(JobLookupError, match="copy has no job: nothing was submitted for it"):
        registry.find("copy", tmp_path / "copy" / "jobs")
    assert registry.of_run(tmp_path / "copy" / "jobs") == []
    assert [record.id for record in registry.of_run(tmp_path / "run" / "jobs")] == ["bakemotu"]


@pytest.mark.skipif(os.getuid() != 0, reason="hardware: only root can give a file to somebody else")
def test_a_record_that_somebody_else_wrote_is_not_adopted(state_home: Path, make_record, tmp_path: Path):
    registry.add(make_record())
    (state_home / "bakemotu.json").unlink()
    os.chown(tmp_path / "run" / "jobs" / "0001" / "record.json", 65534, 65534)
    with pytest.raises(JobLookupError):
        registry.find("run", tmp_path / "run" / "jobs")


def test_an_id_is_given_once(state_home: Path, make_record):
    registry.add(make_record())
    with pytest.raises(FileExistsError):
        registry.add(make_record(name="another"))
    assert [record.name for record in registry.records()] == ["gpt"]


def test_what_is_no_record_is_passed_over(state_home: Path, make_record):
    registry.add(make_record())
    (state_home / "half.json").write_text('{"id": "half", "na')
    (state_home / "list.json").write_text("[]")
    (state_home / "newer.json").write_text(json.dumps({"id": "newer", "invented_later": 1}))
    (state_home / ".new-x").write_text("{}")
    assert [record.id for record in registry.records()] == ["bakemotu"]


WRITER = """
import json, sys
from dataclasses import asdict, replace
from cluster import registry
from cluster.types import JobRecord
values = json.loads(sys.argv[1])
record = JobRecord(**{**values, "argv": tuple(values["argv"])})
for _ in range(25):
    new = replace(record, id=registry.new_id())
    registry.add(new)
    assert new.id in {known.id for known in registry.records()}
    print(new.id)
"""


def test_several_writers_lose_nothing(state_home: Path, make_record):
    command = [sys.executable, "-c", WRITER, json.dumps(asdict(make_record()))]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    written = [line for writer in writers for line in writer.communicate(timeout=60)[0].split()]
    assert all(writer.returncode == 0 for writer in writers)
    assert len(set(written)) == 100
    assert {record.id for record in registry.records()} == set(written)


def test_ids_are_words_that_are_never_numbers():
    ids = {registry.new_id() for _ in range(200)}
    assert len(ids) == 200
    assert all(len(job_id) == 8 and job_id.isalpha() and job_id.islower() for job_id in ids)


def test_one_job_is_found_among_a_thousand(state_home: Path, make_record):
    record = make_record()
    state_home.mkdir(parents=True)
    for index in range(1000):
        text = json.dumps({**vars(record), "id": f"job{index:05d}", "submitted": float(index)})
        (state_home / f"job{index:05d}.json").write_text(text)
    assert registry.find("job00777").submitted == 777.0


def test_job_directories_are_numbered(tmp_path: Path):
    jobs = tmp_path / "jobs"
    assert registry.new_job_directory(jobs).name == "0001"
    for name in ("0001", "0007", "notes"):
        (jobs / name).mkdir(parents=True)
    assert registry.new_job_directory(jobs).name == "0008"

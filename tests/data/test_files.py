import os
from pathlib import Path

import pytest

from launcher.data.files import find_files, index_path, scan_files

LONG_AGO_NS = 1_000_000_000 * 10**9


def write(path: Path, content: bytes = b"text") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return str(path)


def test_a_double_star_crosses_folders_and_the_result_is_sorted(tmp_path: Path) -> None:
    files = [write(tmp_path / name) for name in ("a/b/c.txt", "a/d.txt", "e.txt")]
    write(tmp_path / "a/other.md")
    write(tmp_path / ".hidden.txt")
    assert find_files([f"{tmp_path}/**/*.txt"], []) == (sorted(files), [])
    assert find_files([f"{tmp_path}/*.txt", f"{tmp_path}/e.txt"], []) == ([files[2]], [])


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("**/test/**", ["keep.py", "testing/keep.py", "x/latest/keep.py"]),
        ("test/**", ["keep.py", "testing/keep.py", "x/latest/keep.py"]),
        ("**/keep.py", ["test/a.py", "x/test/y/b.py"]),
        ("keep.py", ["test/a.py", "x/test/y/b.py"]),
        ("**/[a-b].py", ["keep.py", "testing/keep.py", "x/latest/keep.py"]),
        ("**/[!k]*.py", ["keep.py", "testing/keep.py", "x/latest/keep.py"]),
        ("**/test/?.py", ["keep.py", "testing/keep.py", "x/latest/keep.py", "x/test/y/b.py"]),
        ("/elsewhere/**", ["keep.py", "test/a.py", "testing/keep.py", "x/latest/keep.py", "x/test/y/b.py"]),
    ],
)
def test_exclude_is_matched_against_the_whole_path(tmp_path: Path, exclude: str, left: list[str]) -> None:
    for name in ("keep.py", "test/a.py", "testing/keep.py", "x/latest/keep.py", "x/test/y/b.py"):
        write(tmp_path / name)
    found, problems = find_files([f"{tmp_path}/**/*.py"], [exclude])
    assert [str(Path(path).relative_to(tmp_path)) for path in found] == left
    assert problems == []


def test_brackets_in_a_folder_name_can_be_excluded_by_their_escaped_form(tmp_path: Path) -> None:
    write(tmp_path / "a[1]" / "x.txt")
    found, problems = find_files([f"{tmp_path}/a[[]1]/*.txt"], [f"{tmp_path}/a[[]1]/**"])
    assert found == []
    assert problems == ["exclude leaves out all 1 matches"]


def test_everything_wrong_with_the_patterns_is_said_at_once(tmp_path: Path) -> None:
    write(tmp_path / "folder" / "x.txt")
    patterns = [f"{tmp_path}/none*.txt", f"{tmp_path}/missing.txt", f"{tmp_path}/folder"]
    found, problems = find_files(patterns, [])
    assert found == []
    assert problems == [
        f"{tmp_path}/none*.txt matches no file",
        f"there is no file {tmp_path}/missing.txt",
        f"{tmp_path}/folder is a folder; write {tmp_path}/folder/** for all the files in it",
    ]
    assert find_files([f"{tmp_path}/fold*"], []) == ([], [f"{tmp_path}/fold* match folders only"])


def test_a_file_is_read_again_only_when_its_size_or_time_changes(tmp_path: Path) -> None:
    index = tmp_path / "index.json"
    path = write(tmp_path / "a.txt", b"one")
    (first,), _ = scan_files([path], index)
    write(tmp_path / "a.txt", b"two")  # same size, same time: what the index cannot see shows that it was not read
    (second,), _ = scan_files([path], index)
    assert second == first
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS + 1))
    (third,), _ = scan_files([path], index)
    assert third.digest != first.digest


def test_a_file_that_has_just_changed_is_not_trusted_next_time(tmp_path: Path) -> None:
    index = tmp_path / "index.json"
    path = tmp_path / "a.txt"
    path.write_bytes(b"one")
    status = path.stat()
    (first,), _ = scan_files([str(path)], index)
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    (second,), _ = scan_files([str(path)], index)
    assert second.digest != first.digest


@pytest.mark.parametrize("content", [b"[]", b"{", b'[["a", 1]]', b"[[1, 2, 3, 4, 5]]", b"\xff"])
def test_a_damaged_index_costs_time_only(tmp_path: Path, content: bytes) -> None:
    index = tmp_path / "index.json"
    path = write(tmp_path / "a.txt")
    expected = scan_files([path], index)
    index.write_bytes(content)
    assert scan_files([path], index) == expected


@pytest.mark.parametrize(
    ("content", "is_utf8"),
    [
        ("naïve".encode(), True),
        ("naïve".encode("latin-1"), False),
        (b"cut off \xc3", False),
        (b"", True),
        (b"\x1f\x8b\x08\x00\xff\xff", True),
    ],
)
def test_files_that_are_not_utf8_are_known(tmp_path: Path, content: bytes, is_utf8: bool) -> None:
    (facts,), problems = scan_files([write(tmp_path / "a", content)], tmp_path / "index.json")
    assert facts.is_utf8 is is_utf8
    assert facts.size == len(content)
    assert problems == []


def test_a_file_that_is_gone_is_a_problem_and_no_longer_current(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt")
    (facts,), _ = scan_files([path], tmp_path / "index.json")
    assert facts.is_current()
    Path(path).unlink()
    assert not facts.is_current()
    assert scan_files([path], tmp_path / "index.json") == ([], [f"{path} cannot be read: No such file or directory"])


def test_each_source_has_an_index_of_its_own(tmp_path: Path) -> None:
    assert index_path(tmp_path, ["a", "b"], []) == index_path(tmp_path, ["b", "a"], [])
    assert index_path(tmp_path, ["a"], []) != index_path(tmp_path, ["a"], ["b"])

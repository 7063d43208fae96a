from __future__ import annotations

import errno
import itertools
import json
import os
import tracemalloc
from pathlib import Path

import click
import pytest

from hashlens.cli.problems import LISTED_PROBLEMS, Problem, reporting
from hashlens.cli.scan import Selection, count_below, found_below
from hashlens.cli.shard import Shard, ShardType
from hashlens.errors import InvalidInputError

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def test_every_path_is_in_exactly_one_shard() -> None:
    paths = [f"album/{n}.jpg" for n in range(3000)]
    for count in (1, 2, 3, 7):
        shares = [[p for p in paths if Shard(i, count).has(p)] for i in range(count)]
        assert sorted(itertools.chain(*shares)) == sorted(paths)
        assert all(0.8 < len(share) * count / len(paths) < 1.2 for share in shares)


def test_a_shard_is_the_same_everywhere() -> None:
    # Runs of different versions must agree: these are for ever.
    known = {"a.jpg": 0, "album 1/001.jpg": 0, "東京.png": 1, "caf\udce9.jpg": 0}
    assert {path: [Shard(i, 3).has(path) for i in range(3)].index(True) for path in known} == known


@pytest.mark.parametrize("text", ["", "1", "3/3", "-1/3", "1/0", "1/x", "0/3/1", "1 / 3"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(click.BadParameter):
        ShardType().convert(text, None, None)


def test_a_shard_as_text() -> None:
    assert ShardType().convert("2/3", None, None) == Shard(2, 3)
    assert str(Shard(2, 3)) == "2/3"


def test_shards_of_a_folder_and_ids_that_any_mount_has(tmp_path: Path) -> None:
    names = [f"{n % 5}/{n}.png" for n in range(40)]
    ids = []
    for mount in ("here", "there"):
        folder = tmp_path / mount
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(PNG)
        (folder / "empty.png").touch()
        (folder / "link").symlink_to(folder)
        problems: list[Problem] = []
        shares = []
        for index in range(3):
            wanted = Selection(
                folder=folder, max_image_bytes=100, shard=Shard(index, 3), relative_ids=True
            )
            before = len(problems)
            found = list(found_below(wanted, problems.append))
            assert all(file.path == f"{folder}/{file.id}" for file in found)
            shares.append(sorted(file.id for file in found))
            n_images = len([p for p in problems[before:] if p.path.endswith(".png")])
            assert count_below(wanted, lambda: None) == len(found) + n_images
        assert sorted(itertools.chain(*shares)) == sorted(names)
        assert sorted(Path(p.path).name for p in problems) == ["empty.png", "link"]
        ids.append(shares)
    assert ids[0] == ids[1]


def test_a_large_folder_is_not_held_in_memory(tmp_path: Path) -> None:
    n_files = 4000
    for n in range(n_files):
        (tmp_path / f"{n}.png").touch()
    os.truncate(tmp_path / "0.png", 100)
    wanted = Selection(folder=tmp_path, max_image_bytes=10)
    n_problems = 0

    def note(problem: Problem) -> None:
        nonlocal n_problems
        n_problems += 1

    tracemalloc.start()
    try:
        assert sum(1 for _ in found_below(wanted, note)) == 0
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n_problems == n_files
    # Names alone would be more: 50 bytes each.
    assert peak_bytes < 100_000


def test_a_relative_id_may_be_short_where_the_path_is_long(tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["d" * 200] * 6)
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(PNG)
    for relative, n_found in ((False, 0), (True, 1)):
        wanted = Selection(folder=folder, max_image_bytes=100, relative_ids=relative)
        assert len(list(found_below(wanted, lambda problem: None))) == n_found


def test_a_report_has_all_and_memory_some(tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    n = LISTED_PROBLEMS + 50
    with reporting(Path("/pictures"), report) as problems:
        for i in range(n):
            problems.add(Problem(f"/pictures/{i}.jpg", "broken"))
        problems.add(Problem("/pictures/caf\udce9\n.jpg", "its name"))
        assert not report.exists()
    assert problems.count == n + 1
    assert len(problems.kept) == LISTED_PROBLEMS
    lines = [json.loads(line) for line in report.read_text("ascii").splitlines()]
    assert len(lines) == n + 1
    assert lines[7] == {"path": "7.jpg", "reason": "broken"}
    assert lines[-1]["path"] == "caf\udce9\n.jpg"

    with reporting(Path("/pictures"), report):
        pass
    assert report.read_text() == ""
    assert os.listdir(tmp_path) == ["report.jsonl"]  # noqa: PTH208 - hidden ones as well


def test_a_run_that_fails_leaves_the_report_of_the_one_before(tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    report.write_text("before\n")

    def run() -> None:
        with reporting(tmp_path, report) as problems:
            problems.add(Problem("a", "b"))
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert report.read_text() == "before\n"
    assert os.listdir(tmp_path) == ["report.jsonl"]  # noqa: PTH208


def enter(report: Path) -> None:
    with reporting(Path("/pictures"), report):
        raise AssertionError("a run has begun whose report cannot be written")


@pytest.mark.parametrize("folder", ["missing", "file", "n" * 300])
def test_a_report_that_cannot_be_written_is_found_out_first(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    report = tmp_path / folder / "report.jsonl"
    with pytest.raises(InvalidInputError, match="cannot be written") as caught:
        enter(report)
    assert str(report) in caught.value.message
    assert caught.value.field == "--report"


# Root may write everywhere: the answer of the file system is put in its place.
@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS])
def test_a_report_in_a_folder_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(reason, os.strerror(reason), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InvalidInputError, match=os.strerror(reason)):
        enter(tmp_path / "report.jsonl")


def test_another_try_may_write_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        enter(tmp_path / "report.jsonl")


def test_without_a_report_all_are_kept() -> None:
    with reporting(Path("/"), None) as problems:
        for i in range(LISTED_PROBLEMS + 1):
            problems.add(Problem(f"/{i}", "broken"))
    assert len(problems.kept) == problems.count == LISTED_PROBLEMS + 1

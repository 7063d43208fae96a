from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

from hashlens.cli.scan import Scan, scan

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def write(path: Path, data: bytes = PNG) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def names(found: Scan, root: Path) -> list[str]:
    return [str(Path(file.path).relative_to(root)) for file in found.files]


def problems(found: Scan, root: Path) -> dict[str, str]:
    return {os.path.relpath(problem.path, root): problem.reason for problem in found.problems}


def test_images_are_found_in_the_order_of_names(tmp_path: Path) -> None:
    paths = ["a.jpg", "b/c.PNG", "b/d/e.webp", "b/d/f.tiff", "z.gif", "ümlaut.bmp"]
    random.Random(1).shuffle(paths)
    for path in paths:
        write(tmp_path / path)
    for other in ("notes.txt", "movie.mp4", "b/d/.hidden.jpg", ".trash/a.jpg"):
        write(tmp_path / other)
    counts: list[int] = []
    found = scan(tmp_path, 1000, lambda: counts.append(1))
    assert names(found, tmp_path) == [
        "a.jpg", "z.gif", "ümlaut.bmp", "b/c.PNG", "b/d/e.webp", "b/d/f.tiff",
    ]  # fmt: skip
    assert found.problems == []
    assert sum(counts) == 6
    status = (tmp_path / "a.jpg").stat()
    assert (found.files[0].size, found.files[0].mtime_ns) == (status.st_size, status.st_mtime_ns)


def test_files_without_extension_are_looked_into(tmp_path: Path) -> None:
    write(tmp_path / "IMG_0001")
    write(tmp_path / "webp", b"RIFF\0\0\0\0WEBPVP8 ")
    write(tmp_path / "wave", b"RIFF\0\0\0\0WAVEfmt ")
    write(tmp_path / "README", b"hello")
    write(tmp_path / "empty", b"")
    found = scan(tmp_path, 1000)
    assert names(found, tmp_path) == ["IMG_0001", "webp"]
    assert found.problems == []


def test_sizes_that_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "empty.jpg", b"")
    write(tmp_path / "fits.jpg", bytes(1000))
    huge = write(tmp_path / "huge.jpg")
    os.truncate(huge, 2**40)
    found = scan(tmp_path, 1000)
    assert names(found, tmp_path) == ["fits.jpg"]
    reasons = problems(found, tmp_path)
    assert reasons["empty.jpg"] == "empty"
    assert "above the encoder's limit of 1,000" in reasons["huge.jpg"]


def test_links(tmp_path: Path) -> None:
    write(tmp_path / "real" / "a.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "real" / "a.jpg")
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "none")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    found = scan(tmp_path, 1000)
    assert names(found, tmp_path) == ["link.jpg", "real/a.jpg"]
    reasons = problems(found, tmp_path)
    assert reasons["broken.jpg"] == "No such file or directory"
    assert "symbolic links" in reasons["self.jpg"]
    assert "a link to a folder" in reasons["real/loop"]


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "pipe")
    found = scan(tmp_path, 1000)
    assert found.files == []
    assert problems(found, tmp_path) == {"pipe.jpg": "not a regular file"}


def test_names_that_cannot_be_ids(tmp_path: Path) -> None:
    write(tmp_path / "two\nlines.jpg")
    deep = tmp_path.joinpath(*["d" * 200] * 6)
    write(deep / "long.jpg")
    expected = {"two\nlines.jpg": "control characters"}
    if sys.platform == "linux":
        write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")))
        expected["caf\udce9.jpg"] = "not UTF-8"
    found = scan(tmp_path, 1000)
    assert found.files == []
    reasons = problems(found, tmp_path)
    for name, reason in expected.items():
        assert reason in reasons[name]
    assert "1024" in reasons[str((deep / "long.jpg").relative_to(tmp_path))]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    closed = tmp_path / "closed"
    write(closed / "b.jpg")
    closed.chmod(0)
    try:
        found = scan(tmp_path, 1000)
    finally:
        closed.chmod(0o700)
    assert names(found, tmp_path) == ["a.jpg"]
    assert "Permission denied" in problems(found, tmp_path)["closed"]


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    found = scan(tmp_path / "none", 1000)
    assert "No such file" in found.problems[0].reason

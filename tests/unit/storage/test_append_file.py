from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashlens.errors import DataLossError
from search_service.storage.append_file import AppendFile
from search_service.storage.manifest import FileState


def test_appended_bytes_count_when_committed(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "f")
    file.append(b"abc")
    file.append(b"de")
    assert file.length == 0
    file.commit()
    assert file.state == FileState(5, zlib.crc32(b"abcde"))
    file.append(b"lost")
    file.rollback()
    file.append(b"fg")
    file.commit()
    assert bytes(file.view()[:7]) == b"abcdefg"
    assert file.state == FileState(7, zlib.crc32(b"abcdefg"))
    file.close()


@given(chunks=st.lists(st.binary(max_size=200_000), max_size=6))
def test_a_file_reopens_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("file") / "f"
    file = AppendFile(path)
    for chunk in chunks:
        file.append(chunk)
        file.commit()
    file.append(b"not committed")
    file.sync()
    state = file.state
    file.close()
    again = AppendFile(path, state)
    data = b"".join(chunks)
    assert path.stat().st_size == len(data)
    assert again.state == state
    again.append(b"more")
    again.commit()
    assert bytes(again.view()[: again.length]) == data + b"more"
    again.close()


def test_a_view_cannot_be_written_through_and_outlives_the_file(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "f")
    file.append(b"abc")
    file.commit()
    view = file.view()[:3]
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    file.append(b"x" * 1_000_000)
    file.commit()
    assert file.view() is not view.base
    file.close()
    os.truncate(tmp_path / "f", file.length)
    (tmp_path / "f").unlink()
    assert bytes(view) == b"abc"


def test_a_mapping_stays_within_what_is_allocated(tmp_path: Path) -> None:
    path = tmp_path / "f"
    file = AppendFile(path)
    for n in (1, 70_000, 300_000):
        file.append(b"x" * n)
        file.commit()
        status = path.stat()
        assert len(file.view()) == status.st_size
        # Allocated, not sparse: writing into it cannot run out of disk.
        assert status.st_blocks * 512 >= status.st_size
    file.close()


def test_a_limit_is_never_exceeded(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "f", limit_bytes=5000, checksummed=False)
    file.append(b"x" * 1000)
    file.commit()
    assert not file.is_full
    assert (tmp_path / "f").stat().st_size == 5000
    file.append(b"x" * 4000)
    file.commit()
    assert file.is_full
    assert (tmp_path / "f").stat().st_size == 5000
    file.close()


def test_a_file_cut_behind_our_back_is_not_mapped(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "f")
    file.append(b"x" * 100_000)
    file.commit()
    os.truncate(tmp_path / "f", 50_000)
    with pytest.raises(DataLossError, match="50000"):
        file.view()
    file.close()


@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_damage_is_noticed_and_nothing_is_changed(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "f"
    file = AppendFile(path)
    file.append(b"x" * 10_000)
    file.commit()
    state = file.state
    file.close()
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        os.truncate(path, 9_999)
    else:
        with path.open("r+b") as handle:
            handle.seek(5_000)
            handle.write(b"y")
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(DataLossError):
        AppendFile(path, state)
    assert (path.read_bytes() if path.exists() else None) == before


FULL_DISK = """
import resource, sys
from pathlib import Path
from search_service.storage.append_file import AppendFile
file = AppendFile(Path(sys.argv[1]))
file.append(b"a" * 1000)
file.commit()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for size in (200_000, 99_001):
    try:
        file.append(b"b" * size)
        sys.exit("it fitted")
    except OSError:
        file.rollback()
file.append(b"c" * 99_000)
file.commit()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.append(b"d" * 99_000)
file.commit()
assert bytes(file.view()[: file.length]) == b"a" * 1000 + b"c" * 99_000 + b"d" * 99_000
"""


def test_a_full_disk_is_an_error_and_no_signal(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path / "f"], check=True, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about its mappings")
def test_nothing_is_read_around_what_is_read_here_and_there(tmp_path: Path) -> None:
    for random_access in (False, True):
        file = AppendFile(tmp_path / f"x{random_access}", random_access=random_access)
        file.append(b"abc")
        file.commit()
        view = file.view()
        maps = Path("/proc/self/smaps").read_text().split(str(file.path))[1]
        flags = next(line for line in maps.splitlines() if line.startswith("VmFlags:"))
        assert ("rr" in flags.split()) == random_access
        assert bytes(view[:3]) == b"abc"
        file.close()

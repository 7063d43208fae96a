"""The file that an interrupted training goes on from."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from encoder_service.training.state import load_state, save_state, state_path
from hashlens.errors import InvalidInputError

FINGERPRINT = {"recipe": "orthohash", "n_bits": 48, "classes": ["a", "b"], "learning_rate": 0.2}
STATE = {
    "fingerprint": FINGERPRINT,
    "trainer": {"step": 3, "best": None, "network": {"weight": torch.arange(5000.0)}},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = state_path(tmp_path / "model.safetensors")
    save_state(STATE, path)
    return path


def test_it_lies_beside_the_checkpoint() -> None:
    assert state_path(Path("x/model.safetensors")) == Path("x/model.safetensors.state")


def test_round_trip(path: Path) -> None:
    state = load_state(path, FINGERPRINT)
    assert state is not None
    assert state["trainer"]["step"] == 3
    assert state["trainer"]["best"] is None
    assert torch.equal(state["trainer"]["network"]["weight"], torch.arange(5000.0))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_none_is_no_error(tmp_path: Path) -> None:
    assert load_state(tmp_path / "none", FINGERPRINT) is None


def test_another_training_is_named(path: Path) -> None:
    other = {**FINGERPRINT, "n_bits": 12, "classes": ["a", "c"]}
    with pytest.raises(InvalidInputError) as caught:
        load_state(path, other)
    message = caught.value.message
    assert "n_bits was 48 and is 12" in message
    assert "classes was ['a', 'b'] and is ['a', 'c']" in message
    assert "learning_rate" not in message
    assert "--no-resume" in message
    assert caught.value.field == "resume"


def cut(data: bytes, how: str) -> bytes:
    middle = len(data) // 2
    return {
        "empty": b"",
        "half": data[:middle],
        "tail missing": data[:-100],
        "one byte changed": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "zeros": bytes(len(data)),
        "text": b"this is no state\n" * 100,
    }[how]


@pytest.mark.parametrize(
    "how", ["empty", "half", "tail missing", "one byte changed", "zeros", "text"]
)
def test_a_damaged_file_is_refused(path: Path, how: str) -> None:
    path.write_bytes(cut(path.read_bytes(), how))
    with pytest.raises(InvalidInputError, match=r"cannot be read.*Use --no-resume") as caught:
        load_state(path, FINGERPRINT)
    assert caught.value.field == "resume"
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("content", [torch.zeros(3), {"version": 1}, [1, 2]])
def test_a_foreign_file_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "state")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load_state(tmp_path / "state", FINGERPRINT)


def test_another_version_is_refused(tmp_path: Path) -> None:
    torch.save({**STATE, "version": 99}, tmp_path / "state")
    with pytest.raises(InvalidInputError, match="has version 99, not 1"):
        load_state(tmp_path / "state", FINGERPRINT)


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code in the file was run')",))


def test_no_code_in_it_is_run(tmp_path: Path) -> None:
    torch.save({**STATE, "version": 1, "trainer": _Trap()}, tmp_path / "state")
    with pytest.raises(InvalidInputError, match="cannot be read") as caught:
        load_state(tmp_path / "state", FINGERPRINT)
    # torch's own message advises to run it.
    assert "weights_only" not in caught.value.message


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_state_before(path: Path) -> None:
    """A limit on the size of files stands for the disk's end."""
    before = path.read_bytes()
    with files_of_at_most(4096), pytest.raises(OSError, match="File too large") as caught:
        save_state(STATE, path)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="state"):
        save_state(STATE, tmp_path / "none" / "state")

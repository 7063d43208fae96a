"""What an interrupted training goes on from: one file, replaced in one step."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from hashlens.errors import InvalidInputError

STATE_VERSION = 1
"""Version of what is in the file."""


def state_path(output: Path) -> Path:
    """Return where the state of a training lies whose checkpoint will be `output`."""
    return output.with_name(output.name + ".state")


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a state; a crash leaves the one before.

    Parameters
    ----------
    state
        Tensors, numbers, text, and lists and dicts of those.
    path
        Where; replaced if it exists.

    Raises
    ------
    OSError
        The disk is full, or not writable. The state before is still there.
    """
    # In memory first: torch turns a full disk into an error of its own making.
    buffer = io.BytesIO()
    torch.save({"version": STATE_VERSION, **state}, buffer)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"the training's state: {error.strerror}", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def load_state(path: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read a state back.

    Parameters
    ----------
    path
        Where `save_state` wrote; only tensors and plain values are read, no code is run.
    fingerprint
        The recipe and the data, by name. A state of another training is not gone on from.

    Returns
    -------
    dict or None
        None if there is no file.

    Raises
    ------
    InvalidInputError
        The file is damaged, or of another training; the message says what differs.
    """
    if not path.exists():
        return None
    remedy = f"Use --no-resume to begin anew, or another --output; {path} is then replaced or kept."
    try:
        # torch does not look at the checksums.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        version, theirs = state["version"], state["fingerprint"]
    except (RuntimeError, LookupError, TypeError, UnpicklingError, zipfile.BadZipFile) as error:
        # What torch says of a foreign file would lead astray: to run the code in it.
        reason = str(error) if isinstance(error, zipfile.BadZipFile) else "it is no such file"
        raise InvalidInputError(
            f"{path}: the state of an earlier training cannot be read: {reason}. {remedy}",
            field="resume",
        ) from error
    if version != STATE_VERSION:
        raise InvalidInputError(
            f"{path}: the state of an earlier training has version {version}, not "
            f"{STATE_VERSION}. {remedy}",
            field="resume",
        )
    differing = [
        f"{name} was {theirs.get(name)!r} and is {value!r}"
        for name, value in fingerprint.items()
        if theirs.get(name) != value
    ]
    if differing:
        raise InvalidInputError(
            f"{path}: the state of another training: {'; '.join(differing)}. {remedy}",
            field="resume",
        )
    assert isinstance(state, dict)
    return state

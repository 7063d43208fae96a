"""The directory of one replica: one process at a time, under an id of its own; what comes and goes
in it does so whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from pathlib import Path

from hashlens.errors import PreconditionError
from search_service.storage.failpoints import reach
from search_service.storage.manifest import replace_file, sync_directory


def lock(directory: Path) -> int:
    """Take a data directory for this process; return the descriptor that holds it.

    Raises
    ------
    PreconditionError
        Another process has it.
    """
    descriptor = os.open(directory / "LOCK", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise PreconditionError(
            f"{directory} is in use by another process ({owner}). Stop it, or choose another data "
            "directory."
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def replica_id(directory: Path) -> str:
    """Return a data directory's own id, a UUID, making one where there is none."""
    path = directory / "replica_id"
    with contextlib.suppress(FileNotFoundError, ValueError):
        return str(uuid.UUID(path.read_text("utf-8").strip()))
    made = str(uuid.uuid4())
    replace_file(path, f"{made}\n".encode())
    return made


def discard(directory: Path) -> None:
    """Delete a directory so that a crash never leaves half of it under its name."""
    doomed = directory.with_name(f".trash-{uuid.uuid4().hex}")
    reach("drop.begin")
    directory.rename(doomed)
    reach("drop.files")
    shutil.rmtree(doomed)


def clean(parent: Path) -> None:
    """Delete what an interrupted `LocalCollection.create`, `lend` or `discard` left behind."""
    for pattern in (".new-*", ".trash-*", ".lease-*"):
        for path in parent.glob(pattern):
            shutil.rmtree(path)


def quarantine(directory: Path, quarantine_directory: Path) -> Path:
    """Put damaged files aside for a person to look at; return where they are."""
    quarantine_directory.mkdir(exist_ok=True)
    when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    aside = quarantine_directory / f"{directory.name}-{when}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    directory.rename(aside)
    sync_directory(directory.parent)
    return aside

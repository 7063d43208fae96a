"""Named places in the store where a test may let the process die, or a call fail.

Crash safety is a claim about every moment between two system calls. Each moment that matters has a
name here and a call of `reach` in the code; nothing happens there unless a test says so, by
`arm` or by the environment of a process of its own.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

VARIABLE: Final = "HASHLENS_FAILPOINTS"
"""``NAME=ACTION[@N[-M]]``, separated by commas; read when this module is imported. The action
happens from the Nth time on that the place is reached, by default the first, until the Mth if one
is given."""

NAMES: Final[frozenset[str]] = frozenset(
    {
        # One batch of the log.
        "append.begin",
        "append.features",
        "append.commit",
        "append.publish",
        # One checkpoint.
        "checkpoint.begin",
        "checkpoint.sync",
        "checkpoint.manifest",
        "checkpoint.rename",
        "checkpoint.trim",
        # A segment of features is full, and the next begins.
        "seal.segment",
        # The files are written anew without their dead rows.
        "compact.begin",
        "compact.copy",
        "compact.sync",
        "compact.manifest",
        "compact.switched",
        "compact.unlink",
        # Files are made anew from Redis.
        "rebuild.scan",
        "rebuild.write",
        "rebuild.rename",
        # Files are copied from another replica.
        "copy.begin",
        "copy.part",
        "copy.verify",
        "copy.rename",
        # A collection comes or goes.
        "create.manifest",
        "create.rename",
        "drop.begin",
        "drop.files",
        # A backup is made: a file of it is there; all are, but it is not said.
        "backup.file",
        "backup.finish",
        # A backup is restored: the files are copied, a part is in Redis, all is, all but the last
        # step is done.
        "restore.files",
        "restore.redis",
        "restore.rename",
        "restore.activate",
    }
)
"""All places. A test that names another fails at once."""

_EVER: Final = 1 << 62

ACTIONS: Final = ("kill", "enospc", "eio")
"""What can happen: the process dies as by ``kill -9``; the disk is full; the disk is broken."""


class _Armed:
    """What is to happen where, and how often each place was reached."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.actions: dict[str, tuple[str, int, int]] = {}
        self.reached: dict[str, int] = {}


_armed = _Armed()


def reach(name: str) -> None:
    """Do what is to happen at a place; in production, nothing."""
    if not _armed.actions:
        return
    with _armed.lock:
        action, first, last = _armed.actions.get(name, ("", 0, 0))
        _armed.reached[name] = n = _armed.reached.get(name, 0) + 1
    if not first <= n <= last:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    number = errno.ENOSPC if action == "enospc" else errno.EIO
    raise OSError(number, f"{os.strerror(number)} (failpoint {name})")


@contextmanager
def arm(name: str, action: str, first: int = 1, last: int = _EVER) -> Iterator[None]:
    """Let `action` happen at a place from the `first` to the `last` time that it is reached.

    Raises
    ------
    ValueError
        There is no such place or action.
    """
    _set(name, action, first, last)
    try:
        yield
    finally:
        with _armed.lock:
            del _armed.actions[name]


def _set(name: str, action: str, first: int, last: int) -> None:
    if name not in NAMES or action not in ACTIONS or not 1 <= first <= last:
        raise ValueError(f"no failpoint {name}={action}@{first}-{last}")
    with _armed.lock:
        _armed.reached.pop(name, None)
        _armed.actions[name] = (action, first, last)


def read(specification: str) -> None:
    """Arm what `VARIABLE` would, for the rest of this process; ValueError if it is odd."""
    for part in filter(None, specification.split(",")):
        name, _, rest = part.partition("=")
        action, _, times = rest.partition("@")
        first, _, last = times.partition("-")
        _set(name, action, int(first or 1), int(last or _EVER))


read(os.environ.get(VARIABLE, ""))

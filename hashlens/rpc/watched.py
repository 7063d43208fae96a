"""Small files that change while a process runs: certificates, keys, tokens."""

from __future__ import annotations

import logging
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar

from hashlens.errors import InvalidInputError

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_S: Final = 1.0
"""A change is seen after at most about this long, in seconds."""

_MAX_BYTES: Final = 4 << 20
_TRIES: Final = 3

_Contents = tuple[bytes, ...]


class Watched(Generic[T]):
    """What some files mean together, read again when any of them changes. Thread-safe.

    Nothing watches in the background: who asks looks, at most once every `LOOK_S`. Whole contents
    are compared, not times, so that a link that leads elsewhere and a file that is written in place
    are both seen. What is being written at the moment is left for the next look.

    Parameters
    ----------
    what
        For messages, such as ``the tokens``.
    paths
        The files.
    parse
        Takes their contents in that order, and says what they mean. Raises InvalidInputError with
        a message that repeats nothing of them: they are secret.

    Raises
    ------
    InvalidInputError
        A file cannot be read, or means nothing. Later on that is logged, once, and what the files
        meant before stays.
    """

    def __init__(self, what: str, paths: Sequence[Path], parse: Callable[..., T]) -> None:
        self._what = what
        self._paths = tuple(paths)
        self._parse = parse
        self._lock = threading.Lock()
        self._next_look_s = time.monotonic() + LOOK_S
        for _ in range(_TRIES):
            contents, problem = self._contents()
            if problem is None:
                try:
                    self._value = parse(*contents)
                except InvalidInputError as error:
                    problem = error
            if self._contents()[0] == contents:
                break
        if problem is not None:
            raise InvalidInputError(f"{what}: {problem.message}", field=problem.field)
        self._seen: tuple[_Contents, str] = (contents, "")

    @property
    def value(self) -> T:
        """What the files mean now, or did when they last meant something."""
        if time.monotonic() >= self._next_look_s:
            with self._lock:
                if time.monotonic() >= self._next_look_s:
                    self._look()
                    self._next_look_s = time.monotonic() + LOOK_S
        return self._value

    def _look(self) -> None:
        for _ in range(_TRIES):
            contents, problem = self._contents()
            seen = (contents, "" if problem is None else problem.message)
            if seen == self._seen:
                return
            value = None
            if problem is None:
                try:
                    value = self._parse(*contents)
                except InvalidInputError as error:
                    problem = error
            if self._contents()[0] != contents:
                continue  # It is being written.
            self._seen = seen
            if problem is not None:
                logger.error("%s: %s What was read before stays in use.", self._what, problem)
            else:
                assert value is not None
                self._value = value
                logger.info("%s: read again, it had changed", self._what)
            return

    def _contents(self) -> tuple[_Contents, InvalidInputError | None]:
        """Return the files' bytes; none, and why, if one cannot be read."""
        contents = []
        for path in self._paths:
            try:
                # Opening a pipe would wait, and one can be read only once.
                if not stat.S_ISREG(path.stat().st_mode):
                    return (), InvalidInputError(f"{path}: this is no regular file.")
                with path.open("rb") as file:
                    data = file.read(_MAX_BYTES + 1)
            except OSError as error:
                return (), InvalidInputError(f"{path}: cannot be read: {error.strerror}.")
            if len(data) > _MAX_BYTES:
                return (), InvalidInputError(f"{path}: longer than {_MAX_BYTES} bytes.")
            contents.append(data)
        return tuple(contents), None

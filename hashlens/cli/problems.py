"""What could not be indexed: counted, shown, and written to a report."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from hashlens.cli.text import reason_of
from hashlens.errors import InvalidInputError

LISTED_PROBLEMS = 100
"""Problems that are listed for people, and kept in memory where a report has them all."""

_LASTING = frozenset(
    [
        errno.EACCES,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    ]
)
"""Why a report cannot be written now, and could not be by another try."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something below the folder that could not be indexed."""

    path: str
    """Absolute."""
    reason: str


class Problems:
    """Those of a run.

    Parameters
    ----------
    root
        The folder, absolute.
    report
        Gets a line of JSON for each. None: all are kept.
    """

    def __init__(self, root: Path, report: TextIO | None = None) -> None:
        self.kept: list[Problem] = []
        """All, or the first `LISTED_PROBLEMS` where there is a report."""
        self.count = 0
        self._prefix = f"{str(root).rstrip('/')}/"
        self._report = report

    def add(self, problem: Problem) -> None:
        """Note one."""
        self.count += 1
        if self._report is None or len(self.kept) < LISTED_PROBLEMS:
            self.kept.append(problem)
        if self._report is not None:
            path = problem.path.removeprefix(self._prefix)
            # Escaped, so that names which are no UTF-8 are valid JSON, too.
            self._report.write(json.dumps({"path": path, "reason": problem.reason}) + "\n")


@contextmanager
def reporting(root: Path, path: Path | None) -> Iterator[Problems]:
    """Collect problems; a report is put in its place when all are known, in one step.

    What ends before leaves the report of an earlier run as it was.

    Raises
    ------
    InvalidInputError
        A report cannot be written there; raised before anything is collected.
    """
    if path is None:
        yield Problems(root)
        return
    beside = path.with_name(f".{path.name}.part")
    try:
        file = beside.open("w", encoding="ascii")
    except OSError as error:
        if error.errno not in _LASTING:
            raise
        raise InvalidInputError(
            f"{path} cannot be written: {reason_of(error)}. Its folder has to be there, and this "
            "user has to be able to make files in it.",
            field="--report",
        ) from error
    try:
        with file:
            yield Problems(root, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise

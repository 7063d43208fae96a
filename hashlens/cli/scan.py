"""A folder's images: found, and where they cannot be used, told why."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hashlens.cli.problems import Problem
from hashlens.cli.shard import Shard
from hashlens.cli.text import reason_of
from hashlens.convert.collection import check_id
from hashlens.errors import InvalidInputError

EXTENSIONS = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"]
)
"""What a file is taken for an image by. One without any extension is looked into."""

_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file to index."""

    path: str
    """Absolute."""
    id: str
    """Valid UTF-8."""
    size: int
    """Bytes."""
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Scan:
    """What was found below a folder."""

    files: list[ImageFile]
    problems: list[Problem]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which images of a folder are wanted, and what they are called."""

    folder: Path
    """Absolute."""
    max_image_bytes: int
    """Larger files are problems."""
    shard: Shard = Shard()
    relative_ids: bool = False
    """An image's id is its path below the folder, not the absolute one."""

    @property
    def prefix(self) -> str:
        """What the paths of all that is below the folder begin with."""
        return f"{str(self.folder).rstrip('/')}/"


def scan(folder: Path, max_image_bytes: int, on_found: Callable[[], None] = lambda: None) -> Scan:
    """Find the images below a folder, in the order of names; see `found_below`.

    Parameters
    ----------
    folder
        Absolute.
    max_image_bytes
        Larger files are problems.
    on_found
        Called for each image.
    """
    found = Scan([], [])
    wanted = Selection(folder=folder, max_image_bytes=max_image_bytes)
    for image in found_below(wanted, found.problems.append):
        found.files.append(image)
        on_found()
    found.files.sort(key=_by_name)
    return found


def found_below(wanted: Selection, on_problem: Callable[[Problem], None]) -> Iterator[ImageFile]:
    """Yield images of a folder, without reading more than a few bytes of any.

    What a leading dot hides is left out: thumbnails, trash, a Mac's resource forks. Links to files
    are followed, links to folders are not: so there are no loops. The order is the file system's:
    what is in memory grows with the number of folders, not with that of files.
    """

    def report(problem: Problem) -> None:
        # Every run walks through all folders: one of them speaks of each problem.
        if wanted.shard.has(problem.path.removeprefix(wanted.prefix)):
            on_problem(problem)

    for entry in _walk(str(wanted.folder), report):
        if not wanted.shard.has(entry.path.removeprefix(wanted.prefix)):
            continue
        image, reason = _classify(entry, wanted)
        if image is not None:
            yield image
        elif reason:
            on_problem(Problem(entry.path, reason))


def count_below(wanted: Selection, on_found: Callable[[], None]) -> int:
    """Return about how many images `found_below` will come upon, going by names alone."""
    n_found = 0
    for entry in _walk(str(wanted.folder), lambda problem: None):
        is_wanted = wanted.shard.has(entry.path.removeprefix(wanted.prefix))
        if is_wanted and _extension(entry) in EXTENSIONS:
            n_found += 1
            on_found()
    return n_found


def _by_name(file: ImageFile) -> tuple[tuple[bool, str], ...]:
    """Order a folder's files before its folders."""
    *folders, name = file.path.split("/")
    return *((True, folder) for folder in folders), (False, name)


def _walk(folder: str, on_problem: Callable[[Problem], None]) -> Iterator[os.DirEntry[str]]:
    """Yield all that is no folder and not hidden."""
    pending = [folder]
    while pending:
        path = pending.pop()
        try:
            listing = os.scandir(path)
        except OSError as error:
            on_problem(Problem(path, f"folder not readable: {reason_of(error)}"))
            continue
        with listing:
            for entry in _entries(path, listing, on_problem):
                try:
                    is_folder = entry.is_dir(follow_symlinks=False)
                    is_link_to_folder = not is_folder and entry.is_dir()
                except OSError as error:
                    on_problem(Problem(entry.path, reason_of(error)))
                    continue
                if is_folder:
                    pending.append(entry.path)
                elif is_link_to_folder:
                    reason = "a link to a folder: index that folder itself"
                    on_problem(Problem(entry.path, reason))
                else:
                    yield entry


def _entries(
    path: str, listing: Iterator[os.DirEntry[str]], on_problem: Callable[[Problem], None]
) -> Iterator[os.DirEntry[str]]:
    """Yield what is not hidden; a listing that breaks off is a problem."""
    try:
        for entry in listing:
            if not entry.name.startswith("."):
                yield entry
    except OSError as error:
        on_problem(Problem(path, f"folder not readable to its end: {reason_of(error)}"))


def _extension(entry: os.DirEntry[str]) -> str:
    return os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - may not be valid UTF-8


def _classify(entry: os.DirEntry[str], wanted: Selection) -> tuple[ImageFile | None, str]:
    """Return the image, or why it is none; an empty reason for what nobody would take for one."""
    extension = _extension(entry)
    if extension and extension not in EXTENSIONS:
        return None, ""
    try:
        status = entry.stat()
        regular = stat.S_ISREG(status.st_mode)
        if not extension and not (regular and _looks_like_image(entry.path)):
            return None, ""
    except OSError as error:
        return None, reason_of(error) if extension else ""
    if not regular:
        return None, "not a regular file"
    image_id = entry.path.removeprefix(wanted.prefix) if wanted.relative_ids else entry.path
    reason = _refusal(image_id, status.st_size, wanted.max_image_bytes)
    if reason:
        return None, reason
    return ImageFile(entry.path, image_id, status.st_size, status.st_mtime_ns), ""


def _refusal(image_id: str, size: int, max_image_bytes: int) -> str:
    try:
        image_id.encode("utf-8")
        check_id(image_id)
    except UnicodeEncodeError:
        return "its name is not UTF-8: rename it"
    except InvalidInputError as error:
        return f"its path cannot be an id: {error.message}"
    if size == 0:
        return "empty"
    if size > max_image_bytes:
        return f"{size:,} bytes, above the encoder's limit of {max_image_bytes:,}"
    return ""


def _looks_like_image(path: str) -> bool:
    # O_NONBLOCK: what was a file a moment ago may be a pipe by now.
    with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
        head = file.read(12)
    return head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")

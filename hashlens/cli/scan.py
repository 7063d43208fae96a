"""A folder's images: found, and where they cannot be used, told why."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

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
    """Absolute, valid UTF-8; also its id."""
    size: int
    """Bytes."""
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Something below the folder that could not be indexed."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Scan:
    """What was found below a folder."""

    files: list[ImageFile]
    problems: list[Problem]


def scan(folder: Path, max_image_bytes: int, on_found: Callable[[], None] = lambda: None) -> Scan:
    """Find the images below a folder, without reading more than a few bytes of any.

    What a leading dot hides is left out: thumbnails, trash, a Mac's resource forks. Links to files
    are followed, links to folders are not: so there are no loops.

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
    for entry in _walk(str(folder), found.problems):
        image, reason = _classify(entry, max_image_bytes)
        if image is not None:
            found.files.append(image)
            on_found()
        elif reason:
            found.problems.append(Problem(entry.path, reason))
    return found


def _walk(folder: str, problems: list[Problem]) -> Iterator[os.DirEntry[str]]:
    """Yield all that is no folder and not hidden, in the order of names."""
    pending = [folder]
    while pending:
        path = pending.pop()
        try:
            with os.scandir(path) as listing:
                entries = sorted(
                    (entry for entry in listing if not entry.name.startswith(".")),
                    key=lambda entry: entry.name,
                )
        except OSError as error:
            problems.append(Problem(path, f"folder not readable: {reason_of(error)}"))
            continue
        folders = []
        for entry in entries:
            try:
                is_folder = entry.is_dir(follow_symlinks=False)
                is_link_to_folder = not is_folder and entry.is_dir()
            except OSError as error:
                problems.append(Problem(entry.path, reason_of(error)))
                continue
            if is_folder:
                folders.append(entry.path)
            elif is_link_to_folder:
                reason = "a link to a folder: index that folder itself"
                problems.append(Problem(entry.path, reason))
            else:
                yield entry
        pending += reversed(folders)


def _classify(entry: os.DirEntry[str], max_image_bytes: int) -> tuple[ImageFile | None, str]:
    """Return the image, or why it is none; an empty reason for what nobody would take for one."""
    extension = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - may not be valid UTF-8
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
    reason = _refusal(entry.path, status.st_size, max_image_bytes)
    if reason:
        return None, reason
    return ImageFile(entry.path, status.st_size, status.st_mtime_ns), ""


def _refusal(path: str, size: int, max_image_bytes: int) -> str:
    try:
        path.encode("utf-8")
        check_id(path)
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

"""Labels in a table: ``train.csv`` and ``test.csv``, for images of one class or of several."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from encoder_service.data.sources import FileSource
from encoder_service.data.types import Split
from hashlens.errors import InvalidInputError

HEADER = ("file", "labels")
"""May be the first line."""


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    file: str
    labels: tuple[str, ...]


def find_table(root: Path, split: Split) -> Path | None:
    """Return ``root/split.csv`` or ``root/split.tsv``, whichever there is."""
    candidates = (root / f"{split}{suffix}" for suffix in (".csv", ".tsv"))
    return next((path for path in candidates if path.is_file()), None)


def open_table(root: Path, split: Split, *, check_files: bool = True) -> FileSource:
    """Open a split that a table lists.

    The table is UTF-8 with two columns, separated by a comma (``.csv``, with quotes where needed)
    or a tab (``.tsv``), and may begin with the line ``file,labels``::

        file,labels
        beach/1.jpg,sea;sky
        town/7.png,sky

    Files are relative to the table's folder, labels are separated by ``;``. The classes are the
    train split's labels, sorted. If no image of either split has two labels, the labels are int64
    ``[n]``; otherwise bool ``[n, n_classes]``.

    Parameters
    ----------
    root
        Folder of the tables.
    split
        Which part.
    check_files
        Whether a file that is not there is an error now, or when it is read.

    Raises
    ------
    InvalidInputError
        There is no such table, or a line of it is wrong; the message gives table and line.
    """
    path = find_table(root, split)
    if path is None:
        raise InvalidInputError(
            f"there is no {root / split}.csv or .tsv beside the other split's.", field="data"
        )
    rows = _read(path)
    other_split: Split = "test" if split == "train" else "train"
    other_path = find_table(root, other_split)
    other = [] if other_path is None else _read(other_path)
    of_train = rows if split == "train" or not other else other
    listed_there = {row.file: row.line for row in other}
    for row in rows:
        if row.file in listed_there:
            raise InvalidInputError(
                f"{path}, line {row.line}: {row.file} stands in {other_path}, line "
                f"{listed_there[row.file]}, too. What is trained on cannot be tested on: remove "
                "one of the lines.",
                field="data",
            )
    classes = sorted({label for row in of_train for label in row.labels})
    position = {name: label for label, name in enumerate(classes)}
    for table, listed in ((path, rows), (other_path, other)):
        for row in listed:
            if unknown := [label for label in row.labels if label not in position]:
                raise InvalidInputError(
                    f"{table}, line {row.line}: no image to train on has the label "
                    f"{unknown[0]!r}. Mend it, or add images with it to the train split.",
                    field="data",
                )
    names = [row.file for row in rows]
    for row in rows if check_files else ():
        if not (root / row.file).is_file():
            raise InvalidInputError(
                f"{path}, line {row.line}: there is no file {root / row.file}. Paths are relative "
                "to the table's folder. Mend the line, or leave out such files with "
                "--skip-unreadable.",
                field="data",
            )
    if all(len(row.labels) == 1 for row in (*rows, *other)):
        single = np.array([position[row.labels[0]] for row in rows], np.int64)
        return FileSource(root, names, single, classes)
    several = np.zeros((len(rows), len(classes)), bool)
    for row, flags in zip(rows, several, strict=True):
        flags[[position[label] for label in row.labels]] = True
    return FileSource(root, names, several, classes)


def _read(path: Path) -> list[_Row]:
    """Read and check a table."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    rows: list[_Row] = []
    lines: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for cells in reader:
                if not cells or (reader.line_num == 1 and tuple(cells) == HEADER):
                    continue
                row = _parse(path, reader.line_num, cells)
                if row.file in lines:
                    raise InvalidInputError(
                        f"{path}, line {row.line}: {row.file} stands in line {lines[row.file]} "
                        "already. Put all its labels in one line, separated by ';'.",
                        field="data",
                    )
                lines[row.file] = row.line
                rows.append(row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError(
            f"{path}: cannot be read as a table in UTF-8 ({error}).", field="data"
        ) from error
    if not rows:
        raise InvalidInputError(f"{path}: it lists no images.", field="data")
    return rows


def _parse(path: Path, line: int, cells: list[str]) -> _Row:
    if len(cells) != 2:
        raise InvalidInputError(
            f"{path}, line {line}: a line has two columns, file and labels, not {len(cells)}. "
            "Labels are separated by ';'.",
            field="data",
        )
    file = cells[0].strip()
    labels = tuple(label.strip() for label in cells[1].split(";"))
    if not file or not all(labels):
        raise InvalidInputError(
            f"{path}, line {line}: the file or a label is missing.", field="data"
        )
    if len(set(labels)) != len(labels):
        raise InvalidInputError(
            f"{path}, line {line}: a label stands there twice: {cells[1]}.", field="data"
        )
    return _Row(line, file, labels)

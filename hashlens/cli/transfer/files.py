"""Which format a file has, by its suffix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hashlens.cli.extras import require
from hashlens.cli.transfer.columns import ItemReader, ItemWriter, Layout
from hashlens.cli.transfer.npz_read import NpzReader
from hashlens.cli.transfer.npz_write import NpzWriter
from hashlens.errors import AlreadyExistsError, InvalidInputError

SUFFIXES = (".npz", ".parquet", ".arrow")


def suffix_of(path: Path) -> str:
    """Return a suffix that we know.

    Raises
    ------
    InvalidInputError
        It is none of them.
    PreconditionError
        The packages for it are missing.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidInputError(
            f"the name says no format: let it end in {', '.join(SUFFIXES)}", field=path.name
        )
    if suffix != ".npz":
        require("arrow", purpose=f"a {suffix} file")
    return suffix


@contextmanager
def reading(path: Path) -> Iterator[ItemReader]:
    """Open a file; what is wrong with it is said with its name.

    Raises
    ------
    InvalidInputError
        It is no file of its format, or what is in it is not as the schema says.
    """
    suffix = suffix_of(path)
    try:
        reader = _reader(path, suffix)
        try:
            yield reader
        finally:
            reader.close()
    except InvalidInputError as error:
        where = f"{path.name}: {error.field}" if error.field else path.name
        raise InvalidInputError(error.message, field=where) from None


def _reader(path: Path, suffix: str) -> ItemReader:
    if suffix == ".npz":
        return NpzReader(path)
    from hashlens.cli.transfer.arrow_read import ArrowReader

    return ArrowReader(path, parquet=suffix == ".parquet")


@contextmanager
def writing(path: Path, layout: Layout) -> Iterator[ItemWriter]:
    """Write a file: it gets its name when it is whole.

    Raises
    ------
    AlreadyExistsError
        There is one.
    """
    suffix = suffix_of(path)
    if path.exists():
        raise AlreadyExistsError(f"{path} is there already: remove it, or give another name")
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            if suffix == ".npz":
                writer: ItemWriter = NpzWriter(file, layout, path.parent)
            else:
                from hashlens.cli.transfer.arrow_write import ArrowWriter

                writer = ArrowWriter(file, layout, parquet=suffix == ".parquet")
            try:
                yield writer
                writer.finish()
            finally:
                writer.abandon()
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise

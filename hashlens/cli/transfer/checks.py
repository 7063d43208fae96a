"""Whether items from a file may be written to a collection, before any of them is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.cli.transfer.columns import Columns, ItemReader, Layout
from hashlens.convert import check_id
from hashlens.convert.collection import tags_from_proto
from hashlens.convert.embedding import all_finite
from hashlens.errors import InvalidInputError, PreconditionError
from hashlens.types import MAX_PAYLOAD_BYTES, CollectionSpec, FeatureDtype

_MAX_EXPIRES_UNIX_MS = 2**63 - 1


def check_layout(spec: CollectionSpec, layout: Layout, *, may_round: bool) -> None:
    """Raise unless the items of a file fit a collection.

    Parameters
    ----------
    spec
        What the collection is, or will be, bound to.
    layout
        What the file says of its items.
    may_round
        Whether float32 may become float16.

    Raises
    ------
    InvalidInputError
        The codes have another width.
    PreconditionError
        The features have another width, or would be rounded.
    """
    wanted = codes.n_bytes(spec.n_bits)
    if layout.code_bytes not in (0, wanted):
        raise InvalidInputError(
            f"have {layout.code_bytes} bytes, but {spec.n_bits} bits take {wanted}", field="codes"
        )
    if layout.dim != spec.dim:
        raise PreconditionError(
            f"the file's features have {layout.dim} numbers, those of {spec.name} have {spec.dim}: "
            "import into another collection"
        )
    rounds = (layout.feature_dtype, spec.feature_dtype) == (FeatureDtype.F32, FeatureDtype.F16)
    if layout.dim and rounds and not may_round:
        raise PreconditionError(
            f"the file's features are float32, {spec.name} holds float16: --dtype f16 rounds them"
        )


def fitted(columns: Columns, spec: CollectionSpec) -> Columns:
    """Return the same items with features in the collection's number format."""
    features = columns.features
    if features is None or features.dtype == spec.feature_dtype.numpy:
        return columns
    with np.errstate(over="ignore"):  # The check for finite numbers names the row.
        return replace(columns, features=features.astype(spec.feature_dtype.numpy))


def check_items(reader: ItemReader, spec: CollectionSpec, advance: Callable[[int], None]) -> None:
    """Raise InvalidInputError, naming column and row, unless all items may be written.

    Nothing is kept in memory but eight bytes for each item.

    Parameters
    ----------
    reader
        The file; it is read once, and its ids again if two look the same.
    spec
        The collection.
    advance
        Told how many items were looked at.
    """
    hashes: list[NDArray[np.int64]] = []
    first = 0
    for part in reader.read():
        check_part(fitted(part, spec), spec.n_bits, first)
        hashes.append(np.array([hash(item_id) for item_id in part.ids], dtype=np.int64))
        first += len(part)
        advance(len(part))
    if first != reader.n_items:
        raise InvalidInputError(f"{first} items are in the file, it says {reader.n_items}")
    if not hashes:
        return
    _check_duplicates(
        (item_id for part in reader.read() for item_id in part.ids), np.concatenate(hashes)
    )


def check_part(columns: Columns, n_bits: int, first: int) -> None:
    """Check some items, of which the file's row `first` is the first."""
    for i, item_id in enumerate(columns.ids):
        check_id(item_id, field=f"ids[{first + i}]")
    if n_bits % 8:
        wrong = np.flatnonzero(columns.codes[:, -1] >> n_bits % 8)
        if len(wrong):
            raise InvalidInputError(
                f"has bits behind its end: {n_bits} bits fill only {n_bits % 8} of the last "
                "byte's 8, the lowest (bitorder='little')",
                field=f"codes[{first + int(wrong[0])}]",
            )
    features = columns.features
    if features is not None and len(features) and not all_finite(features):
        row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        raise InvalidInputError(
            "is not finite: mend it, or keep as float32 what overflows float16",
            field=f"features[{first + row}]",
        )
    for i, payload in enumerate(columns.payloads):
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise InvalidInputError(
                f"is {len(payload)} bytes: at most {MAX_PAYLOAD_BYTES} are kept",
                field=f"payloads[{first + i}]",
            )
    for i, tags in enumerate(columns.tags):
        if None in tags:
            raise InvalidInputError("holds null", field=f"tags[{first + i}]")
        if tags:
            tags_from_proto(tags, field=f"tags[{first + i}]")
    for i, expires in enumerate(columns.expires_unix_ms):
        if not 0 <= expires <= _MAX_EXPIRES_UNIX_MS:
            raise InvalidInputError(
                f"{expires} is no time in milliseconds", field=f"expires_unix_ms[{first + i}]"
            )


def _check_duplicates(ids: Iterable[str], hashes: NDArray[np.int64]) -> None:
    """Raise InvalidInputError for the first id that is there twice."""
    ordered = np.sort(hashes)
    suspicious = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(suspicious):
        return
    looked_at = np.isin(hashes, suspicious)
    seen: dict[str, int] = {}
    for row, item_id in enumerate(ids):
        if not looked_at[row]:
            continue
        if item_id in seen:
            raise InvalidInputError(
                f"{item_id[:80]!r} is the id of row {seen[item_id]}, too: an id is there once",
                field=f"ids[{row}]",
            )
        seen[item_id] = row

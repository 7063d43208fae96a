"""Packed items of `search_service.proto`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.convert.embedding import all_finite, dtype_from_proto, dtype_to_proto
from hashlens.errors import InvalidInputError
from hashlens.packed_items import PackedItems
from hashlens.types import MAX_DIM, MAX_ID_BYTES, MAX_PAYLOAD_BYTES, FeatureDtype
from hashlens.v1 import search_service_pb2 as spb

_CONTROLS = re.compile(rb"[\x00-\x1f\x7f]")


def packed_items_to_proto(
    items: PackedItems, message: spb.PackedItems | None = None
) -> spb.PackedItems:
    """Return the wire form, in `message` if one is given: copying it there costs as much again."""
    message = spb.PackedItems() if message is None else message
    message.model_id = items.model_id
    message.n_bits = items.n_bits
    message.ids = items.id_bytes
    message.id_ends = items.id_ends.astype("<u4", copy=False).tobytes()
    message.codes = items.codes.tobytes()
    message.payloads = items.payload_bytes
    if items.features is not None:
        message.dim = items.features.shape[1]
        message.feature_dtype = dtype_to_proto(FeatureDtype.of(items.features))
        message.features = _bytes_of(items.features)
    if items.payload_ends is not None:
        message.payload_ends = items.payload_ends.astype("<u4", copy=False).tobytes()
    return message


def _bytes_of(features: NDArray[Any]) -> bytes:
    """Return the numbers of features; those of `PackedItems.of` are bytes already."""
    base: Any = features
    while isinstance(base, np.ndarray):
        base = base.base
    whole = isinstance(base, bytes) and len(base) == features.nbytes
    return base if whole and features.flags.c_contiguous else features.tobytes()


def packed_items_from_proto(message: spb.PackedItems) -> PackedItems:
    """Return the value; its arrays are read-only views of the message's bytes.

    Raises
    ------
    InvalidInputError
        What `item_from_proto` refuses of an item, or columns that do not fit each other. The
        message names the first item that is wrong.
    """
    id_bytes, ends = message.ids, _ends(message.id_ends, "id_ends")
    n = len(ends)
    _check_ends(ends, len(id_bytes), MAX_ID_BYTES, at_least=1, field="id_ends")
    _check_ids(id_bytes, ends)
    n_bits = message.n_bits
    if not 1 <= n_bits <= codes.MAX_BITS:
        raise InvalidInputError(
            f"n_bits is {n_bits}: a code has 1 to {codes.MAX_BITS} bits", field="n_bits"
        )
    packed = _matrix(message.codes, np.dtype(np.uint8), n, codes.n_bytes(n_bits), field="codes")
    if n_bits % 8:
        wrong = np.flatnonzero(packed[:, -1] >> n_bits % 8)
        if len(wrong):
            raise InvalidInputError(
                f"the code of item {wrong[0]} has bits behind its end: {n_bits} bits fill only "
                f"{n_bits % 8} of the last byte's 8",
                field="codes",
            )
    features = None
    if message.dim or message.features:
        if not 1 <= message.dim <= MAX_DIM:
            raise InvalidInputError(
                f"dim is {message.dim}: a feature has 1 to {MAX_DIM} numbers", field="dim"
            )
        dtype = dtype_from_proto(message.feature_dtype)
        if dtype is None:
            raise InvalidInputError(
                "say how the numbers are written: F32 or F16", field="feature_dtype"
            )
        features = _matrix(message.features, dtype.numpy, n, message.dim, field="features")
        if n and not all_finite(features):
            wrong = np.flatnonzero(~np.isfinite(features).all(axis=1))
            raise InvalidInputError(
                f"the feature of item {wrong[0]} is not finite: mend it, or store as f32 what "
                "overflows f16",
                field="features",
            )
    payload_ends = None
    if message.payload_ends:
        payload_ends = _ends(message.payload_ends, "payload_ends")
        if len(payload_ends) != n:
            raise InvalidInputError("say where each payload ends", field="payload_ends")
    last = np.zeros(0, dtype=np.uint32) if payload_ends is None else payload_ends
    _check_ends(last, len(message.payloads), MAX_PAYLOAD_BYTES, at_least=0, field="payload_ends")
    return PackedItems(
        model_id=message.model_id,
        n_bits=n_bits,
        id_bytes=id_bytes,
        id_ends=ends,
        codes=packed,
        features=features,
        payload_bytes=message.payloads,
        payload_ends=payload_ends,
    )


def _ends(data: bytes, field: str) -> NDArray[np.uint32]:
    if len(data) % 4:
        raise InvalidInputError("32-bit unsigned integers, four bytes each", field=field)
    return np.frombuffer(data, dtype="<u4")


def _check_ends(
    ends: NDArray[np.uint32], n_bytes: int, longest: int, *, at_least: int, field: str
) -> None:
    """Raise unless ends divide `n_bytes` bytes into parts of allowed lengths."""
    lengths = np.diff(ends.astype(np.int64), prepend=0)
    wrong = np.flatnonzero((lengths < at_least) | (lengths > longest))
    if len(wrong):
        raise InvalidInputError(
            f"item {wrong[0]} would have {lengths[wrong[0]]} bytes: {at_least} to {longest} are "
            "allowed",
            field=field,
        )
    if int(lengths.sum()) != n_bytes:
        raise InvalidInputError(f"the last end is not at the end of {n_bytes} bytes", field=field)


def _check_ids(id_bytes: bytes, ends: NDArray[np.uint32]) -> None:
    """Raise unless all ids are UTF-8, none begins inside a letter, none has control characters."""
    try:
        id_bytes.decode()
    except UnicodeDecodeError as error:
        item = int(np.searchsorted(ends, error.start, side="right"))
        raise InvalidInputError(f"the id of item {item} is not UTF-8", field="ids") from None
    found = _CONTROLS.search(id_bytes)
    if found is not None:
        item = int(np.searchsorted(ends, found.start(), side="right"))
        raise InvalidInputError(
            f"the id of item {item} holds control characters: an id has none", field="ids"
        )
    data = np.frombuffer(id_bytes, dtype=np.uint8)
    cut = np.flatnonzero((data[ends[:-1]] & 0xC0) == 0x80)
    if len(cut):
        raise InvalidInputError(f"the id of item {cut[0]} ends inside a letter", field="ids")


def _matrix(data: bytes, dtype: np.dtype[Any], n: int, width: int, *, field: str) -> NDArray[Any]:
    if len(data) != n * width * dtype.itemsize:
        raise InvalidInputError(
            f"{len(data)} bytes are not {n} times {width} numbers of {dtype.itemsize} bytes",
            field=field,
        )
    return np.frombuffer(data, dtype=dtype).reshape(n, width)

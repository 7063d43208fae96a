"""Stored items, read back from a snapshot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hashlens.types import Embedding, Item
from search_service.snapshot import Snapshot


def items_of(
    snapshot: Snapshot, ids: Sequence[str], *, with_feature: bool, with_payload: bool
) -> list[Item]:
    """Return the items that are there, in the order of `ids`.

    Parameters
    ----------
    snapshot
        Where they are.
    ids
        Their ids; those that are not there are left out.
    with_feature, with_payload
        What to read beside the code.
    """
    found = [(item_id, row) for item_id in ids if (row := snapshot.row_of(item_id)) is not None]
    if not found:
        return []
    rows = np.array([row for _, row in found], dtype=np.int64)
    payloads = snapshot.payloads_of(rows) if with_payload else [b""] * len(found)
    tags, expiries = snapshot.ids.tags_of(rows), snapshot.ids.expiries_of(rows)
    return [
        Item(
            id=item_id,
            embedding=Embedding(
                code=code.tobytes(),
                n_bits=snapshot.n_bits,
                model_id=snapshot.model_id,
                feature=snapshot.feature_of(row) if with_feature else None,
            ),
            payload=payload,
            tags=item_tags,
            expires_unix_ms=expires_ms,
        )
        for (item_id, row), code, payload, item_tags, expires_ms in zip(
            found, snapshot.codes_of(rows), payloads, tags, expiries, strict=True
        )
    ]

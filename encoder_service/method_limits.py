"""How many calls of each method may be in the works at a time, unless one is told otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

METHOD_LIMITS: Final[Mapping[str, int]] = {
    # A few batches of the model: more would wait longer and be served no faster.
    "Encode": 256,
    # Each is a few batches by itself.
    "EncodeBatch": 8,
    "EncodeStream": 32,
    "GetModel": 64,
}

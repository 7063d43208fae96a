"""What all item files hold: the same columns, read and written a part at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import InvalidInputError
from hashlens.types import Embedding, FeatureDtype, Item

FORMAT = "hashlens-items-1"
"""Name and version of the schema, as written into files."""

PART_ROWS = 4096
"""Most items that are in memory at once."""

PART_BYTES = 32 * 2**20
"""About how many bytes of them, payloads and tags aside."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file says of all of its items."""

    code_bytes: int
    """Width of a code, in bytes; 0: there are none, and nothing says it."""
    dim: int = 0
    """Width of a feature; 0: codes only."""
    feature_dtype: FeatureDtype = FeatureDtype.F16
    n_bits: int = 0
    """Code length, in bits; 0: the file does not say."""
    model_id: str = ""
    """Empty: the file does not say."""

    def part_rows(self, beside_bytes: int = 0) -> int:
        """Return how many items to read at once, with `beside_bytes` more for each."""
        row_bytes = self.code_bytes + self.dim * self.feature_dtype.n_bytes + beside_bytes
        return max(1, min(PART_ROWS, PART_BYTES // max(1, row_bytes)))


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Some items, by column."""

    ids: Sequence[str]
    codes: NDArray[np.uint8]
    """Packed, shape ``[n, code_bytes]``."""
    features: NDArray[Any] | None
    """float16 or float32, shape ``[n, dim]``; None: codes only."""
    payloads: Sequence[bytes]
    tags: Sequence[Sequence[str]]
    expires_unix_ms: Sequence[int]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, items: Sequence[Item], layout: Layout) -> Columns:
        """Return the columns of stored items, each of which has an embedding as `layout` says."""
        embeddings = [item.embedding for item in items if item.embedding is not None]
        packed = b"".join([one.code for one in embeddings])
        features = None
        if layout.dim:
            features = np.empty((len(items), layout.dim), dtype=layout.feature_dtype.numpy)
            for i, one in enumerate(embeddings):
                features[i] = one.feature
        return cls(
            ids=[item.id for item in items],
            codes=np.frombuffer(packed, dtype=np.uint8).reshape(len(items), layout.code_bytes),
            features=features,
            payloads=[item.payload for item in items],
            tags=[item.tags for item in items],
            expires_unix_ms=[item.expires_unix_ms for item in items],
        )

    def items(self, model_id: str, n_bits: int) -> Iterator[Item]:
        """Yield the items; their features are views."""
        features = [None] * len(self) if self.features is None else self.features
        for item_id, code, feature, payload, tags, expires in zip(
            self.ids,
            self.codes,
            features,
            self.payloads,
            self.tags,
            self.expires_unix_ms,
            strict=True,
        ):
            embedding = Embedding(code.tobytes(), n_bits, model_id, feature)
            yield Item(item_id, embedding, None, payload, tuple(tags), expires)


class ItemReader(Protocol):
    """A file of items that is being read."""

    @property
    def layout(self) -> Layout:
        """What it says of all items."""

    @property
    def n_items(self) -> int:
        """How many it holds."""

    def read(self) -> Iterator[Columns]:
        """Yield all items, from the first, a part at a time; InvalidInputError for a wrong one."""

    def close(self) -> None:
        """Close the file."""


class ItemWriter(Protocol):
    """A file of items that is being written."""

    def write(self, columns: Columns) -> None:
        """Append some."""

    def finish(self) -> None:
        """Write what is left."""

    def abandon(self) -> None:
        """Let go of everything; the file is of no use then, unless it was finished."""


def check_format(name: str) -> None:
    """Raise InvalidInputError unless we know the schema; none said is ours."""
    if name not in ("", FORMAT):
        raise InvalidInputError(f"{name[:80]!r} is not {FORMAT}", field="format")


def check_n_bits(n_bits: int) -> int:
    """Return `n_bits`; InvalidInputError unless a code may have so many."""
    if not 1 <= n_bits <= codes.MAX_BITS:
        raise InvalidInputError(f"{n_bits}: a code has 1 to {codes.MAX_BITS} bits", field="n_bits")
    return n_bits


def feature_dtype_of(name: str) -> FeatureDtype:
    """Return the member for a NumPy dtype's text; InvalidInputError for any other."""
    try:
        return {"<f4": FeatureDtype.F32, "<f2": FeatureDtype.F16}[name]
    except KeyError:
        raise InvalidInputError(
            f"the numbers are {name}: write float16 or float32, little-endian", field="features"
        ) from None

"""What a search reads: one immutable version of a collection's arrays.

The store publishes a `Snapshot`, the engine searches it, and neither knows the other. A `row` is a
position in the arrays, in the order of the writes; an `id` is the user's key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.types import FeatureDtype, TagFilter
from search_service.views import Views


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Byte strings of rows, one after the other."""

    data: NDArray[np.uint8]
    """All of them, contiguous; may be longer than they are."""
    ends: NDArray[np.uint64]
    """Where each ends in `data`, shape ``[rows]``; one begins where the one before ends."""

    @classmethod
    def of(cls, strings: Sequence[bytes]) -> Texts:
        """Lay byte strings one after the other."""
        lengths = np.array([len(string) for string in strings], dtype=np.uint64)
        data = np.frombuffer(b"".join(strings), dtype=np.uint8)
        return cls(data, read_only(np.cumsum(lengths, dtype=np.uint64)))


class IdLookup(Protocol):
    """Rows to ids and back, and to payloads, as of one snapshot."""

    def id_texts(self) -> Texts:
        """Return the ids of all rows as UTF-8, views."""
        ...

    def payload_texts(self) -> Texts | None:
        """Return the payloads of all rows, views; None if all are empty."""
        ...

    def ids_of(self, rows: NDArray[np.int64]) -> list[str]:
        """Return the ids of rows, in the order of `rows`; int64, shape ``[n]``."""
        ...

    def row_of(self, item_id: str) -> int | None:
        """Return the alive row of an id, or None."""
        ...

    def payloads_of(self, rows: NDArray[np.int64]) -> list[bytes]:
        """Return copies of the payloads of rows, in the order of `rows`; int64, shape ``[n]``."""
        ...

    def tags_of(self, rows: NDArray[np.int64]) -> list[tuple[str, ...]]:
        """Return the tags of rows, in the order of `rows`; int64, shape ``[n]``."""
        ...

    def expiries_of(self, rows: NDArray[np.int64]) -> list[int]:
        """Return when rows expire, in ms since 1970 or 0 for never; int64, shape ``[n]``."""
        ...

    def index_tags(self) -> bool:
        """Do some milliseconds of work for `passing`; tell whether it can be asked."""
        ...

    def passing(self, wanted: TagFilter) -> NDArray[np.int64]:
        """Return the rows whose tags pass, dead ones too: int64, ascending; see `index_tags`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Few:
    """The alive rows of a snapshot where they are few, and their codes once more."""

    rows: NDArray[np.int64]
    """Which they are, ascending, shape ``[n]``."""
    codes: Snapshot
    """Of these rows alone, in this order, none dead, without features."""


class FeatureCheck(Protocol):
    """Whether features are what was written."""

    def unchecked(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of `rows` that nobody has looked at yet, in their order."""
        ...

    def check(self, rows: NDArray[np.int64]) -> None:
        """Look at rows, each once in `rows`."""
        ...

    def damaged(self, rows: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Tell which of the rows looked at are damaged; None if no row at all is."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """One version of a collection, read-only.

    Nothing that an array shows may change while the snapshot is in use: the kernels read without
    locks, and a torn read would be a wrong answer. The arrays are views and usually memory-mapped;
    the snapshot keeps them, and with them their mappings, alive. Shapes and dtypes are checked
    here because the kernels address the features without bounds.

    Raises
    ------
    ValueError
        An array does not have the shape, dtype or layout that its field states.
    """

    n_bits: int
    """Code length, 1 to 512 bits."""
    dim: int
    """Width of the feature; 0 for a collection of codes only."""
    feature_dtype: FeatureDtype
    """How features are stored; without meaning where `dim` is 0."""
    version: int
    """The store's sequence number."""
    rows: int
    """How many rows there are, dead ones too."""
    n_alive: int
    """How many rows are not dead."""
    words: tuple[NDArray[np.uint64], ...]
    """The codes, one array per 64-bit word: uint64, shape ``[rows]``, contiguous."""
    ids: IdLookup
    """Ids and payloads of the rows. Use the snapshot's own `ids_of`, `row_of`, `payloads_of`."""
    features: tuple[NDArray[Any], ...] = ()
    """Segments of features: float32 or float16 as `feature_dtype` says, C-contiguous, shape
    ``[rows_per_segment, dim]``; the last may have fewer rows (or more than it needs). Row ``r`` is
    ``features[r // rows_per_segment][r % rows_per_segment]``."""
    rows_per_segment: int = 1 << 16
    """A power of two."""
    dead: NDArray[np.uint8] | None = None
    """1 where a row was deleted or replaced, else 0; shape ``[rows]``. None: no row is dead."""
    has_feature: NDArray[np.uint8] | None = None
    """0 where a row's feature is missing, else 1; shape ``[rows]``. None: none is missing. Whatever
    its segment holds at such a row is never read."""
    feature_check: FeatureCheck | None = None
    """What to ask before a feature is used, see `search_service.features`. None: all are right."""
    model_id: str = ""
    """Which model made the embeddings; when it is set, a query of any other is refused."""
    table_id: str = ""
    """Names the append-only table that this is a version of: two snapshots with the same one have
    the same rows as far as both reach, only `dead` may differ. Empty: not known."""
    few: Few | None = None
    """The alive rows, where it is faster to compare those alone; the answer is the same."""
    views: Views = field(init=False, repr=False, default_factory=Views)
    """What filters leave of this snapshot; goes with it."""
    columns: NDArray[np.int64] = field(init=False)
    """Address of each of `words`: int64, shape ``[n_words]``."""

    def __post_init__(self) -> None:
        rows = self.rows
        _require(1 <= self.n_bits <= codes.MAX_BITS, "n_bits is 1 to 512")
        _require(0 <= self.n_alive <= rows, "n_alive is 0 to rows")
        _require(len(self.words) == codes.n_words(self.n_bits), "one array per 64-bit word")
        for words in self.words:
            _require_vector(words, np.dtype(np.uint64), rows, "words")
        addresses = [words.__array_interface__["data"][0] for words in self.words]
        object.__setattr__(self, "columns", np.array(addresses, dtype=np.int64))
        for name, flags in (("dead", self.dead), ("has_feature", self.has_feature)):
            if flags is not None:
                _require_vector(flags, np.dtype(np.uint8), rows, name)
        _require(self.dead is not None or self.n_alive == rows, "dead rows need `dead`")
        if self.dim == 0:
            return
        per_segment = self.rows_per_segment
        _require(per_segment > 0 and per_segment & (per_segment - 1) == 0, "a power of two of rows")
        _require(len(self.features) >= -(-rows // per_segment), "features cover all rows")
        for i, segment in enumerate(self.features):
            needed = min(max(rows - i * per_segment, 0), per_segment)
            _require(
                segment.ndim == 2 and segment.shape[0] >= needed and segment.shape[1] == self.dim,
                f"feature segment {i} has shape [{needed}, {self.dim}]",
            )
            _require(
                segment.dtype == self.feature_dtype.numpy and segment.flags.c_contiguous,
                f"feature segment {i} is C-contiguous {self.feature_dtype.value}",
            )

    @classmethod
    def from_arrays(
        cls,
        packed: NDArray[np.uint8],
        *,
        n_bits: int,
        features: NDArray[Any] | None = None,
        ids: Sequence[str] | None = None,
        dead: NDArray[Any] | None = None,
        has_feature: NDArray[Any] | None = None,
        version: int = 0,
        model_id: str = "",
        rows_per_segment: int = 1 << 16,
    ) -> Snapshot:
        """Build a snapshot from arrays in memory, in a notebook or a test.

        Parameters
        ----------
        packed
            Codes: uint8, shape ``[n, n_bytes(n_bits)]``, see `hashlens.codes`. Copied.
        n_bits
            Code length, in bits.
        features
            float32 or float16, shape ``[n, dim]``. Not copied if C-contiguous; leave it unchanged.
        ids
            One per row; of the alive rows no two the same. Default: the row numbers as text.
        dead, has_feature
            Bool or 0/1, shape ``[n]``; see the fields of that name. Copied.
        version, model_id, rows_per_segment
            See the fields.

        Returns
        -------
        Snapshot

        Raises
        ------
        ValueError
            The shapes or dtypes do not fit together, padding bits are set, or two alive rows have
            the same id.
        """
        n = packed.shape[0]
        _require(
            packed.dtype == np.uint8 and packed.shape == (n, codes.n_bytes(n_bits)),
            f"packed codes are uint8 [n, {codes.n_bytes(n_bits)}]",
        )
        used_bits = n_bits % 8
        _require(used_bits == 0 or not (packed[:, -1] >> used_bits).any(), "padding bits are zero")
        _require(ids is None or len(ids) == n, "one id per row")
        _require(dead is None or np.shape(dead) == (n,), "dead flags are [n]")
        dtype = FeatureDtype.F32
        segments: tuple[NDArray[Any], ...] = ()
        if features is not None:
            _require(features.ndim == 2 and len(features) == n, "features are [n, dim]")
            dtype = FeatureDtype.of(features)
            contiguous = np.ascontiguousarray(features)
            segments = tuple(
                read_only(contiguous[lo : lo + rows_per_segment])
                for lo in range(0, n, rows_per_segment)
            )
        dead_flags = None if dead is None else read_only(np.array(dead, dtype=np.uint8))
        return cls(
            n_bits=n_bits,
            dim=0 if features is None else int(features.shape[1]),
            feature_dtype=dtype,
            version=version,
            rows=n,
            n_alive=n if dead_flags is None else n - int(np.count_nonzero(dead_flags)),
            words=tuple(read_only(word) for word in codes.as_words(packed)),
            ids=_ListedIds(
                [str(row) for row in range(n)] if ids is None else list(ids), dead_flags
            ),
            features=segments,
            rows_per_segment=rows_per_segment,
            dead=dead_flags,
            has_feature=(
                None if has_feature is None else read_only(np.array(has_feature, dtype=np.uint8))
            ),
            model_id=model_id,
        )

    def ids_of(self, rows: NDArray[np.int64]) -> list[str]:
        """Return the ids of rows, in the order of `rows`; int64, shape ``[n]``."""
        return self.ids.ids_of(rows)

    def row_of(self, item_id: str) -> int | None:
        """Return the alive row of an id, or None."""
        return self.ids.row_of(item_id)

    def payloads_of(self, rows: NDArray[np.int64]) -> list[bytes]:
        """Return copies of the payloads of rows, in the order of `rows`; int64, shape ``[n]``."""
        return self.ids.payloads_of(rows)

    def codes_of(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return packed codes of rows: uint8, shape ``[n, n_bytes]``, a copy."""
        return codes.from_words(np.stack([words[rows] for words in self.words]), self.n_bits)

    def feature_of(self, row: int) -> NDArray[Any] | None:
        """Return a row's feature: shape ``[dim]``, a copy; None if it is missing or damaged."""
        if self.dim == 0 or (self.has_feature is not None and not self.has_feature[row]):
            return None
        check = self.feature_check
        if check is not None:
            rows = np.array([row], dtype=np.int64)
            check.check(check.unchecked(rows))
            damaged = check.damaged(rows)
            if damaged is not None and damaged[0]:
                return None
        segment, position = divmod(row, self.rows_per_segment)
        return np.array(self.features[segment][position])


@dataclass(frozen=True, slots=True)
class _ListedIds:
    """Ids held in a list."""

    listed: list[str]
    dead: NDArray[np.uint8] | None
    rows: dict[str, int] = field(init=False)
    texts: Texts = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", Texts.of([item_id.encode() for item_id in self.listed]))
        alive = [
            (item_id, row)
            for row, item_id in enumerate(self.listed)
            if self.dead is None or not self.dead[row]
        ]
        rows = dict(alive)
        _require(len(rows) == len(alive), "no two alive rows have the same id")
        object.__setattr__(self, "rows", rows)

    def id_texts(self) -> Texts:
        return self.texts

    def payload_texts(self) -> Texts | None:
        return None

    def ids_of(self, rows: NDArray[np.int64]) -> list[str]:
        listed = self.listed
        return [listed[row] for row in rows.tolist()]

    def row_of(self, item_id: str) -> int | None:
        return self.rows.get(item_id)

    def payloads_of(self, rows: NDArray[np.int64]) -> list[bytes]:
        return [b""] * rows.shape[0]

    def tags_of(self, rows: NDArray[np.int64]) -> list[tuple[str, ...]]:
        return [()] * rows.shape[0]

    def expiries_of(self, rows: NDArray[np.int64]) -> list[int]:
        return [0] * rows.shape[0]

    def index_tags(self) -> bool:
        return True

    def passing(self, wanted: TagFilter) -> NDArray[np.int64]:
        # None has a tag.
        n = 0 if wanted.any or wanted.all else len(self.listed)
        return np.arange(n, dtype=np.int64)


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """Return a view of an array that cannot be written through."""
    view = array.view()
    view.flags.writeable = False
    return view


def _require(condition: bool, expectation: str) -> None:
    if not condition:
        raise ValueError(f"not a snapshot: expected {expectation}")


def _require_vector(array: NDArray[Any], dtype: np.dtype[Any], rows: int, name: str) -> None:
    _require(
        array.dtype == dtype and array.shape == (rows,) and array.flags.c_contiguous,
        f"{name} to be contiguous {dtype} [{rows}]",
    )

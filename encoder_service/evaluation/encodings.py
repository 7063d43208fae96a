"""What the encoder makes of labelled images: all that rankings are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.errors import InvalidInputError

MAX_IMAGES = 1 << 21
"""Most images of a database: a rank's sort key has 21 bits for the row, see `rankings`."""


@dataclass(frozen=True, slots=True, eq=False)
class Encodings:
    """Encoded images, one row each.

    Raises
    ------
    InvalidInputError
        The arrays do not belong together, or a feature is out of float16's range.
    """

    codes: NDArray[np.uint8]
    """Packed, shape ``[n, ceil(n_bits / 8)]``, see `hashlens.codes`."""
    n_bits: int
    features: NDArray[np.float16]
    """F7, shape ``[n, dim]``, as the search service stores it unless told otherwise."""
    labels: NDArray[Any]
    """int64 ``[n]``, positions in the data's classes; or bool ``[n, n_classes]``."""
    activations: NDArray[np.float32] | None = None
    """H, shape ``[n, n_bits]``; needed of queries only, for ``coarse_soft``."""
    predicted: NDArray[np.int64] | None = None
    """The classifier's choice, shape ``[n]``, positions in the data's classes."""

    def __post_init__(self) -> None:
        n = len(self.codes)
        if self.codes.shape != (n, codes.n_bytes(self.n_bits)):
            raise InvalidInputError(
                f"codes of {self.n_bits} bits are [n, {codes.n_bytes(self.n_bits)}] bytes, not "
                f"{list(self.codes.shape)}.",
                field="codes",
            )
        if n > MAX_IMAGES:
            raise InvalidInputError(
                f"{n:,} images are too many to rank in full; take at most {MAX_IMAGES:,}.",
                field="codes",
            )
        for name in ("features", "labels", "activations", "predicted"):
            array = getattr(self, name)
            if array is not None and len(array) != n:
                raise InvalidInputError(
                    f"there are {n} codes but {len(array)} {name}; both have a row per image.",
                    field=name,
                )
        if self.activations is not None and self.activations.shape != (n, self.n_bits):
            raise InvalidInputError(
                f"activations are [{n}, {self.n_bits}], not {list(self.activations.shape)}.",
                field="activations",
            )
        if not np.isfinite(self.features).all():
            raise InvalidInputError(
                "a feature is not finite, or beyond the range of float16, in which features are "
                "stored. The model cannot be served like this: train it with weight decay.",
                field="features",
            )

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: NDArray[np.int64]) -> Encodings:
        """Return the chosen rows, as copies."""
        return Encodings(
            self.codes[rows],
            self.n_bits,
            self.features[rows],
            self.labels[rows],
            None if self.activations is None else self.activations[rows],
            None if self.predicted is None else self.predicted[rows],
        )


def n_distinct(packed: NDArray[np.uint8]) -> int:
    """Count different codes; `packed` is uint8 ``[n, n_bytes]``."""
    whole = np.ascontiguousarray(packed).view(f"V{packed.shape[1]}")
    return int(np.unique(whole).shape[0])

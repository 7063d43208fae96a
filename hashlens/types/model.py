"""An encoder service: its model, and what that makes of an image; whether a service is well."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_DIM = 65_536
"""The widest feature, in numbers."""

_F32, _F16 = np.dtype("<f4"), np.dtype("<f2")


class FeatureDtype(enum.Enum):
    """How the numbers of a feature are stored and sent; always little-endian."""

    F32 = "f32"
    F16 = "f16"

    @property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy dtype, little-endian."""
        return _F32 if self is FeatureDtype.F32 else _F16

    @property
    def n_bytes(self) -> int:
        """Bytes per number."""
        return self.numpy.itemsize

    @classmethod
    def of(cls, array: NDArray[Any]) -> FeatureDtype:
        """Return the member for an array's dtype; ValueError for any other."""
        for member in cls:
            if array.dtype == member.numpy:
                return member
        raise ValueError(f"a feature is float32 or float16, not {array.dtype}")


@dataclass(frozen=True, slots=True)
class Embedding:
    """An image as the model sees it: its code and, unless the use is codes only, its F7 feature."""

    code: bytes
    """Packed bits, see `hashlens.codes`; ``ceil(n_bits / 8)`` bytes."""
    n_bits: int
    """Code length, in bits."""
    model_id: str
    """Which weights and preprocessing made it."""
    feature: NDArray[Any] | None = None
    """F7: float32 or float16, shape ``[dim]``."""
    activations: NDArray[np.float32] | None = None
    """H before the threshold, shape ``[n_bits]``, in 0..1; |H - 0.5| is how sure each bit is."""

    @property
    def dim(self) -> int:
        """Width of the feature; 0 without one."""
        return 0 if self.feature is None else int(self.feature.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """A model's last layer: the class scores are ``weights @ H + bias``."""

    weights: NDArray[np.float32]
    """Shape ``[n_classes, n_bits]``."""
    bias: NDArray[np.float32]
    """Shape ``[n_classes]``."""

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Classifier)
            and np.array_equal(self.weights, other.weights)
            and np.array_equal(self.bias, other.bias)
        )

    def __hash__(self) -> int:
        return hash((self.weights.tobytes(), self.bias.tobytes()))


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What an encoder says of its model."""

    model_id: str
    backbone: str
    n_bits: int
    dim: int
    classes: tuple[str, ...]
    preprocessing: Mapping[str, Any]
    metrics: Mapping[str, float]
    licence: str
    """Licence of the data that the weights were trained on."""
    max_image_bytes: int
    max_image_pixels: int
    max_batch_items: int
    max_message_bytes: int
    feature_dtype: FeatureDtype
    """Number format of features when a request does not say."""
    device: str
    classifier: Classifier | None = None
    """Its last layer; None where it takes more than a megabyte."""


@dataclass(frozen=True, slots=True)
class EncodeTimings:
    """Where an encoder call spent its time, in nanoseconds."""

    decode_ns: int = 0
    """Bytes to pixels to tensor."""
    queue_ns: int = 0
    """Waiting for a batch."""
    inference_ns: int = 0
    """The batch's forward pass."""
    total_ns: int = 0
    batch_items: int = 0
    """How many images shared the forward pass."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One image's embedding and what it cost."""

    embedding: Embedding
    timings: EncodeTimings


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """Answer of a health probe."""

    target: str
    serving: bool
    """Whether calls are let through."""
    detail: str
    ready: bool = False
    """Whether callers should come: a replica that lacks a collection serves and is not ready."""
    live: bool = False
    """Whether it can help itself; if not, it has to be started anew."""
    reasons: tuple[str, ...] = ()
    """Why it is not ready, or what else there is to say."""
    answered: bool = True
    """Whether there was an answer at all; if not, `detail` says what there was instead."""

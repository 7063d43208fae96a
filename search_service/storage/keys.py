"""The keys of collections in Redis, and what their values and replies say.

All keys of a collection share the hash tag ``{name}``: each script runs in one slot of a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hashlens.errors import (
    DataLossError,
    InvalidInputError,
    NotFoundError,
    PreconditionError,
)
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import layout

COLLECTIONS: Final = "hl:collections"
"""SET of names, to find collections that other processes made."""

DROPPED: Final = "hl:dropped"
"""HASH epoch -> name and time: how a replica tells a drop from a Redis that lost its data."""


@dataclass(frozen=True, slots=True)
class Meta:
    """What Redis says of a collection."""

    spec: CollectionSpec
    epoch: str
    n_buckets: int
    seq: int
    is_dropping: bool
    is_restoring: bool = False
    """A backup is being put back, or was until something stopped it."""

    @property
    def is_active(self) -> bool:
        """Whether it is there for everyone."""
        return not self.is_dropping and not self.is_restoring


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one collection."""

    name: str

    @property
    def meta(self) -> str:
        """HASH: what the collection is."""
        return f"hl:{{{self.name}}}:meta"

    @property
    def log(self) -> str:
        """STREAM: all writes that some replica may still need."""
        return f"hl:{{{self.name}}}:log"

    @property
    def replicas(self) -> str:
        """HASH replica id -> sequence number that is safe in its files."""
        return f"hl:{{{self.name}}}:replicas"

    @property
    def seen(self) -> str:
        """HASH replica id -> when it was last heard of, what it has erased, where it is."""
        return f"hl:{{{self.name}}}:seen"

    def request(self, epoch: str, request_id: str) -> str:
        """HASH: the answer to a write. The epoch keeps a new collection from an old one's."""
        return f"hl:{{{self.name}}}:req:{epoch}:{request_id}"

    def buckets(self, bucket: int) -> tuple[str, str]:
        """Two HASHes: id -> sequence number and code, id -> payload."""
        return f"hl:{{{self.name}}}:b:{bucket}", f"hl:{{{self.name}}}:p:{bucket}"


def read_meta(name: str, found: Mapping[Any, bytes | str]) -> Meta:
    """Read the hash at `Keys.meta`."""
    try:
        fields = {text(key): text(value) for key, value in found.items()}
        if int(fields["format"]) != layout.FORMAT_VERSION:
            raise PreconditionError(
                f"The collection {name} has format {fields['format']} in Redis; this version of "
                f"Hashlens reads {layout.FORMAT_VERSION}."
            )
        spec = CollectionSpec(
            name=name,
            model_id=fields["model_id"],
            n_bits=int(fields["n_bits"]),
            dim=int(fields["dim"]),
            feature_dtype=FeatureDtype(fields["feature_dtype"]),
            expected_rows=int(fields["expected_rows"]),
        )
        return Meta(
            spec=spec,
            epoch=fields["epoch"],
            n_buckets=int(fields["n_buckets"]),
            seq=int(fields["seq"]),
            is_dropping=fields["state"] == "dropping",
            is_restoring=fields["state"] == "restoring",
        )
    except (KeyError, ValueError) as error:
        raise DataLossError(f"The key {Keys(name).meta} cannot be read: {error!r}") from None


def check_status(name: str, reply: Sequence[Any]) -> None:
    """Raise what a script's status stands for, unless it is ``ok``."""
    status = text(reply[0])
    if status == "conflict":
        raise InvalidInputError(
            "This request id was used for another write. Use a new one for each write.",
            field="request_id",
        )
    if status == "dropping":
        raise NotFoundError(f"The collection {name} is being dropped.")
    if status == "restoring":
        raise PreconditionError(restoring(name))
    if status == "behind":
        raise PreconditionError(
            f"Redis went back to version {text(reply[1])} of the collection {name}: it has lost "
            "writes. Bring the right Redis back; or drop the collection and index again."
        )
    if status != "ok":
        raise PreconditionError(foreign(name, text(reply[1]) if len(reply) > 1 else None))


def foreign(name: str, epoch: str | None) -> str:
    """Say that Redis and this replica do not speak of the same collection."""
    found = "does not have it" if epoch is None else f"has another one of that name ({epoch})"
    return (
        f"This replica holds the collection {name}, but Redis {found}: it was emptied, or it is "
        "the wrong server. Bring the right one back; or drop the collection and index again."
    )


def restoring(name: str) -> str:
    """Say that a collection is not there yet."""
    return (
        f"The collection {name} is being restored. If nobody is at it, `hashlens restore` "
        "completes it and `hashlens drop` removes it."
    )


def text(value: bytes | str | None) -> str:
    """Return a reply as text; empty for none."""
    if value is None:
        return ""
    return value.decode() if isinstance(value, bytes) else value

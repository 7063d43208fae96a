"""How the store reaches other replicas' files; it does not know by which protocol."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol


class Listing(NamedTuple):
    """Files that a peer keeps for a while, for us to copy."""

    manifest: bytes
    """As it is in the peer's file."""
    lease: str
    """Names the set."""


class Peers(Protocol):
    """Reads files of other replicas. Raises `hashlens.errors`; every wait has a bound."""

    def list_files(self, address: str, collection: str, epoch: str, min_version: int) -> Listing:
        """Return a consistent set of files, at least as new as a version.

        Raises
        ------
        UnavailableError
            The peer is away, or cannot serve a copy now.
        NotFoundError, PreconditionError
            It has no such collection, or another one of the name.
        OverloadedError
            It serves as many copies as it may.
        """

    def read_file(self, address: str, lease: str, name: str, offset: int) -> Iterator[bytes]:
        """Return the next parts of a file, each checked against what the peer read.

        It may end before the file does; then go on from where it ended.

        Raises
        ------
        NotFoundError
            The lease has ended.
        UnavailableError
            The peer went away, or bytes were damaged on the way.
        OverloadedError
            As above.
        """

    def close(self) -> None:
        """End all calls at once."""

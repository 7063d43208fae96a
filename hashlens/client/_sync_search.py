"""The synchronous client's verbs for searching."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import grpc

from hashlens import convert
from hashlens.client import wire
from hashlens.client._sync_calls import Calls
from hashlens.errors import HashlensError
from hashlens.rpc.status import error_of_call
from hashlens.types import (
    AuditResult,
    BallPart,
    Embedding,
    Query,
    SearchOptions,
    SearchResult,
    TagFilter,
)
from hashlens.v1 import search_service_pb2 as spb


class SearchCalls(Calls):
    """Queries."""

    def search(
        self,
        collection: str,
        *,
        image: bytes | None = None,
        embedding: Embedding | None = None,
        id: str | None = None,  # noqa: A002 - the contract's word
        k: int = 10,
        options: SearchOptions | None = None,
        deadline_s: float | None = None,
    ) -> SearchResult:
        """Return the nearest items to an image, an embedding or a stored item.

        Parameters
        ----------
        collection
            Its name.
        image, embedding, id
            The query, exactly one.
        k
            Hits wanted; `options`, when given, says it instead.
        options
            Everything else one can ask for.
        deadline_s
            Time for the call, in seconds; None for the client's.
        """
        query = wire.query_of(image, embedding, id)
        request = self._wire.search_request(collection, query, options or SearchOptions(k=k))
        return convert.result_from_proto(self._call(self._search.Search, request, deadline_s))

    def search_batch(
        self,
        collection: str,
        queries: Sequence[Query],
        *,
        k: int = 10,
        options: SearchOptions | None = None,
        deadline_s: float | None = None,
    ) -> list[SearchResult | HashlensError]:
        """Return an answer, or the error in its place, for each query, on one version of the data.

        See `search`.
        """
        request = self._wire.search_batch_request(
            collection, queries, options or SearchOptions(k=k)
        )
        reply = self._call(self._search.SearchBatch, request, deadline_s)
        return self._wire.search_results(reply)

    def audit(
        self,
        collection: str,
        *,
        image: bytes | None = None,
        embedding: Embedding | None = None,
        id: str | None = None,  # noqa: A002 - the contract's word
        k: int = 10,
        options: SearchOptions | None = None,
        deadline_s: float | None = None,
    ) -> AuditResult:
        """Answer a query as `search` does, and by comparing it with every item.

        The server reads every feature, a block at a time between other callers' searches: for a
        large collection, allow more time than for a search.

        Parameters
        ----------
        collection
            Its name; it has features.
        image, embedding, id
            The query, exactly one. Its feature is needed, whatever ranks the answer.
        k
            Hits wanted of both answers; `options`, when given, says it instead.
        options
            How to search, as for `search`. Ranked by Hamming distance, the answer is that of the
            coarse stage alone, and so is its recall.
        deadline_s
            Time for the call, in seconds; None for the client's.

        Raises
        ------
        PreconditionError
            The collection holds codes only.
        OverloadedError
            The server is at another audit.
        """
        query = wire.query_of(image, embedding, id)
        request = self._wire.audit_request(collection, query, options or SearchOptions(k=k))
        return convert.audit_from_proto(self._call(self._search.Audit, request, deadline_s))

    def stream_ball(
        self,
        collection: str,
        *,
        radius_bits: int,
        image: bytes | None = None,
        embedding: Embedding | None = None,
        id: str | None = None,  # noqa: A002 - the contract's word
        with_payload: bool = True,
        with_code: bool = False,
        filter: TagFilter | None = None,  # noqa: A002 - the contract's word
        min_version: int = 0,
        deadline_s: float | None = None,
    ) -> Generator[BallPart]:
        """Return all items within a Hamming radius, part by part, in the order of writing.

        However many there are, neither side holds more than a part. The last part has the receipt.
        Closing the iterator, or dropping it, stops the server.

        Parameters
        ----------
        collection
            Its name.
        radius_bits
            Largest Hamming distance, 0 to the collection's code length.
        image, embedding, id
            The centre, exactly one.
        with_payload, with_code
            What hits carry beside id and distance.
        filter
            Only items that pass; None: all.
        min_version
            Wait until the replica has applied this version, and this client's own writes; not
            longer than the server's default deadline.
        deadline_s
            Time for the whole ball, reading included, in seconds; None for the client's.

        Raises
        ------
        UnavailableError
            While iterating: the server went away before the end.
        """
        query = wire.query_of(image, embedding, id)
        request = self._wire.ball_request(
            collection, query, radius_bits, with_payload, with_code, filter, min_version
        )
        return self._parts(request, deadline_s)

    def _parts(
        self, request: spb.StreamBallRequest, deadline_s: float | None
    ) -> Generator[BallPart]:
        call = self._call(self._search.StreamBall, request, deadline_s)
        try:
            for message in call:
                yield convert.ball_part_from_proto(message)
        except grpc.RpcError as failure:
            raise error_of_call(failure) from None
        finally:
            call.cancel()

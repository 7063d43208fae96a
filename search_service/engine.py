"""Two-stage search over a snapshot, and a receipt that says how the answer came about.

Source: Lin, Yang, Hsiao, Chen, "Deep Learning of Binary Hash Codes for Fast Image Retrieval", CVPR
Workshops 2015, section 3.3.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hashlens.packed import PackedHits
from hashlens.types import (
    Embedding,
    Rank,
    SearchOptions,
    SearchResult,
)
from search_service import coarse, explain, multi_index, sketch
from search_service.cancel import AnyOf, Cancel
from search_service.filtered import filtered
from search_service.index_keeper import IndexKeeper
from search_service.multi_index import MultiIndex
from search_service.one_query import Ask, OneQuery, embedding_of
from search_service.scan import Scratch
from search_service.sketches import Sketches
from search_service.snapshot import Snapshot
from search_service.threads import threads_for

Deliver = Callable[[int, "SearchResult | Exception"], None]
"""Takes the position of a query and its answer, as soon as that is there."""


_TINY_CODE_BYTES = 1 << 21
_TINY_FEATURE_BYTES = 1 << 25
_TINY_K = 1000
_TINY_PAYLOAD_BYTES = 1 << 20


def is_tiny(snapshot: Snapshot, options: SearchOptions) -> bool:
    """Tell whether a search takes a few hundred microseconds, whatever its pool, and one thread."""
    feature_bytes = snapshot.rows * snapshot.dim * snapshot.feature_dtype.n_bytes
    return (
        8 * snapshot.rows * len(snapshot.words) <= _TINY_CODE_BYTES
        and feature_bytes <= _TINY_FEATURE_BYTES
        and options.k <= _TINY_K
        and not options.with_feature
        and not options.with_explanation
        and not (options.with_payload and _payload_bytes(snapshot, options.k) > _TINY_PAYLOAD_BYTES)
    )


def _payload_bytes(snapshot: Snapshot, k: int) -> float:
    """Return about how long the payloads of `k` hits are together."""
    payloads = snapshot.ids.payload_texts()
    if payloads is None or snapshot.rows == 0:
        return 0.0
    return k * int(payloads.ends[snapshot.rows - 1]) / snapshot.rows


class Engine:
    """Searches snapshots, of any collection, one search or batch of them at a time.

    Calls from several threads take turns. In a process with an `Executor`, search through it: two
    engines entered at once may meet in Numba's threading layer, which not every layer survives.

    Parameters
    ----------
    sketches
        Saves the fine stage from reading most features of a large pool. Default: all are read.
    indexes
        Saves the coarse stage from reading all codes of a large table, where the radius is small.
        Default: all are read.
    max_payload_bytes
        Longest payloads of one answer together; more are refused before they are read.
    """

    def __init__(
        self,
        *,
        sketches: Sketches | None = None,
        indexes: IndexKeeper | None = None,
        max_payload_bytes: int = 1 << 31,
    ) -> None:
        self._max_payload_bytes = max_payload_bytes
        self._sketches = sketches
        self._indexes = indexes
        self._scratch = Scratch()
        self._turn = threading.Lock()

    def search(
        self,
        snapshot: Snapshot,
        query: Embedding,
        options: SearchOptions | None = None,
        cancel: Cancel | None = None,
        meanings: explain.Meanings | None = None,
    ) -> SearchResult:
        """Find the items most similar to a query.

        The coarse stage takes the rows within a Hamming radius, the fine stage orders those by
        (Euclidean distance, Hamming distance, id), or by (Hamming distance, asymmetric distance,
        id) if it is off. The order is total, and distances are the same bits on every machine.

        The asymmetric distance, see `search_service.margins`, is 0 for a query without activations
        and where the options say to ignore them.

        Parameters
        ----------
        snapshot
            What to search.
        query
            What to look for: a code as long as the snapshot's, and for the fine stage a finite
            feature as wide. A float16 feature is widened, which changes nothing. Activations, if
            there are any, one in 0..1 per bit.
        options
            How; default ``SearchOptions()``. `min_version` is not the engine's.
        cancel
            Polled between blocks of work; default: runs to the end.
        meanings
            What the snapshot's model makes of codes, for an explanation; default: not known.

        Returns
        -------
        SearchResult
            At most `k` hits, best first; fewer if the pool holds fewer. Codes and features of hits
            are copies. Timings other than coarse, fine, fetch and total are 0.

        Raises
        ------
        InvalidInputError
            The query does not fit the snapshot, or an option is out of range.
        PreconditionError
            Another model made the query.
        CancelledError, DeadlineError
            As `cancel` says.
        """
        options, cancel = options or SearchOptions(), cancel or Cancel()
        if options.filter is not None:
            snapshot = filtered(snapshot, options.filter, cancel)
        ask = Ask(
            query=query,
            options=replace(options, filter=None),
            cancel=cancel,
            meanings=meanings or explain.Meanings(),
        )
        answers: list[SearchResult | Exception] = []
        self.search_batch(snapshot, [ask], lambda _, answer: answers.append(answer))
        answer = answers[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer.hits, PackedHits) and not options.packed:
            return replace(answer, hits=answer.hits.unpacked())
        return answer

    def search_batch(self, snapshot: Snapshot, asks: Sequence[Ask], deliver: Deliver) -> None:
        """Answer several queries, with one pass over the codes for all of them.

        Each answer is what `search` returns or raises for that query alone, but for hits, which are
        `PackedHits` wherever those can hold them. An error, a flag or a deadline of one query is
        its own.

        Parameters
        ----------
        snapshot
            What to search.
        asks
            The queries. Their options have no filter: it is the snapshot that is filtered, see
            `search_service.filtered`.
        deliver
            Called once for each, in the order of `asks` but for those that fail early.
        """
        with self._turn:
            began_ns = time.perf_counter_ns()
            searches: list[OneQuery] = []
            for number, ask in enumerate(asks):
                try:
                    searches.append(OneQuery(snapshot, ask, number))
                except Exception as error:
                    deliver(number, error)
            pools: list[coarse.Pool | Exception]
            index = None if self._indexes is None else self._indexes.index_for(snapshot)
            try:
                pools = [*_find_pools(snapshot, searches, self._scratch, index)]
            except Exception as error:
                if len(searches) == 1:
                    deliver(searches[0].number, error)
                    return
                # One of them asked for too much. Each alone, so that it meets nobody else.
                pools = [
                    _pool_or_error(snapshot, search, self._scratch, index) for search in searches
                ]
            coarse_ns = time.perf_counter_ns() - began_ns
            known = None if self._sketches is None else self._sketches.of(snapshot)
            pools.reverse()
            for search in searches:
                try:
                    answer = search.answer(
                        _pool_of(pools.pop()),  # Each may be large, and goes when it is done.
                        known,
                        coarse_ns=coarse_ns,
                        n_queries=len(searches),
                        max_payload_bytes=self._max_payload_bytes,
                    )
                except Exception as error:
                    deliver(search.number, error)
                else:
                    deliver(search.number, answer)

    def warm_up(self) -> None:
        """Compile the kernels and start their threads, by searching a tiny snapshot."""
        snapshot = Snapshot.from_arrays(
            np.zeros((2, 1), dtype=np.uint8), n_bits=8, features=np.zeros((2, 1), dtype=np.float32)
        )
        coarse.compile_kernels()
        stored = embedding_of(snapshot, "0")
        self.search(snapshot, stored)
        sure = replace(stored, activations=np.zeros(8, dtype=np.float32))
        self.search(snapshot, sure, SearchOptions(rank=Rank.HAMMING))
        if self._sketches is not None:
            sketch.warm_up()
        if self._indexes is not None:
            multi_index.compile_kernels()


def _find_pools(
    snapshot: Snapshot,
    searches: Sequence[OneQuery],
    scratch: Scratch,
    index: MultiIndex | None,
) -> list[coarse.Pool]:
    """Find the pool of each query, in one pass over the codes."""
    if not searches:
        return []
    wanted = [
        coarse.Wanted(
            query=search.words,
            radius_bits=search.ask.options.max_hamming_bits,
            n_rows=max(search.ask.options.k, search.ask.options.min_pool),
            max_rows=search.ask.options.max_pool if search.by_feature else None,
            weights=search.weights,
        )
        for search in searches
    ]
    cancels = [search.ask.cancel for search in searches]
    cancel = cancels[0] if len(cancels) == 1 else AnyOf(cancels)
    n_compared = snapshot.rows if snapshot.few is None else snapshot.n_alive
    with threads_for(8 * n_compared * len(snapshot.words) * len(searches)):
        return coarse.find_pools(snapshot, wanted, scratch=scratch, cancel=cancel, index=index)


def _pool_of(found: coarse.Pool | Exception) -> coarse.Pool:
    if isinstance(found, Exception):
        raise found
    return found


def _pool_or_error(
    snapshot: Snapshot, search: OneQuery, scratch: Scratch, index: MultiIndex | None
) -> coarse.Pool | Exception:
    try:
        return _find_pools(snapshot, [search], scratch, index)[0]
    except Exception as error:
        return error

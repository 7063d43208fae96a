"""Queries, options, hits and receipts of `search_service.proto`."""

from __future__ import annotations

from collections.abc import Callable

from hashlens.convert.collection import check_id
from hashlens.convert.embedding import (
    embedding_from_proto,
    embedding_to_proto,
    encode_timings_from_proto,
    encode_timings_to_proto,
    feature_from_proto,
    feature_to_proto,
)
from hashlens.convert.packed import packed_hits_from_proto, packed_hits_to_proto
from hashlens.convert.tag_filter import filter_from_proto, filter_to_proto
from hashlens.errors import InvalidInputError
from hashlens.packed import PackedHits
from hashlens.types import (
    MAX_K,
    BallPart,
    ExplainedBit,
    Explanation,
    Hit,
    Prediction,
    Query,
    Rank,
    Receipt,
    ReplyExplanation,
    SearchOptions,
    SearchResult,
    StageTimings,
    TagFilter,
)
from hashlens.v1 import embedding_pb2 as epb
from hashlens.v1 import search_service_pb2 as spb

HITS_AT_ONCE = 1000
"""Hits that are converted between two looks at whether anybody waits: a few milliseconds."""

_RANK_TO_PROTO = {
    Rank.AUTO: spb.RANK_UNSPECIFIED,
    Rank.EUCLIDEAN: spb.RANK_EUCLIDEAN,
    Rank.HAMMING: spb.RANK_HAMMING,
}
_RANK_FROM_PROTO = {number: rank for rank, number in _RANK_TO_PROTO.items()}
_DEFAULTS = SearchOptions()


def query_to_proto(query: Query) -> spb.Query:
    """Return the wire form."""
    if query.embedding is not None:
        return spb.Query(embedding=embedding_to_proto(query.embedding))
    if query.image is not None:
        return spb.Query(image=query.image)
    return spb.Query(id=query.id or "")


def query_from_proto(message: spb.Query) -> Query:
    """Return the value; InvalidInputError unless one kind of query is there and well formed."""
    kind = message.WhichOneof("query")
    if kind == "embedding":
        try:
            return Query(embedding=embedding_from_proto(message.embedding))
        except InvalidInputError as error:
            raise error.within("embedding") from None
    if kind == "image":
        return Query(image=message.image)
    if kind == "id":
        return Query(id=check_id(message.id))
    raise InvalidInputError("a query is an image, an embedding or an id: send one of them")


def options_to_proto(options: SearchOptions) -> spb.SearchOptions:
    """Return the wire form."""
    return spb.SearchOptions(
        k=options.k,
        max_hamming_bits=options.max_hamming_bits,
        min_pool=options.min_pool,
        max_pool=options.max_pool,
        rank=_RANK_TO_PROTO[options.rank],
        with_payload=options.with_payload,
        with_code=options.with_code,
        with_feature=options.with_feature,
        with_explanation=options.with_explanation,
        min_version=options.min_version,
        ignore_margins=options.ignore_margins,
        packed=options.packed,
        filter=filter_to_proto(options.filter),
    )


def options_from_proto(message: spb.SearchOptions) -> SearchOptions:
    """Return the value; InvalidInputError for what no collection could answer."""
    if not 1 <= message.k <= MAX_K:
        raise InvalidInputError(f"k is {message.k}: ask for 1 to {MAX_K} hits", field="k")
    max_pool = message.max_pool if message.HasField("max_pool") else None
    if max_pool is not None and max_pool < message.k:
        raise InvalidInputError(
            f"max_pool is {max_pool}, less than k = {message.k}: raise it, or ask for fewer hits",
            field="max_pool",
        )
    rank = _RANK_FROM_PROTO.get(message.rank)
    if rank is None:
        raise InvalidInputError(
            f"{message.rank} is no rank: use EUCLIDEAN or HAMMING", field="rank"
        )
    if message.packed and (message.with_feature or message.with_explanation):
        raise InvalidInputError(
            "packed hits carry no features and no explanations: leave one of them out",
            field="packed",
        )
    wanted: TagFilter | None = None
    if message.HasField("filter"):
        try:
            wanted = filter_from_proto(message.filter)
        except InvalidInputError as error:
            raise error.within("filter") from None
    return SearchOptions(
        k=message.k,
        max_hamming_bits=(
            message.max_hamming_bits if message.HasField("max_hamming_bits") else None
        ),
        min_pool=message.min_pool if message.HasField("min_pool") else _DEFAULTS.min_pool,
        max_pool=max_pool,
        rank=rank,
        with_payload=message.with_payload,
        with_code=message.with_code,
        with_feature=message.with_feature,
        with_explanation=message.with_explanation,
        min_version=message.min_version,
        ignore_margins=message.ignore_margins,
        packed=message.packed,
        filter=wanted,
    )


def ball_part_from_proto(message: spb.StreamBallResponse) -> BallPart:
    """Return the value."""
    return BallPart(
        hits=tuple(hit_from_proto(hit) for hit in message.hits),
        receipt=receipt_from_proto(message.receipt) if message.HasField("receipt") else None,
    )


def ball_part_to_proto(part: BallPart, n_bits: int) -> spb.StreamBallResponse:
    """Return the wire form; `n_bits` is the width of the collection's codes."""
    return spb.StreamBallResponse(
        hits=[hit_to_proto(hit, n_bits) for hit in part.hits],
        receipt=None if part.receipt is None else receipt_to_proto(part.receipt),
    )


def hit_to_proto(hit: Hit, n_bits: int) -> spb.Hit:
    """Return the wire form; `n_bits` is the width of the hit's code."""
    message = spb.Hit(
        id=hit.id, hamming_bits=hit.hamming_bits, distance=hit.distance, payload=hit.payload
    )
    if hit.code is not None:
        message.code.CopyFrom(epb.Code(bits=hit.code, n_bits=n_bits))
    if hit.feature is not None:
        message.feature.CopyFrom(feature_to_proto(hit.feature))
    if hit.explanation is not None:
        message.explanation.CopyFrom(_explanation_to_proto(hit.explanation))
    return message


def hit_from_proto(message: spb.Hit) -> Hit:
    """Return the value."""
    return Hit(
        id=message.id,
        hamming_bits=message.hamming_bits,
        distance=message.distance if message.HasField("distance") else None,
        payload=message.payload,
        code=message.code.bits if message.HasField("code") else None,
        feature=feature_from_proto(message.feature) if message.HasField("feature") else None,
        explanation=(
            _explanation_from_proto(message.explanation)
            if message.HasField("explanation")
            else None
        ),
    )


def _explanation_to_proto(explanation: Explanation) -> spb.Explanation:
    return spb.Explanation(
        differing_bits=explanation.differing_bits,
        certainty=explanation.certainty,
        prediction=_prediction_to_proto(explanation.prediction),
    )


def _explanation_from_proto(message: spb.Explanation) -> Explanation:
    return Explanation(
        differing_bits=tuple(message.differing_bits),
        certainty=_certainty_from_proto(message),
        prediction=_prediction_from_proto(message),
    )


def _prediction_to_proto(prediction: Prediction | None) -> spb.Prediction | None:
    if prediction is None:
        return None
    return spb.Prediction(class_index=prediction.class_index, probability=prediction.probability)


def _prediction_from_proto(holder: spb.Explanation | spb.ReplyExplanation) -> Prediction | None:
    if not holder.HasField("prediction"):
        return None
    probability = holder.prediction.probability
    if not 0 <= probability <= 1:  # NaN fails, too
        raise InvalidInputError(
            f"{probability} is no probability: one lies in 0..1", field="prediction.probability"
        )
    return Prediction(holder.prediction.class_index, probability)


def _certainty_from_proto(holder: spb.Explanation | spb.ReplyExplanation) -> tuple[float, ...]:
    certainty = tuple(holder.certainty)
    if not all(0 <= margin <= 0.5 for margin in certainty):
        raise InvalidInputError("a certainty |H - 0.5| lies in 0..0.5", field="certainty")
    return certainty


def reply_explanation_to_proto(explanation: ReplyExplanation, n_bits: int) -> spb.ReplyExplanation:
    """Return the wire form; `n_bits` is the width of the query's code."""
    return spb.ReplyExplanation(
        code=epb.Code(bits=explanation.code, n_bits=n_bits),
        certainty=explanation.certainty,
        prediction=_prediction_to_proto(explanation.prediction),
        bits=[
            spb.ExplainedBit(bit=bit.bit, fires_for=bit.fires_for, silent_for=bit.silent_for)
            for bit in explanation.bits
        ],
        classes=explanation.classes,
        detail=explanation.detail,
    )


def reply_explanation_from_proto(message: spb.ReplyExplanation) -> ReplyExplanation:
    """Return the value."""
    return ReplyExplanation(
        code=message.code.bits,
        certainty=_certainty_from_proto(message),
        prediction=_prediction_from_proto(message),
        bits=tuple(
            ExplainedBit(bit.bit, tuple(bit.fires_for), tuple(bit.silent_for))
            for bit in message.bits
        ),
        classes=tuple(message.classes),
        detail=message.detail,
    )


def receipt_to_proto(receipt: Receipt) -> spb.Receipt:
    """Return the wire form."""
    timings = receipt.timings
    return spb.Receipt(
        rows_scanned=receipt.rows_scanned,
        threshold_bits=receipt.threshold_bits,
        pool_size=receipt.pool_size,
        pool_histogram=receipt.pool_histogram,
        pool_truncated=receipt.pool_truncated,
        rows_without_feature=receipt.rows_without_feature,
        exact=receipt.exact,
        version=receipt.version,
        timings=spb.StageTimings(
            wait_version_ns=timings.wait_version_ns,
            encode=encode_timings_to_proto(timings.encode),
            encode_call_ns=timings.encode_call_ns,
            queue_ns=timings.queue_ns,
            coarse_ns=timings.coarse_ns,
            fine_ns=timings.fine_ns,
            fetch_ns=timings.fetch_ns,
            total_ns=timings.total_ns,
            batch_queries=timings.batch_queries,
        ),
        margins_used=receipt.margins_used,
    )


def receipt_from_proto(message: spb.Receipt) -> Receipt:
    """Return the value."""
    timings = message.timings
    return Receipt(
        rows_scanned=message.rows_scanned,
        threshold_bits=message.threshold_bits,
        pool_size=message.pool_size,
        pool_histogram=tuple(message.pool_histogram),
        pool_truncated=message.pool_truncated,
        rows_without_feature=message.rows_without_feature,
        exact=message.exact,
        version=message.version,
        timings=StageTimings(
            wait_version_ns=timings.wait_version_ns,
            encode=encode_timings_from_proto(timings.encode),
            encode_call_ns=timings.encode_call_ns,
            queue_ns=timings.queue_ns,
            coarse_ns=timings.coarse_ns,
            fine_ns=timings.fine_ns,
            fetch_ns=timings.fetch_ns,
            total_ns=timings.total_ns,
            batch_queries=timings.batch_queries,
        ),
        margins_used=message.margins_used,
    )


def result_to_proto(
    result: SearchResult,
    n_bits: int,
    *,
    packed: bool = False,
    check: Callable[[], None] = lambda: None,
) -> spb.SearchResponse:
    """Return the wire form.

    Parameters
    ----------
    result
        What to send.
    n_bits
        Width of the collection's codes.
    packed
        Send `PackedHits` as they are, else a message for each hit.
    check
        Called every thousand hits or so, to raise if nobody waits for the reply any more.
    """
    hits = result.hits
    response = spb.SearchResponse(
        receipt=receipt_to_proto(result.receipt),
        explanation=(
            None
            if result.explanation is None
            else reply_explanation_to_proto(result.explanation, n_bits)
        ),
    )
    if isinstance(hits, PackedHits):
        if packed:
            response.packed.CopyFrom(packed_hits_to_proto(hits, n_bits))
        else:
            _spell_out(hits, n_bits, response, check)
    else:
        for lo in range(0, len(hits), HITS_AT_ONCE):
            check()
            part = hits[lo : lo + HITS_AT_ONCE]
            response.hits.extend([hit_to_proto(hit, n_bits) for hit in part])
    return response


def _spell_out(
    hits: PackedHits, n_bits: int, response: spb.SearchResponse, check: Callable[[], None]
) -> None:
    """Add a message for each hit, from the columns: making a `Hit` of it would double the cost."""
    add = response.hits.add
    ids = hits.ids()
    check()
    payloads, distances = hits.payloads(), hits.distances
    for lo in range(0, len(hits), HITS_AT_ONCE):
        check()
        place = slice(lo, lo + HITS_AT_ONCE)
        columns = (ids[place], hits.hamming_bits[place].tolist(), payloads[place])
        if distances is None:
            for item_id, bits, payload in zip(*columns, strict=True):
                add(id=item_id, hamming_bits=bits, payload=payload)
        else:
            for item_id, bits, payload, distance in zip(
                *columns, distances[place].tolist(), strict=True
            ):
                add(id=item_id, hamming_bits=bits, payload=payload, distance=distance)
        if hits.codes is not None:
            for message, code in zip(response.hits[place], hits.codes[place], strict=True):
                message.code.bits = code.tobytes()
                message.code.n_bits = n_bits


def result_from_proto(message: spb.SearchResponse) -> SearchResult:
    """Return the value."""
    return SearchResult(
        hits=(
            packed_hits_from_proto(message.packed)
            if message.HasField("packed")
            else tuple(hit_from_proto(hit) for hit in message.hits)
        ),
        receipt=receipt_from_proto(message.receipt),
        explanation=(
            reply_explanation_from_proto(message.explanation)
            if message.HasField("explanation")
            else None
        ),
    )

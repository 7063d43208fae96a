"""What Prometheus is told of the store."""

from __future__ import annotations

from collections.abc import Iterator

from hashlens.rpc.metrics import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
    gauge,
)
from search_service.storage import Store

_GAUGES = {
    "hashlens_collection_items": ("Items that a search can find.", "n_items"),
    "hashlens_collection_dead_rows": ("Rows of replaced and deleted items.", "n_dead_rows"),
    "hashlens_collection_missing_features": (
        "Items whose feature is missing or damaged on this replica.",
        "n_missing_features",
    ),
    "hashlens_collection_version": ("The last write applied.", "version"),
    "hashlens_collection_checkpoint_version": (
        "Up to here all is safe in this replica's files.",
        "checkpoint_version",
    ),
    "hashlens_collection_writable": ("1 if writes are accepted.", "writable"),
}


def store_metrics(store: Store) -> Iterator[Metric]:
    """Return what there is to say at this moment; asks neither disk nor Redis."""
    collections = store.collections()
    infos = [collection.info() for collection in collections]
    for name, (text, field) in _GAUGES.items():
        family = GaugeMetricFamily(name, text, labels=["collection"])
        for info in infos:
            family.add_metric([info.spec.name], float(getattr(info, field)))
        yield family
    log_version, lag, log_entries = (
        GaugeMetricFamily(f"hashlens_collection_{name}", text, labels=["collection"])
        for name, text in (
            ("log_version", "The newest write that the log is known to have."),
            ("log_lag", "Writes in the log that this replica has not applied yet."),
            ("log_entries", "Entries of the log in Redis, looked at every few seconds."),
        )
    )
    for collection, info in zip(collections, infos, strict=True):
        newest = collection.log_version
        log_version.add_metric([info.spec.name], newest)
        lag.add_metric([info.spec.name], max(newest - info.version, 0))
        log_entries.add_metric([info.spec.name], collection.log_entries)
    yield from (log_version, lag, log_entries)
    yield from _redis(store, is_refused=any(c.is_refused for c in collections))
    yield from _counted(store)


def _redis(store: Store, *, is_refused: bool) -> Iterator[Metric]:
    state = store.redis
    yield gauge(
        "hashlens_redis_connected", "1 if the last call to Redis was answered.", state.is_connected
    )
    yield gauge(
        "hashlens_redis_writable",
        "1 if Redis answers and refuses no writes.",
        state.is_connected and not is_refused,
    )
    yield gauge("hashlens_redis_last_call_seconds", "The last call to Redis.", state.last_s)
    yield SummaryMetricFamily(
        "hashlens_redis_call_seconds",
        "Calls to Redis, those that read the log apart.",
        count_value=state.n_calls,
        sum_value=state.total_s,
    )
    yield CounterMetricFamily(
        "hashlens_redis_failures",
        "Calls to Redis without an answer, or with a refusal.",
        value=state.n_failures,
    )


def _counted(store: Store) -> Iterator[Metric]:
    counters = store.counters
    for name, text, value in (
        (
            "hashlens_store_quarantined",
            "Collections whose files were put aside because they were damaged.",
            counters.n_quarantined,
        ),
        (
            "hashlens_store_damaged_features",
            "Features that did not match their checksums.",
            counters.n_damaged_features,
        ),
        (
            "hashlens_store_scrubbed_rows",
            "Rows whose feature the scrubber has read.",
            counters.n_rows_scrubbed,
        ),
        (
            "hashlens_store_failed_checkpoints",
            "Checkpoints that the disk did not take.",
            counters.n_failed_checkpoints,
        ),
        (
            "hashlens_store_copied",
            "Collections whose files were copied from another replica.",
            counters.n_copied,
        ),
        (
            "hashlens_store_rebuilt",
            "Collections whose files were made anew from Redis.",
            counters.n_rebuilt,
        ),
    ):
        yield CounterMetricFamily(name, text, value=value)

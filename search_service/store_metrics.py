"""What Prometheus is told of the store."""

from __future__ import annotations

from collections.abc import Iterator

from hashlens.rpc.metrics import CounterMetricFamily, GaugeMetricFamily, Metric
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
    infos = store.infos()
    for name, (text, field) in _GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=["collection"])
        for info in infos:
            gauge.add_metric([info.spec.name], float(getattr(info, field)))
        yield gauge
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

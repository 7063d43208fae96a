"""What Prometheus is told of who is let in, and of the event loop."""

from __future__ import annotations

from collections.abc import Iterator

from hashlens.rpc.admission import Admission
from hashlens.rpc.metrics import CounterMetricFamily, GaugeMetricFamily, Metric, gauge
from hashlens.rpc.watchdog import LoopWatchdog


def server_metrics(admission: Admission, watchdog: LoopWatchdog) -> Iterator[Metric]:
    """Return what there is to say at this moment; from any thread."""
    limits = GaugeMetricFamily(
        "hashlens_rpc_limit", "Calls that are let in at a time.", labels=["method"]
    )
    cut = CounterMetricFamily(
        "hashlens_rpc_cut",
        "Calls ended because their caller did not send, or did not read.",
        labels=["method"],
    )
    for path, lane in admission.lanes.items():
        method = path.rpartition(".")[2]  # As other metrics call it: Service/Method.
        limits.add_metric([method], lane.max_in_flight)
        cut.add_metric([method], lane.n_cut)
    yield limits
    yield cut
    intake = admission.intake
    yield gauge(
        "hashlens_rpc_request_bytes",
        "Bytes of requests that are read or in the works, or may yet come.",
        intake.held_bytes,
    )
    yield gauge("hashlens_rpc_request_bytes_limit", "Most of them.", intake.max_bytes)
    yield CounterMetricFamily(
        "hashlens_loop_stalls",
        "Times that the event loop has not turned for --stall-s.",
        value=watchdog.n_stalls,
    )
    yield gauge(
        "hashlens_loop_lag_seconds", "How much later than due the loop last turned.", watchdog.lag_s
    )

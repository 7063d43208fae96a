"""Numbers about a server, for Prometheus to come and read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Source = Callable[[], Iterable[Metric]]
"""Returns what there is to say at this moment; called from a thread of its own."""

__all__ = ["CounterMetricFamily", "GaugeMetricFamily", "Metric", "Source", "exposed"]


class _Read(Collector):
    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        return self._source()

    def describe(self) -> Iterable[Metric]:
        # Not at registration, when there may be nothing to say yet.
        return []


@contextmanager
def exposed(address: str, source: Source) -> Iterator[str]:
    """Serve ``/metrics`` over HTTP while the block runs; yield where.

    Parameters
    ----------
    address
        ``host:port``; port 0 takes a free one.
    source
        Read at each request.

    Raises
    ------
    OSError
        The address cannot be had.
    """
    host, _, port = address.rpartition(":")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Read(source))
    server, thread = start_http_server(int(port), host, registry)
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""The port that Prometheus reads: HTTP, a thread for each request, and bounds for strangers."""

from __future__ import annotations

import io
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

Source = Callable[[], Iterable[Metric]]
"""Returns what there is to say at this moment; called from a thread of its own."""

MOST_CONNECTIONS: Final = 16
"""More are closed at once. Each may take a thread, and some megabytes of headers."""

LONGEST_S: Final = 30.0
"""A connection that is not done by then is closed, in seconds."""

_SILENCE_S = 10.0
_POLL_S = 0.5

logger = logging.getLogger(__name__)


class _Handler(WSGIRequestHandler):
    timeout = _SILENCE_S  # For each piece that is read or written.

    def log_message(self, *_: Any) -> None:
        """Write nothing: what strangers ask for is not for the log."""

    def get_stderr(self) -> io.StringIO:
        """Take what wsgiref says of connections that break, and keep it from the log."""
        return io.StringIO()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, host: str, port: int) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, address = found[0][0], found[0][4]
        self._began_s: dict[Any, float] = {}
        self._lock = threading.Lock()
        super().__init__((str(address[0]), int(address[1])), _Handler)

    def server_bind(self) -> None:
        """Bind, without asking the name service who this is."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Tell whether there is a place for one more connection."""
        with self._lock:
            return len(self._began_s) < MOST_CONNECTIONS

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own."""
        with self._lock:
            self._began_s[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, whose place is free then."""
        with self._lock:
            self._began_s.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """End connections that take too long; called about twice a second."""
        late_s = time.monotonic() - LONGEST_S
        with self._lock:
            late = [request for request, began_s in self._began_s.items() if began_s < late_s]
        for request in late:
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say of a connection that broke only that it did; the default writes a traceback."""
        logger.debug("a request for metrics broke off", exc_info=True)


class _Read(Collector):
    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        try:
            return list(self._source())
        except Exception:
            logger.exception("the metrics cannot be read")
            raise

    def describe(self) -> Iterable[Metric]:
        # Not at registration, when there may be nothing to say yet.
        return []


@contextmanager
def exposed(address: str, source: Source) -> Iterator[str]:
    """Serve ``/metrics`` over HTTP while the block runs; yield where.

    At most `MOST_CONNECTIONS` at a time, each for at most `LONGEST_S`.

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
    try:
        server = _Server(host.strip("[]"), int(port))
    except OSError as error:
        raise OSError(
            f"cannot serve metrics on {address}: it is in use, or no address of this machine "
            f"({error})"
        ) from None
    server.set_app(make_wsgi_app(registry))
    thread = threading.Thread(
        target=server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True
    )
    thread.start()
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

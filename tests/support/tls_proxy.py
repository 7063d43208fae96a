"""TLS before a server's Unix socket, for servers that are built without it."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from pathlib import Path
from typing import Self

from tests.support.certificates import Pair

_POLL_S = 0.05
_READ_BYTES = 1 << 16


class TlsProxy:
    """Takes TLS connections on a port of 127.0.0.1 and passes what they say to a socket.

    Parameters
    ----------
    upstream
        The server's Unix socket.
    pair
        What clients are shown.
    client_ca
        Who has to have signed what clients show; None: they need not show anything.
    """

    def __init__(self, upstream: Path, pair: Pair, client_ca: Path | None = None) -> None:
        self._upstream = upstream
        self._pair = pair
        self._client_ca = client_ca
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(_POLL_S)
        self.port: int = self._listener.getsockname()[1]
        self.versions: set[str | None] = set()
        """Of TLS, that were spoken."""
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._accept, name="tls-proxy")]

    @property
    def url(self) -> str:
        return f"rediss://localhost:{self.port}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._pair.cert, self._pair.key)
        if self._client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self._client_ca)
        with client, contextlib.suppress(OSError):
            client.settimeout(10)
            secure = context.wrap_socket(client, server_side=True)
            with secure, socket.socket(socket.AF_UNIX) as server:
                self.versions.add(secure.version())
                server.connect(str(self._upstream))
                self._pass_on(secure, server)

    def _pass_on(self, secure: ssl.SSLSocket, server: socket.socket) -> None:
        secure.settimeout(_POLL_S / 5)
        server.settimeout(_POLL_S / 5)
        while not self._stopping.is_set():
            for source, sink in ((secure, server), (server, secure)):
                try:
                    data = source.recv(_READ_BYTES)
                except TimeoutError:
                    continue
                if not data:
                    return
                sink.settimeout(10)
                sink.sendall(data)
                sink.settimeout(_POLL_S / 5)

"""A TCP port in front of a server's Unix socket that leads elsewhere, cuts and stalls when told."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

_POLL_S = 0.05
_SEND_S = 30.0
_READ_BYTES = 1 << 16

How = Literal["close", "reset", "stall", "lose"]
"""End the connection; end it the hard way; pass nothing more on; do not pass the request on."""


@dataclass(frozen=True)
class Harm:
    """What to do to one reply."""

    mark: bytes
    """Bytes of the request that it answers."""
    after: int
    """How many bytes of the reply pass before."""
    how: How
    always: bool
    """To all such replies, not to one only."""


@dataclass(eq=False)
class _Pair:
    """A client's connection and ours to the server."""

    client: socket.socket
    server: socket.socket
    asked: bytearray = field(default_factory=bytearray)
    """What the client has sent since the last reply."""
    harm: Harm | None = None
    passed: int = 0
    """Bytes of the reply to be harmed that have passed."""


class Proxy:
    """Passes bytes both ways between its clients and one server.

    Parameters
    ----------
    upstream
        The server's Unix socket; None: connections are closed at once.
    """

    def __init__(self, upstream: Path | None) -> None:
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: list[_Pair] = []
        self._harm: Harm | None = None
        self._lock = threading.RLock()
        self.harmed = threading.Event()
        """Set when the harm that was asked for is done."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def lead_to(self, upstream: Path | None) -> None:
        """Connect new clients to another server, as a changed DNS name does; old ones stay."""
        self._upstream = upstream

    def cut(self) -> None:
        """End all connections."""
        with self._lock:
            for pair in self._pairs:
                # The thread that serves them sees the end and closes them.
                with contextlib.suppress(OSError):
                    pair.client.shutdown(socket.SHUT_RDWR)

    def harm(self, mark: bytes, after: int, how: How, *, always: bool = False) -> None:
        """Harm the next reply to a request that contains `mark`, or all until `relent`."""
        with self._lock:
            self.harmed.clear()
            self._harm = Harm(mark, after, how, always)

    def relent(self) -> None:
        """Do no harm that was asked for and is not done yet."""
        with self._lock:
            self._harm = None
            for pair in self._pairs:
                pair.harm = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector, self._listener:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._stopping.is_set():
                for key, _ in selector.select(_POLL_S):
                    with self._lock:
                        if key.fileobj is self._listener:
                            self._accept(selector)
                        elif key.data in self._pairs:
                            self._pass_on(selector, key.data, key.fileobj is key.data.client)
            for pair in list(self._pairs):
                self._end(selector, pair)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        client, _ = self._listener.accept()
        server = socket.socket(socket.AF_UNIX)
        try:
            if self._upstream is None:
                raise ConnectionRefusedError
            server.connect(str(self._upstream))
        except OSError:
            client.close()
            server.close()
            return
        pair = _Pair(client, server)
        self._pairs.append(pair)
        for end in (client, server):
            end.settimeout(_SEND_S)
            selector.register(end, selectors.EVENT_READ, pair)

    def _pass_on(self, selector: selectors.BaseSelector, pair: _Pair, from_client: bool) -> None:
        try:
            data = (pair.client if from_client else pair.server).recv(_READ_BYTES)
            if not data:
                self._end(selector, pair)
            elif from_client:
                self._pass_request(selector, pair, data)
            else:
                self._pass_reply(selector, pair, data)
        except OSError:
            self._end(selector, pair)

    def _pass_request(self, selector: selectors.BaseSelector, pair: _Pair, data: bytes) -> None:
        pair.asked += data
        harm = self._harm
        if harm is not None and harm.how == "lose" and harm.mark in pair.asked:
            self._harm = harm if harm.always else None
            self.harmed.set()
            self._end(selector, pair)
            return
        pair.server.sendall(data)

    def _pass_reply(self, selector: selectors.BaseSelector, pair: _Pair, data: bytes) -> None:
        harm = self._harm
        if harm is not None and harm.how != "lose" and harm.mark in pair.asked:
            self._harm = harm if harm.always else None
            pair.harm, pair.passed = harm, 0
        pair.asked.clear()
        harm = pair.harm
        if harm is None:
            pair.client.sendall(data)
            return
        data = data[: harm.after - pair.passed]
        pair.client.sendall(data)
        pair.passed += len(data)
        if pair.passed < harm.after:
            return
        self.harmed.set()
        if harm.how == "stall":
            # Whatever the server says from here on, nobody hears it.
            selector.unregister(pair.server)
        else:
            if harm.how == "reset":
                linger = struct.pack("ii", 1, 0)
                pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._end(selector, pair)

    def _end(self, selector: selectors.BaseSelector, pair: _Pair) -> None:
        self._pairs.remove(pair)
        for end in (pair.client, pair.server):
            with contextlib.suppress(KeyError):
                selector.unregister(end)
            end.close()

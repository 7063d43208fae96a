"""Channels that are opened anew when their certificates change.

gRPC fixes what a channel shows when it is made. Each of these stands before one after the other:
a call begins on the newest, and ends where it began.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import grpc

from hashlens.rpc.tls import Pem
from hashlens.rpc.watched import Watched

C = TypeVar("C")

_LONGEST_CALL_S: Final = 3600.0
"""Calls that began on an older channel have so long to end, in seconds."""


class _Calls(Generic[C]):
    """The calls of one method: what a stub holds."""

    def __init__(
        self, current: Callable[[], C], kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._current = current
        self._kind = kind
        self._args = args
        self._kwargs = kwargs
        self._made: tuple[C, Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Begin a call."""
        return self._newest()(*args, **kwargs)

    def with_call(self, *args: Any, **kwargs: Any) -> Any:
        """Begin a blocking call whose trailing metadata is asked for."""
        return self._newest().with_call(*args, **kwargs)

    def future(self, *args: Any, **kwargs: Any) -> Any:
        """Begin a blocking channel's call that is not waited for."""
        return self._newest().future(*args, **kwargs)

    def _newest(self) -> Any:
        channel = self._current()
        made = self._made
        if made is None or made[0] is not channel:
            self._made = made = (channel, self._make(channel))
        return made[1]

    def _make(self, channel: C) -> Any:
        return getattr(channel, self._kind)(*self._args, **self._kwargs)


class FreshChannel(grpc.Channel):
    """A channel for blocking calls; thread-safe.

    Parameters
    ----------
    pems
        What to show and ask for.
    opened
        Opens a channel with that.
    """

    def __init__(self, pems: Watched[Pem], opened: Callable[[Pem], grpc.Channel]) -> None:
        self._pems = pems
        self._opened = opened
        self._lock = threading.Lock()
        self._pem = pems.value
        self._channel = opened(self._pem)
        self._older: list[tuple[float, grpc.Channel]] = []
        """With the times at which their last calls end."""
        self._closed = False

    def current(self) -> grpc.Channel:
        """Return the channel that shows what the files hold now."""
        pem = self._pems.value
        with self._lock:
            if pem is not self._pem and not self._closed:
                self._retire()
                self._pem = pem
                self._channel = self._opened(pem)
            return self._channel

    def _retire(self) -> None:
        now_s = time.monotonic()
        self._older.append((now_s + _LONGEST_CALL_S, self._channel))
        while self._older[0][0] <= now_s:
            self._older.pop(0)[1].close()

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        """See `grpc.Channel`."""
        return _Calls(self.current, "unary_unary", args, kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        """See `grpc.Channel`."""
        return _Calls(self.current, "unary_stream", args, kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        """See `grpc.Channel`."""
        return _Calls(self.current, "stream_unary", args, kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        """See `grpc.Channel`."""
        return _Calls(self.current, "stream_stream", args, kwargs)

    def subscribe(self, callback: Any, try_to_connect: bool = False) -> None:
        """See `grpc.Channel`; hears of the channel of this moment only."""
        self.current().subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Any) -> None:
        """See `grpc.Channel`."""
        self.current().unsubscribe(callback)

    def close(self) -> None:
        """End all calls."""
        with self._lock:
            self._closed = True
            channels = [self._channel, *(channel for _, channel in self._older)]
        for channel in channels:
            channel.close()

    def __enter__(self) -> FreshChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AioFreshChannel(grpc.aio.Channel):
    """A channel for calls that are awaited, in one event loop; see `FreshChannel`."""

    def __init__(self, pems: Watched[Pem], opened: Callable[[Pem], grpc.aio.Channel]) -> None:
        self._pems = pems
        self._opened = opened
        self._pem = pems.value
        self._channel = opened(self._pem)
        self._ending: dict[asyncio.Task[None], grpc.aio.Channel] = {}
        self._closed = False

    def current(self) -> grpc.aio.Channel:
        """Return the channel that shows what the files hold now."""
        pem = self._pems.value
        if pem is not self._pem and not self._closed:
            older = self._channel
            self._pem = pem
            self._channel = self._opened(pem)
            ending = asyncio.get_running_loop().create_task(older.close(_LONGEST_CALL_S))
            self._ending[ending] = older
            ending.add_done_callback(self._ending.pop)
        return self._channel

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        """See `grpc.aio.Channel`."""
        return _Calls(self.current, "unary_unary", args, kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        """See `grpc.aio.Channel`."""
        return _Calls(self.current, "unary_stream", args, kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        """See `grpc.aio.Channel`."""
        return _Calls(self.current, "stream_unary", args, kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        """See `grpc.aio.Channel`."""
        return _Calls(self.current, "stream_stream", args, kwargs)

    async def close(self, grace: float | None = None) -> None:
        """End all calls, after `grace` seconds at most."""
        self._closed = True
        ending = dict(self._ending)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        for channel in (self._channel, *ending.values()):
            await channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """See `grpc.aio.Channel`."""
        return self.current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """See `grpc.aio.Channel`; hears of the channel of this moment only."""
        await self.current().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """See `grpc.aio.Channel`."""
        await self.current().channel_ready()

    async def __aenter__(self) -> AioFreshChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

"""The way in from Python: `Client`, and `AsyncClient` with the same verbs awaited."""

from __future__ import annotations

from hashlens.client._async import AsyncClient
from hashlens.client._sync import Client
from hashlens.client.wire import ClientConfig

__all__ = ["AsyncClient", "Client", "ClientConfig"]

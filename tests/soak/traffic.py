"""Mixed traffic at a steady rate, as a process of its own; every call is written down.

``python -m tests.soak.traffic PLAN.json``: calls arrive at random, whether earlier ones have
returned or not, so a service that slows down is not spared.
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image

from hashlens import AsyncClient, ChannelSecurity, Item
from hashlens.cli.demo_data import load_demo_images
from hashlens.client.wire import ClientConfig
from hashlens.errors import HashlensError
from hashlens.types import Embedding, Query, SearchOptions

NAME = "soak"
N_PICTURES = 256
N_IDS = 20_000
N_KEPT = 2_000
"""The first ids are never deleted, so that queries by id find them."""
MAX_IN_FLIGHT = 128
"""Calls beyond are not made, and written down as such."""
SETUP_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the process is told, as JSON."""

    search: str
    encoder: str
    tls_ca: str
    tls_name: str
    token_file: str
    seconds: float
    rate: float
    """Times the rates of `OPERATIONS`."""
    seed: int
    calls: str
    """Where calls are written down, a line each."""
    deadline_s: float = 10.0

    @staticmethod
    def read(path: Path) -> Plan:
        return Plan(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


class Traffic:
    """The calls, and what they are made of."""

    def __init__(self, client: AsyncClient, plan: Plan, log: TextIO) -> None:
        self._client = client
        self._plan = plan
        self._log = log
        self._draw = random.Random(plan.seed)
        self._calls: set[asyncio.Task[None]] = set()
        images, _, _ = load_demo_images()
        self._pictures = [_jpeg(image) for image in images[:N_PICTURES]]
        self._embeddings: list[Embedding] = []

    async def prepare(self) -> None:
        """Make the collection and fill it."""
        await self._client.create_collection(NAME, expected_rows=N_IDS, deadline_s=SETUP_S)
        for encoded in await self._client.encode_batch(self._pictures, deadline_s=SETUP_S):
            if isinstance(encoded, HashlensError):
                raise encoded
            self._embeddings.append(encoded.embedding)
        items = [Item(id=f"i{n}", embedding=self._embedding()) for n in range(N_IDS)]
        await self._client.upsert(NAME, items, deadline_s=SETUP_S)

    async def run(self) -> None:
        """Make calls for as long as planned, then wait for the last."""
        ends_s = time.monotonic() + self._plan.seconds
        await asyncio.gather(
            *(
                self._offer(name, per_s * self._plan.rate, call, ends_s)
                for name, (per_s, call) in OPERATIONS.items()
            )
        )
        if self._calls:
            await asyncio.wait(self._calls, timeout=2 * self._plan.deadline_s)

    async def _offer(
        self, name: str, per_s: float, call: Callable[[Traffic], Awaitable[None]], ends_s: float
    ) -> None:
        due_s = time.monotonic()
        while (due_s := due_s + self._draw.expovariate(per_s)) < ends_s:
            await asyncio.sleep(due_s - time.monotonic())
            if len(self._calls) >= MAX_IN_FLIGHT:
                self._note(name, due_s, "not offered: too many in flight")
                continue
            task = asyncio.create_task(self._one(name, call, due_s))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    async def _one(
        self, name: str, call: Callable[[Traffic], Awaitable[None]], due_s: float
    ) -> None:
        try:
            await call(self)
        except Exception as error:
            self._note(name, due_s, f"{type(error).__name__}: {error}")
        else:
            self._note(name, due_s, "")

    def _note(self, name: str, due_s: float, error: str) -> None:
        now_s = time.monotonic()
        line = {"at_s": time.time(), "call": name, "ms": (now_s - due_s) * 1e3, "error": error}
        self._log.write(json.dumps(line) + "\n")

    # -- what calls are made of ------------------------------------------------------------------

    def _picture(self) -> bytes:
        return self._draw.choice(self._pictures)

    def _embedding(self) -> Embedding:
        """A picture's embedding, a bit or two and the feature a little off."""
        like = self._draw.choice(self._embeddings)
        code = bytearray(like.code)
        for _ in range(self._draw.randrange(3)):
            code[self._draw.randrange(like.n_bits) // 8] ^= 1 << self._draw.randrange(8)
        feature = like.feature
        assert feature is not None
        noise = np.random.default_rng(self._draw.randrange(2**32)).normal(0, 0.01, feature.shape)
        return replace(like, code=bytes(code), feature=(feature + noise).astype(feature.dtype))

    def _id(self) -> str:
        return f"i{self._draw.randrange(N_IDS)}"

    def _kept_id(self) -> str:
        return f"i{self._draw.randrange(N_KEPT)}"

    # -- calls -----------------------------------------------------------------------------------

    async def encode(self) -> None:
        await self._client.encode(self._picture())

    async def encode_batch(self) -> None:
        for encoded in await self._client.encode_batch([self._picture() for _ in range(8)]):
            if isinstance(encoded, HashlensError):
                raise encoded

    async def search_embedding(self) -> None:
        answer = await self._client.search(NAME, embedding=self._embedding(), k=20)
        assert len(answer.hits) == 20
        assert answer.receipt.exact

    async def search_image(self) -> None:
        answer = await self._client.search(NAME, image=self._picture(), k=20)
        assert len(answer.hits) == 20
        assert answer.receipt.exact

    async def search_id(self) -> None:
        answer = await self._client.search(NAME, id=self._kept_id(), k=5)
        assert len(answer.hits) == 5

    async def search_batch(self) -> None:
        queries = [self._embedding() for _ in range(16)]
        answers = await self._client.search_batch(
            NAME, [Query(embedding=query) for query in queries], options=SearchOptions(k=10)
        )
        for answer in answers:
            if isinstance(answer, HashlensError):
                raise answer

    async def upsert(self) -> None:
        items = [Item(id=self._id(), embedding=self._embedding()) for _ in range(32)]
        await self._client.upsert(NAME, items)

    async def upsert_images(self) -> None:
        items = [Item(id=self._id(), image=self._picture(), tags=("picture",)) for _ in range(4)]
        result = await self._client.upsert(NAME, items)
        assert not result.failures, result.failures

    async def delete(self) -> None:
        ids = [f"i{self._draw.randrange(N_KEPT, N_IDS)}" for _ in range(8)]
        await self._client.delete(NAME, ids)

    async def get_items(self) -> None:
        ids = [f"i{n}" for n in self._draw.sample(range(N_KEPT), 8)]
        items = await self._client.get_items(NAME, ids)
        assert {item.id for item in items} == set(ids)

    async def stream_ball(self) -> None:
        n = 0
        async for part in self._client.stream_ball(NAME, id=self._kept_id(), radius_bits=6):
            n += len(part.hits)
        assert n

    async def encode_stream(self) -> None:
        n = 0
        async for encoded in self._client.encode_stream(self._picture() for _ in range(12)):
            if isinstance(encoded, HashlensError):
                raise encoded
            n += 1
        assert n == 12

    async def upsert_stream(self) -> None:
        items = (Item(id=self._id(), embedding=self._embedding()) for _ in range(24))
        n = 0
        async for written in self._client.upsert_stream(NAME, items):
            if isinstance(written, HashlensError):
                raise written
            n += 1
        assert n == 24

    async def collection(self) -> None:
        await self._client.collection(NAME)


OPERATIONS: dict[str, tuple[float, Callable[[Traffic], Awaitable[None]]]] = {
    "Encode": (4, Traffic.encode),
    "EncodeBatch": (0.5, Traffic.encode_batch),
    "Search by embedding": (12, Traffic.search_embedding),
    "Search by image": (4, Traffic.search_image),
    "Search by id": (6, Traffic.search_id),
    "SearchBatch of 16": (1, Traffic.search_batch),
    "Upsert of 32": (2, Traffic.upsert),
    "Upsert of 4 images": (1, Traffic.upsert_images),
    "Delete of 8": (0.5, Traffic.delete),
    "GetItems": (2, Traffic.get_items),
    "EncodeStream of 12": (0.3, Traffic.encode_stream),
    "UpsertStream of 24": (0.5, Traffic.upsert_stream),
    "StreamBall": (0.5, Traffic.stream_ball),
    "GetCollection": (1, Traffic.collection),
}
"""How many a second, and what."""


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@asynccontextmanager
async def _connected(plan: Plan) -> AsyncIterator[AsyncClient]:
    security = ChannelSecurity(
        tls_ca=Path(plan.tls_ca), tls_name=plan.tls_name, token_file=Path(plan.token_file)
    )
    config = ClientConfig(deadline_s=plan.deadline_s, security=security)
    async with AsyncClient(plan.search, plan.encoder, config=config) as client:
        yield client


async def run(plan: Plan, log: TextIO) -> None:
    """Prepare, say so on standard output, make calls."""
    async with _connected(plan) as client:
        traffic = Traffic(client, plan, log)
        await traffic.prepare()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await traffic.run()


def main(path: Path) -> None:
    """Do as a plan says."""
    plan = Plan.read(path)
    with Path(plan.calls).open("w", buffering=1) as log:
        asyncio.run(run(plan, log))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

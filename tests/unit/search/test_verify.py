"""One check at a time, that ends when its caller leaves or its time is over."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from hashlens.errors import CancelledError, DeadlineError, OverloadedError
from hashlens.types import VerifyResult
from search_service.storage.verify import Verified
from search_service.verify import Verifier

WAIT_S = 20.0


class Checked:
    """A collection whose check lasts until it is stopped, or finds what it was told to."""

    spec = SimpleNamespace(name="checked")

    def __init__(self, *n_differences: int) -> None:
        self.found = list(n_differences)
        self.began = threading.Event()
        self.ended = threading.Event()
        self.n_rebuilt = 0

    def verify(self, stop: threading.Event) -> Verified:
        self.began.set()
        if not self.found:
            assert stop.wait(WAIT_S)
            self.ended.set()
            raise CancelledError("stopped")
        n = self.found.pop(0)
        return Verified(7, 3, 3, ["x"] * n, n, bytes(16))

    def rebuild(self, stop: threading.Event) -> None:
        self.n_rebuilt += 1


def check(verifier: Verifier, collection: Checked, *, repair: bool, within_s: float) -> object:
    ends_s = time.monotonic() + within_s
    return verifier.verify(collection, repair=repair, ends_s=ends_s)  # type: ignore[arg-type]


@pytest.fixture
def verifier() -> Verifier:
    return Verifier()


async def _ended(collection: Checked) -> None:
    assert await asyncio.to_thread(collection.ended.wait, WAIT_S)


def test_a_second_check_is_told_when_to_come_back(verifier: Verifier) -> None:
    async def scene() -> None:
        first = Checked()
        running = asyncio.ensure_future(
            check(verifier, first, repair=False, within_s=WAIT_S)  # type: ignore[arg-type]
        )
        assert await asyncio.to_thread(first.began.wait, WAIT_S)
        with pytest.raises(OverloadedError) as caught:
            await check(verifier, Checked(0), repair=False, within_s=WAIT_S)  # type: ignore[misc]
        assert caught.value.retry_after_s > 0
        running.cancel()
        await _ended(first)
        await _free(verifier)

    asyncio.run(scene())
    verifier.close()


def test_time_is_over(verifier: Verifier) -> None:
    async def scene() -> None:
        late = Checked()
        with pytest.raises(DeadlineError):
            await check(verifier, late, repair=False, within_s=0.01)  # type: ignore[misc]
        await _ended(late)
        await _free(verifier)

    asyncio.run(scene())
    verifier.close()


async def _free(verifier: Verifier) -> None:
    """The next check is let in once the last has ended."""
    ends_s = time.monotonic() + WAIT_S
    while True:
        try:
            result = await check(verifier, Checked(0), repair=True, within_s=WAIT_S)  # type: ignore[misc]
        except OverloadedError:
            assert time.monotonic() < ends_s
            await asyncio.sleep(0.01)
        else:
            assert result.n_differences == 0
            return


@pytest.mark.parametrize(
    ("repair", "found", "n_repaired", "n_rebuilt"),
    [(False, [4], 0, 0), (True, [0], 0, 0), (True, [4, 1], 3, 1), (True, [1, 2], 0, 1)],
)
def test_repair(
    verifier: Verifier, repair: bool, found: list[int], n_repaired: int, n_rebuilt: int
) -> None:
    collection = Checked(*found)
    result = asyncio.run(check(verifier, collection, repair=repair, within_s=WAIT_S))  # type: ignore[arg-type]
    assert isinstance(result, VerifyResult)
    assert (result.n_differences, result.n_repaired) == (found[0], n_repaired)
    assert collection.n_rebuilt == n_rebuilt
    verifier.close()

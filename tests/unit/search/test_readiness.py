"""What the search service says of itself; collections as they are, without a store behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from hashlens.errors import HashlensError, PreconditionError, UnavailableError
from search_service.readiness import Readiness


@dataclass
class Collection:
    """The part of a collection that is looked at."""

    rows: int = 10
    needs_files: bool = False
    trouble: HashlensError | None = None
    name: str = field(default="secret")

    def snapshot(self) -> Any:
        return SimpleNamespace(rows=self.rows)


def executor(overtime_s: float = 0.0) -> Any:
    return SimpleNamespace(overtime_s=overtime_s)


def test_a_start_says_what_it_is_at() -> None:
    readiness = Readiness(60)
    readiness.stage = "opening the store"
    state = readiness.while_starting()
    assert (state.is_ready, state.is_live, state.reasons) == (False, True, ("opening the store",))


def test_a_replica_is_ready_when_it_has_had_all_and_stays_so() -> None:
    readiness = Readiness(60)
    new: list[Any] = [Collection(), Collection(rows=0, needs_files=True)]
    state = readiness.of(executor(), new)
    assert (state.is_ready, state.is_live) == (False, True)
    assert "of 2 collections, 1 has no files here yet" in state.reasons[0]
    whole: list[Any] = [Collection(), Collection()]
    assert readiness.of(executor(), whole).is_ready
    state = readiness.of(executor(), new)
    assert state.is_ready
    assert state.reasons


def test_what_takes_no_writes_is_searched_and_named_to_nobody() -> None:
    troubled: list[Any] = [
        Collection(trouble=UnavailableError("redis://secret is away")),
        Collection(trouble=PreconditionError("secret went back")),
        Collection(needs_files=True, trouble=UnavailableError("secret: too late")),
    ]
    state = Readiness(60).of(executor(), troubled)
    assert (state.is_ready, state.is_live, len(state.reasons)) == (True, True, 3)
    assert "secret" not in " ".join(state.reasons)


def test_only_work_that_nobody_wants_makes_it_stuck() -> None:
    assert Readiness(60).of(executor(59.0), []).is_live
    state = Readiness(60).of(executor(61.0), [])
    assert (state.is_live, state.is_ready) == (False, False)
    assert "has not ended for 61 s" in state.reasons[0]

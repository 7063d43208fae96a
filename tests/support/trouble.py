"""What the tests of a store whose Redis is in trouble share: writes that fail and come back."""

from __future__ import annotations

import pytest

from hashlens.errors import HashlensError
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import Collection
from tests.support.redis_server import RedisServer
from tests.support.stores import (
    DEADLINE_S,
    Model,
    assert_holds,
    assert_in_redis,
    make_records,
    wait_until,
)

SPEC = CollectionSpec("c", "m", 48, 4, FeatureDtype.F16, 1000)


def fill(collection: Collection, n: int = 100, prefix: str = "i") -> Model:
    """Write items and wait until they are here."""
    model = Model({}, collection.snapshot().version)
    records = make_records(collection.spec, n, prefix=prefix)
    collection.upsert(records, request_id=f"fill-{prefix}", deadline_s=DEADLINE_S)
    model.upsert(records)
    collection.wait_for(model.version, DEADLINE_S)
    return model


def refused(collection: Collection, deadline_s: float = 0.3) -> HashlensError:
    """The error that a write gets; a delete gets the same."""
    records = make_records(collection.spec, 1, seed=77, prefix="refused")
    with pytest.raises(HashlensError) as caught:
        collection.upsert(records, request_id="refused", deadline_s=deadline_s)
    with pytest.raises(type(caught.value)):
        collection.delete(["nobody"], request_id="refused-too", deadline_s=deadline_s)
    return caught.value


def repeat_refused(collection: Collection, model: Model) -> None:
    """Do the refused write again: whether a server that hung has made it, is not known."""
    wait_until(lambda: collection.info().writable, "the collection is writable")
    records = make_records(collection.spec, 1, seed=77, prefix="refused")
    version = collection.upsert(records, request_id="refused", deadline_s=DEADLINE_S)
    model.upsert(records)
    assert version == model.version


def assert_writes_again(collection: Collection, model: Model) -> None:
    """It recovers by itself."""
    records = make_records(collection.spec, 5, seed=9, prefix="again")
    wait_until(lambda: collection.info().writable, "the collection is writable")
    collection.upsert(records, request_id="again", deadline_s=DEADLINE_S)
    model.upsert(records)
    assert_holds(collection, model)


def assert_recovers(collection: Collection, model: Model, server: RedisServer) -> None:
    """It comes back by itself, and the refused write is made once however often it was tried."""
    repeat_refused(collection, model)
    repeated = Model(dict(model.items), model.version - 1)
    repeat_refused(collection, repeated)
    assert_writes_again(collection, model)
    # A reply that is late costs the connection for a moment.
    wait_until(lambda: collection.info().writable, "nothing is wrong any more")
    assert collection.info().detail == ""
    with server.client() as client:
        assert_in_redis(client, collection.spec.name, model)

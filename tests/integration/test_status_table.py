"""Every row of the status table, provoked over the wire: its code, its details, its way back.

The table is in docs/architecture.md and `hashlens.rpc.status`. A new class of error without a way
to provoke it fails the last test here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from hashlens import errors
from hashlens.rpc.status import DETAILS_KEY, error_of_call
from hashlens.v1 import encoder_service_pb2 as enc
from hashlens.v1 import encoder_service_pb2_grpc as enc_grpc
from hashlens.v1 import replica_service_pb2 as rpb
from hashlens.v1 import replica_service_pb2_grpc as rpb_grpc
from hashlens.v1 import search_service_pb2 as spb
from hashlens.v1 import search_service_pb2_grpc as spb_grpc
from tests.fuzz.http2 import END_HEADERS, HEADERS, Connection, call_headers, frame
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.services import ServiceProcess, wait_until

Code = grpc.StatusCode

ADMIN, READER = "admin-" + "a" * 32, "reader-" + "r" * 32
SPEC = spb.CollectionSpec(name="table", model_id="m", n_bits=8)
CALL_S = 20.0


class _Careless(enc_grpc.EncoderServiceServicer):
    """An encoder that answers for fewer images than it got, which a real one never does."""

    def EncodeBatch(self, request: Any, context: Any) -> Any:  # noqa: N802
        return enc.EncodeBatchResponse()


@dataclass(frozen=True)
class Both:
    """The two services, as their callers see them, and what is behind them."""

    encoder: enc_grpc.EncoderServiceStub
    search: spb_grpc.SearchServiceStub
    replica: rpb_grpc.ReplicaServiceStub
    encoder_target: str
    search_target: str
    careless: grpc.Server
    redis: RedisServer
    data_dir: Path

    def as_admin(self, call: Callable[..., Any], request: Any, timeout: float = CALL_S) -> Any:
        """Make a call that is allowed everything."""
        return call(request, timeout=timeout, metadata=bearer(ADMIN))


def bearer(token: str) -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {token}"),)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp("table")
    tokens = folder / "tokens"
    tokens.write_text(f"admin {ADMIN}\nread {READER}\n")
    tokens.chmod(0o600)
    careless = grpc.server(ThreadPoolExecutor(2))
    enc_grpc.add_EncoderServiceServicer_to_server(_Careless(), careless)
    port = careless.add_insecure_port("127.0.0.1:0")
    careless.start()
    guarded = ("--tokens", str(tokens))
    redis = RedisServer(server_binaries()[0])
    encoder = ServiceProcess(
        "encoder_service",
        *guarded,
        *("--method-limits", "Encode=1"),
        log=folder / "encoder.log",
    )
    search = ServiceProcess(
        "search_service",
        *guarded,
        *("--method-limits", "Search=1"),
        *("--redis-url", redis.url, "--data-dir", str(folder / "data")),
        *("--encoder", f"127.0.0.1:{port}"),
        log=folder / "search.log",
    )
    try:
        redis.start()
        with (
            encoder,
            search,
            grpc.insecure_channel(encoder.target) as to_encoder,
            grpc.insecure_channel(search.target) as to_search,
        ):
            found = Both(
                encoder=enc_grpc.EncoderServiceStub(to_encoder),
                search=spb_grpc.SearchServiceStub(to_search),
                replica=rpb_grpc.ReplicaServiceStub(to_search),
                encoder_target=encoder.target,
                search_target=search.target,
                careless=careless,
                redis=redis,
                data_dir=folder / "data",
            )
            found.as_admin(found.search.CreateCollection, spb.CreateCollectionRequest(spec=SPEC))
            written = found.as_admin(
                found.search.Upsert, spb.UpsertRequest(collection="table", items=[item("a")])
            )
            # From here on, whoever asks finds it.
            found.as_admin(
                found.search.GetCollection,
                spb.GetCollectionRequest(name="table", min_version=written.version),
            )
            yield found
    finally:
        redis.stop()
        careless.stop(None).wait(10)


def item(name: str, payload: bytes = b"") -> spb.Item:
    message = spb.Item(id=name, payload=payload)
    message.embedding.model_id = "m"
    message.embedding.code.bits, message.embedding.code.n_bits = b"\1", 8
    return message


def by_id(name: str, **options: Any) -> spb.SearchRequest:
    return spb.SearchRequest(
        collection="table",
        query=spb.Query(id=name),
        options=spb.SearchOptions(k=1, **options),
    )


Provocation = Callable[[Both], Any]
"""Makes a call that fails with grpc.RpcError."""


def encoder_invalid(both: Both) -> None:
    both.as_admin(both.encoder.Encode, enc.EncodeRequest(image=b"no image"))


def search_invalid(both: Both) -> None:
    both.as_admin(both.search.Search, by_id("a", max_hamming_bits=9))


def not_found(both: Both) -> None:
    both.as_admin(both.search.Search, by_id("nobody"))


def already_exists(both: Both) -> None:
    other = spb.CollectionSpec(name="table", model_id="m", n_bits=16)
    both.as_admin(both.search.CreateCollection, spb.CreateCollectionRequest(spec=other))


def precondition(both: Both) -> None:
    other = item("b")
    other.embedding.model_id = "another"
    both.as_admin(both.search.Upsert, spb.UpsertRequest(collection="table", items=[other]))


def encoder_unauthenticated(both: Both) -> None:
    both.encoder.GetModel(enc.GetModelRequest(), timeout=CALL_S)


def search_unauthenticated(both: Both) -> None:
    both.search.Search(by_id("a"), timeout=CALL_S, metadata=bearer("x" * 40))


def permission_denied(both: Both) -> None:
    request = spb.DropCollectionRequest(name="table")
    both.search.DropCollection(request, timeout=CALL_S, metadata=bearer(READER))


def encoder_overloaded(both: Both) -> None:
    """The one place is taken by a call whose request does not come."""
    token = (b"authorization", f"Bearer {ADMIN}".encode())
    headers = call_headers("/hashlens.v1.EncoderService/Encode", token)
    with Connection(both.encoder_target) as connection:
        for stream in range(1, 401, 2):  # One that comes while ours is there is refused itself.
            connection.send(frame(HEADERS, END_HEADERS, stream, headers))
            time.sleep(0.05)
            try:
                encoder_invalid(both)
            except grpc.RpcError as error:
                if error.code() is not Code.INVALID_ARGUMENT:
                    raise


def search_overloaded(both: Both) -> None:
    """The one place is taken by a search that waits for a version to come."""
    ends_s = time.monotonic() + CALL_S
    while time.monotonic() < ends_s:
        waiting = both.search.Search.future(
            by_id("a", min_version=2**40), timeout=CALL_S, metadata=bearer(ADMIN)
        )
        try:
            while not waiting.done():  # One that comes while ours is there is refused itself.
                both.as_admin(both.search.Search, by_id("a"))
                time.sleep(0.02)
        finally:
            waiting.cancel()


def used_up(both: Both) -> None:
    """Redis may use no more memory than it does."""
    with both.redis.client() as client:
        client.config_set("maxmemory", "1mb")
        try:
            items = [item(f"{i}", bytes(60_000)) for i in range(20)]
            both.as_admin(both.search.Upsert, spb.UpsertRequest(collection="table", items=items))
        finally:
            client.config_set("maxmemory", "0")
            wait_until(lambda: _is_writable(both), within_s=30, what="Redis takes writes again")


def _is_writable(both: Both) -> bool:
    request = spb.GetCollectionRequest(name="table")
    return bool(both.as_admin(both.search.GetCollection, request).collection.writable)


def unavailable(both: Both) -> None:
    """Redis hangs."""
    both.redis.pause()
    try:
        request = spb.UpsertRequest(collection="table", items=[item("late")])
        for _ in range(5):
            try:
                both.as_admin(both.search.Upsert, request, timeout=3)
            except grpc.RpcError as error:
                # A machine that stands still has the answer come too late: asked again.
                if error.code() is not Code.DEADLINE_EXCEEDED:
                    raise
    finally:
        both.redis.resume()
        wait_until(lambda: _is_writable(both), within_s=30, what="Redis takes writes again")


def encoder_late(both: Both) -> None:
    both.as_admin(both.encoder.Encode, enc.EncodeRequest(image=bytes(2**20)), timeout=0.0001)


def search_late(both: Both) -> None:
    both.as_admin(both.search.Search, by_id("a", min_version=2**40), timeout=1.0)


def encoder_cancelled(both: Both) -> None:
    requests = iter([enc.EncodeStreamRequest(image=b"no image")])
    call = both.encoder.EncodeStream(requests, metadata=bearer(ADMIN), timeout=CALL_S)
    call.cancel()
    next(call)


def search_cancelled(both: Both) -> None:
    call = both.search.Search.future(
        by_id("a", min_version=2**40), metadata=bearer(ADMIN), timeout=CALL_S
    )
    call.cancel()
    raise call if isinstance(call, grpc.RpcError) else AssertionError("not an error")


def encoder_unimplemented(both: Both) -> None:
    with grpc.insecure_channel(both.encoder_target) as channel:
        call = channel.unary_unary("/hashlens.v1.EncoderService/Train")
        call(b"", timeout=CALL_S, metadata=bearer(ADMIN))


def search_unimplemented(both: Both) -> None:
    with grpc.insecure_channel(both.search_target) as channel:
        call = channel.unary_unary("/hashlens.v1.SearchService/Guess")
        call(b"", timeout=CALL_S, metadata=bearer(ADMIN))


def data_loss(both: Both) -> None:
    """A file that another replica copies is shorter than the manifest says."""
    lent = both.as_admin(
        both.replica.ListFiles,
        rpb.ListFilesRequest(collection="table", epoch=_epoch(both), min_version=1),
    )
    (shelf,) = {path.parent for path in both.data_dir.rglob("*") if lent.lease in path.parts[-2]}
    path = shelf / "ids-0.bin"
    path.unlink()  # The link is the lease's own: the store's file stays whole.
    path.write_bytes(b"")
    request = rpb.ReadFileRequest(lease=lent.lease, name=path.name)
    list(both.replica.ReadFile(request, timeout=CALL_S, metadata=bearer(ADMIN)))


def _epoch(both: Both) -> str:
    request = spb.GetCollectionRequest(name="table")
    return str(both.as_admin(both.search.GetCollection, request).collection.epoch)


def internal(both: Both) -> None:
    """Its encoder breaks the contract, which the search service takes for a defect."""
    items = [spb.Item(id="i", image=b"x")]
    both.as_admin(both.search.Upsert, spb.UpsertRequest(collection="table", items=items))


@dataclass(frozen=True)
class Row:
    """One row of the table, on one of the services."""

    error: type[errors.HashlensError]
    code: grpc.StatusCode
    provoke: Provocation
    field: str | None = None
    """Path that `BadRequest` names; None: there is no `BadRequest`."""
    is_ours: bool = True
    """Whether the status is made by the server's code, with details; gRPC itself makes the rest."""


ROWS = {
    "encoder: invalid": Row(
        errors.InvalidInputError, Code.INVALID_ARGUMENT, encoder_invalid, field="image"
    ),
    "search: invalid": Row(
        errors.InvalidInputError,
        Code.INVALID_ARGUMENT,
        search_invalid,
        field="options.max_hamming_bits",
    ),
    "search: not found": Row(errors.NotFoundError, Code.NOT_FOUND, not_found),
    "search: already exists": Row(errors.AlreadyExistsError, Code.ALREADY_EXISTS, already_exists),
    "search: precondition": Row(
        errors.PreconditionError,
        Code.FAILED_PRECONDITION,
        precondition,
        field="items[0].embedding.model_id",
    ),
    "encoder: unauthenticated": Row(
        errors.UnauthenticatedError, Code.UNAUTHENTICATED, encoder_unauthenticated
    ),
    "search: unauthenticated": Row(
        errors.UnauthenticatedError, Code.UNAUTHENTICATED, search_unauthenticated
    ),
    "search: permission denied": Row(
        errors.PermissionDeniedError, Code.PERMISSION_DENIED, permission_denied
    ),
    "encoder: overloaded": Row(errors.OverloadedError, Code.RESOURCE_EXHAUSTED, encoder_overloaded),
    "search: overloaded": Row(errors.OverloadedError, Code.RESOURCE_EXHAUSTED, search_overloaded),
    "search: used up": Row(errors.LimitError, Code.RESOURCE_EXHAUSTED, used_up),
    "search: unavailable": Row(errors.UnavailableError, Code.UNAVAILABLE, unavailable),
    "encoder: late": Row(errors.DeadlineError, Code.DEADLINE_EXCEEDED, encoder_late, is_ours=False),
    "search: late": Row(errors.DeadlineError, Code.DEADLINE_EXCEEDED, search_late),
    "encoder: cancelled": Row(
        errors.CancelledError, Code.CANCELLED, encoder_cancelled, is_ours=False
    ),
    "search: cancelled": Row(
        errors.CancelledError, Code.CANCELLED, search_cancelled, is_ours=False
    ),
    "encoder: unimplemented": Row(
        errors.UnimplementedError, Code.UNIMPLEMENTED, encoder_unimplemented, is_ours=False
    ),
    "search: unimplemented": Row(
        errors.UnimplementedError, Code.UNIMPLEMENTED, search_unimplemented, is_ours=False
    ),
    "search: data loss": Row(errors.DataLossError, Code.DATA_LOSS, data_loss),
    "search: internal": Row(errors.InternalError, Code.INTERNAL, internal),
}


def details_of(failure: grpc.RpcError) -> list[Any]:
    """Return the details of the status in a failure's trailing metadata."""
    kinds = (error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    found = []
    for key, value in failure.trailing_metadata() or ():
        if key == DETAILS_KEY:
            for packed in status_pb2.Status.FromString(value).details:
                (kind,) = [kind for kind in kinds if packed.Is(kind.DESCRIPTOR)]
                detail = kind()
                packed.Unpack(detail)
                found.append(detail)
    return found


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_table(both: Both, name: str) -> None:
    row = ROWS[name]
    with pytest.raises(grpc.RpcError) as caught:
        row.provoke(both)
    failure = caught.value
    assert failure.code() is row.code, failure.details()
    details = details_of(failure)
    if row.field is not None:
        (bad,) = details
        assert [violation.field for violation in bad.field_violations] == [row.field]
        assert bad.field_violations[0].description == failure.details()
    elif row.error is errors.OverloadedError:
        (retry,) = details
        assert 0 < retry.retry_delay.ToMilliseconds() <= 10_000
    else:
        assert not details
    if row.is_ours:
        error = error_of_call(failure)
        assert type(error) is row.error
        assert len(error.message) > 15
    # Whatever it was, the next call is answered.
    wait_until(lambda: _answers(both), within_s=60, what="the services answer")


def _answers(both: Both) -> bool:
    try:
        both.as_admin(both.encoder.GetModel, enc.GetModelRequest())
        found = both.as_admin(both.search.Search, by_id("a"))
    except grpc.RpcError as error:
        if error.code() is Code.RESOURCE_EXHAUSTED:
            return False
        raise
    return bool(found.hits[0].id == "a")


def test_every_class_of_error_is_provoked() -> None:
    """A new one has to be brought about above, or it may never have been seen by a caller."""
    classes = {
        found
        for found in vars(errors).values()
        if isinstance(found, type)
        and issubclass(found, errors.HashlensError)
        and found is not errors.HashlensError
    }
    assert {row.error for row in ROWS.values()} == classes


def test_the_documented_table_has_every_code() -> None:
    text = Path("docs/architecture.md").read_text().partition("## Errors")[2]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    documented = {name.strip() for row in rows for name in row.split(",")} - {"code"}
    assert documented == {row.code.name for row in ROWS.values()}

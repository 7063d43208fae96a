"""`hashlens bench serve`: searching over gRPC, beside an empty echo on the same server.

The search service runs as its own process with an embedded store, and hosts the echo (see `host`);
the load generator in another (see `traffic`). They share the machine's cores, as a client on the
same machine would; `server_cpu_us` tells how much of them the server took for a call.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from hashlens import Client, convert
from hashlens.cli.child import POLL_S, ServiceProcess
from hashlens.cli.processes import START_DEADLINE_S, interruptible
from hashlens.cli.text import console, printable
from hashlens.config import options, setting
from hashlens.errors import DeadlineError, InvalidInputError, PreconditionError
from hashlens.packed import PackedHits
from hashlens.types import (
    CollectionSpec,
    Embedding,
    FeatureDtype,
    Item,
    Query,
    SearchOptions,
    SearchResult,
)
from hashlens.v1 import search_service_pb2 as spb
from search_service.bench import traffic
from search_service.bench.answers import check_hits
from search_service.bench.command import BenchConfig, check_outputs, publish
from search_service.bench.data import CodeSet, Kind, make_codes, make_features
from search_service.bench.host import ECHO
from search_service.bench.report import Measured, Report, WrongAnswerError
from search_service.bench.service import cpu_s
from search_service.bench.traffic import Load, Loaded

_SEARCH = "/hashlens.v1.SearchService/Search"
_NAME = "bench"
_MODEL = "bench"
_N_QUERIES = 64
_N_CHECKED = 8
_PEERS = ("milvus-lite",)


@dataclass(frozen=True, kw_only=True)
class ServeConfig(BenchConfig):
    """What to serve, and how hard."""

    rows: int = setting(100_000, "Items in the collection.")
    bits: int = setting(64, "Code length.")
    dim: int = setting(0, "Width of the features, float16; 0: codes only.")
    codes: Kind = setting("uniform", "Codes: uniform, or crowded as a trained network's.")
    k: str = setting("10,1000", "Answers wanted of each query, comma-separated.")
    min_pool: int = setting(0, "Rows that a pool must hold beside k; what costs the fine stage.")
    in_flight: str = setting("1,8,32", "Callers of the closed loops, comma-separated.")
    rates: str = setting("250,500,1000", "Calls a second of the open loops; empty: no open loop.")
    seconds: float = setting(1.0, "Length of each load, in seconds.")
    repeats: int = setting(5, "Rounds of which medians are taken.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seconds <= 0:
            raise InvalidInputError("seconds is above 0", field="seconds")
        for name in ("k", "in_flight", "rates"):
            if not all(part.isdecimal() and int(part) for part in _parts(getattr(self, name))):
                raise InvalidInputError(f"{name} is whole numbers above 0", field=name)

    def numbers(self, name: str) -> list[int]:
        """Return a comma-separated field."""
        return [int(part) for part in _parts(getattr(self, name))]


@dataclass(frozen=True, slots=True, eq=False)
class _Form:
    """One thing that is asked of the server again and again."""

    name: str
    k: int
    method: str
    requests: Sequence[bytes]


@click.command()
@options(ServeConfig, "bench")
def serve(config: ServeConfig) -> None:
    """Measure searches over gRPC: calls a second and latency, in closed and open loops.

    The server is a process of its own, and so is the load generator. ``echo`` is an empty message
    to the same server, in the same rounds: the ratio to it is the share of an empty call's speed
    that is left. Open loops count latency from when a call was due.
    """
    check_outputs(config)
    peers = config.peers(_PEERS)
    data = make_codes(
        config.codes, config.rows, config.bits, n_queries=_N_QUERIES, seed=config.seed
    )
    features = query_features = None
    if config.dim:
        dtype = FeatureDtype.F16.numpy
        features = make_features(data.classes, config.dim, dtype, seed=config.seed)
        query_features = make_features(
            np.resize(data.classes, _N_QUERIES), config.dim, dtype, seed=config.seed, first_row=7
        )
    queries = [
        Embedding(
            code=code.tobytes(),
            n_bits=config.bits,
            model_id=_MODEL,
            feature=None if query_features is None else query_features[i],
        )
        for i, code in enumerate(data.queries)
    ]
    with ExitStack() as stack:
        stack.enter_context(interruptible())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hashlens-bench-")))
        server = stack.enter_context(_running(folder, config.threads))
        assert server.address is not None
        client = stack.enter_context(Client(server.address, server.address))
        _fill(client, config, data, features)
        _check(client, config, data, features, queries)
        pool = stack.enter_context(
            ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        )
        apply = partial(_applied, pool, server)
        peer = None
        if peers:
            peer = stack.enter_context(_milvus(folder / "milvus.db", data))
        results = [
            *_closed_loops(config, queries, apply, peer),
            *_open_loops(config, queries, apply),
        ]
    from search_service.bench import machine

    described = machine.describe(packages=("grpcio", "protobuf", *(_milvus_packages(peers))))
    settings = {
        "codes": config.codes,
        "dim": config.dim,
        "min_pool": config.min_pool,
        "seconds": config.seconds,
        "repeats": config.repeats,
        "seed": config.seed,
        "processes": "server with echo, and load generator, on the same cores",
    }
    publish(Report("serve", described, results, settings), config)


# -- the server ------------------------------------------------------------------------------------


@contextmanager
def _running(folder: Path, n_threads: int) -> Iterator[ServiceProcess]:
    """Run the search service and its echo while the block runs."""
    log = console(stderr=True)
    arguments = ["--listen", "127.0.0.1:0", "--data-dir", str(folder / "data")]
    arguments += ["--n-threads", str(n_threads), "--log-level", "warning"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HASHLENS_")}
    process = ServiceProcess(
        "search",
        "search_service.bench.host",
        arguments,
        environment,
        lambda name, line: log.print(f"{name}  {printable(line)}"),
    )
    try:
        ends_s = time.monotonic() + START_DEADLINE_S
        while not process.is_serving():
            if time.monotonic() > ends_s:
                raise DeadlineError(f"the server did not serve within {START_DEADLINE_S:g} s")
            time.sleep(POLL_S)
        yield process
    finally:
        process.terminate()
        process.finish(threading.Event())


def _fill(
    client: Client, config: ServeConfig, data: CodeSet, features: NDArray[Any] | None
) -> None:
    spec = CollectionSpec(
        name=_NAME,
        model_id=_MODEL,
        n_bits=config.bits,
        dim=config.dim,
        feature_dtype=FeatureDtype.F16,
        expected_rows=config.rows,
    )
    client.create_collection(_NAME, spec=spec)
    client.upsert(
        _NAME,
        (
            Item(
                id=_id_of(row),
                embedding=Embedding(
                    code=code.tobytes(),
                    n_bits=config.bits,
                    model_id=_MODEL,
                    feature=None if features is None else features[row],
                ),
            )
            for row, code in enumerate(data.packed)
        ),
    )
    # Returns when the server has applied all of it.
    client.collection(_NAME)


def _id_of(row: int) -> str:
    return f"item-{row:09d}"


def _options(config: ServeConfig, k: int, *, packed: bool) -> SearchOptions:
    return SearchOptions(k=k, min_pool=config.min_pool, with_payload=False, packed=packed)


# -- answers ---------------------------------------------------------------------------------------


def _check(
    client: Client,
    config: ServeConfig,
    data: CodeSet,
    features: NDArray[Any] | None,
    queries: Sequence[Embedding],
) -> None:
    """Compare answers with brute force, one by one and all at once, in both forms.

    Raises
    ------
    WrongAnswerError
        One differs.
    """
    ids = np.array([_id_of(row).encode() for row in range(len(data.packed))])
    asked = queries[:_N_CHECKED]
    for k in config.numbers("k"):
        for packed in (False, True):
            chosen = _options(config, k, packed=packed)
            single = [client.search(_NAME, embedding=query, options=chosen) for query in asked]
            batch = client.search_batch(
                _NAME, [Query(embedding=query) for query in asked], options=chosen
            )
            for query, alone, together in zip(asked, single, batch, strict=True):
                if not isinstance(together, SearchResult) or together.hits != alone.hits:
                    raise WrongAnswerError("an answer depends on who asks at the same time")
                if isinstance(alone.hits, PackedHits) != packed:
                    raise WrongAnswerError("the reply is not of the form that was asked for")
                check_hits(alone, query, max(k, config.min_pool), k, data, features, ids)


# -- loads -----------------------------------------------------------------------------------------

_Apply = Callable[[Load], "tuple[Loaded, float]"]


def _applied(
    pool: ProcessPoolExecutor, server: ServiceProcess, wanted: Load
) -> tuple[Loaded, float]:
    """Apply a load; return what came of it, and the server's CPU time for a call, in us."""
    assert server.address is not None
    before_s = cpu_s(server.pid)
    loaded = pool.submit(traffic.run, wanted.to(server.address)).result()
    spent_s = cpu_s(server.pid) - before_s
    if loaded.n_failed:
        raise WrongAnswerError(f"{loaded.n_failed} calls of {wanted.method} failed")
    if not loaded.latencies_ms:
        raise PreconditionError(
            f"no call came back within {wanted.seconds:g} s: measure for longer, or ask less often"
        )
    return loaded, spent_s / loaded.n_sent * 1e6


def _forms(config: ServeConfig, queries: Sequence[Embedding]) -> list[_Form]:
    forms = [_Form("echo", 0, ECHO, [b""])]
    for k in config.numbers("k"):
        for packed in (False, True):
            requests = [
                spb.SearchRequest(
                    collection=_NAME,
                    query=convert.query_to_proto(Query(embedding=query)),
                    options=convert.options_to_proto(_options(config, k, packed=packed)),
                ).SerializeToString()
                for query in queries
            ]
            forms.append(_Form("packed" if packed else "plain", k, _SEARCH, requests))
    return forms


def _closed_loops(
    config: ServeConfig, queries: Sequence[Embedding], apply: _Apply, peer: Any
) -> list[Measured]:
    results = []
    forms = _forms(config, queries)
    codes = [query.code for query in queries]
    for in_flight in config.numbers("in_flight"):
        rounds: dict[_Form, list[tuple[Loaded, float]]] = {form: [] for form in forms}
        peers: dict[int, list[Loaded]] = {k: [] for k in config.numbers("k")}
        for _ in range(config.repeats):
            for form in forms:
                wanted = Load(
                    method=form.method,
                    requests=form.requests,
                    seconds=config.seconds,
                    in_flight=in_flight,
                )
                rounds[form].append(apply(wanted))
            if peer is not None:
                for k, loads in peers.items():
                    loads.append(peer.load(codes, k=k, in_flight=in_flight, seconds=config.seconds))
        echo = rounds[forms[0]]
        for form in forms:
            by_peer = {} if form is forms[0] else {"echo": echo}
            theirs = {name: [loaded for loaded, _ in found] for name, found in by_peer.items()}
            if peer is not None and form.k:
                theirs["milvus-lite"] = peers[form.k]
            case = f"{form.name}, {in_flight} in flight"
            results.append(_measured(config, case, form.k, rounds[form], theirs))
    return results


def _open_loops(config: ServeConfig, queries: Sequence[Embedding], apply: _Apply) -> list[Measured]:
    results = []
    forms = _forms(config, queries)[:3]  # the echo, and the first k
    for rate in config.numbers("rates"):
        rounds: dict[_Form, list[tuple[Loaded, float]]] = {form: [] for form in forms}
        for _ in range(config.repeats):
            for form in forms:
                wanted = Load(
                    method=form.method,
                    requests=form.requests,
                    seconds=config.seconds,
                    calls_per_s=rate,
                )
                rounds[form].append(apply(wanted))
        echo = [loaded for loaded, _ in rounds[forms[0]]]
        for form in forms:
            theirs = {} if form is forms[0] else {"echo": echo}
            case = f"{form.name}, {rate} calls/s due"
            results.append(_measured(config, case, form.k, rounds[form], theirs))
    return results


def _measured(
    config: ServeConfig,
    case: str,
    k: int,
    rounds: Sequence[tuple[Loaded, float]],
    peers: Mapping[str, Sequence[Loaded]],
) -> Measured:
    """Take the medians over the rounds."""
    ours = [loaded for loaded, _ in rounds]
    extra: dict[str, Any] = {
        "calls_per_s": _median(loaded.calls_per_s for loaded in ours),
        "p95_ms": _median(loaded.percentile_ms(95) for loaded in ours),
        "p99_ms": _median(loaded.percentile_ms(99) for loaded in ours),
        "server_cpu_us": _median(cpu_us for _, cpu_us in rounds),
    }
    if "echo" in peers:
        # Round by round: both of a round meet the same moods of the machine.
        extra["of_echo"] = _median(
            mine.calls_per_s / echo.calls_per_s
            for mine, echo in zip(ours, peers["echo"], strict=True)
        )
    return Measured(
        case=case,
        rows=config.rows,
        bits=config.bits,
        k=k,
        ours_ms=_median(loaded.percentile_ms(50) for loaded in ours),
        peer_ms={
            name: _median(loaded.percentile_ms(50) for loaded in found)
            for name, found in peers.items()
        },
        recall=1.0 if k else None,  # or `_check` had raised
        extra=extra,
    )


def _median(values: Iterator[float] | Any) -> float:
    return float(np.median(list(values)))


# -- the peer --------------------------------------------------------------------------------------


@contextmanager
def _milvus(path: Path, data: CodeSet) -> Iterator[Any]:
    try:
        from search_service.bench import milvus
    except ImportError as error:
        raise PreconditionError(
            f"this peer is not installed ({error}): pip install 'hashlens[bench-milvus]'"
        ) from None
    with milvus.MilvusLite(path, data) as peer:
        peer.check(data)
        yield peer


def _milvus_packages(peers: Sequence[str]) -> tuple[str, ...]:
    return ("milvus-lite", "pymilvus") if peers else ()


def _parts(text: str) -> list[str]:
    return [part for part in text.split(",") if part]

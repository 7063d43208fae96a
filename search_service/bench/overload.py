"""`hashlens bench overload`: what is left of a service at a multiple of what it can do."""

from __future__ import annotations

import multiprocessing
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final, Literal

import click
import numpy as np
from numpy.typing import NDArray

from hashlens import Client, convert
from hashlens.cli.bench import cpu_s
from hashlens.cli.processes import interruptible
from hashlens.config import options, setting
from hashlens.errors import InvalidInputError, PreconditionError
from hashlens.types import CollectionSpec, Embedding, FeatureDtype, Query, SearchOptions
from hashlens.v1 import encoder_service_pb2 as enc
from hashlens.v1 import search_service_pb2 as spb
from search_service.bench import machine, offered
from search_service.bench.command import BenchConfig, check_outputs, publish
from search_service.bench.data import make_codes
from search_service.bench.load import Rows, write
from search_service.bench.offered import Fate, Fates, Offer
from search_service.bench.report import Measured, Report
from search_service.bench.service import served

What = Literal["search", "encode"]

_SEARCH: Final = "/hashlens.v1.SearchService/Search"
_ENCODE: Final = "/hashlens.v1.EncoderService/Encode"
_NAME: Final = "bench"
_N_QUERIES: Final = 64
_WARMUP_S: Final = 1.0
_SLOW: Final = 4.0
"""Times the median of a service at rest: what takes longer was not at rest yet."""


@dataclass(frozen=True, kw_only=True)
class OverloadConfig(BenchConfig):
    """Options of ``hashlens bench overload``."""

    what: What = setting("search", "Which service.")
    target: str = setting(
        "",
        "host:port of an encoder service that runs already; empty: one is started. Searches need "
        "a collection of their own, so theirs is always started.",
    )
    rows: int = setting(40_000, "Items in the collection.")
    dim: int = setting(1024, "Width of their features, float16.")
    min_pool: int = setting(20_000, "Rows that each search ranks: what makes it costly.")
    in_flight: str = setting("16,64,192", "Callers of the closed loops that look for the peak.")
    times: float = setting(3.0, "How many times the peak is offered.")
    seconds: float = setting(10.0, "For how long, in seconds; the closed loops for half of it.")
    rest_s: float = setting(8.0, "For how long half of the peak is offered after it, in seconds.")
    deadline_s: float = setting(5.0, "Deadline of each call, in seconds.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(part.isdecimal() and int(part) for part in self.in_flight.split(",")):
            raise InvalidInputError("in_flight is whole numbers above 0", field="in_flight")
        if self.target and self.what == "search":
            raise InvalidInputError("target is for --what encode", field="target")
        if min(self.seconds, self.rest_s) < 2 * _WARMUP_S or self.times <= 1:
            raise InvalidInputError("seconds and rest_s are at least 2, times is above 1")


@click.command()
@options(OverloadConfig, "bench")
def overload(config: OverloadConfig) -> None:
    """Measure a service at three times what it can do, and how it comes back.

    Closed loops find the peak. Then calls are due at three times that rate, whatever comes back
    (open loop), and then at half of it. ``goodput_of_peak`` is the share of the peak that was
    answered in time meanwhile; refusals and answers are timed from when a call was due.
    ``recovery_s`` is when, after the rate fell, the last call was due that failed or took more than
    four times the median of the end. ``cpu_ms`` is the service's CPU time for an answer, with all
    that it did besides; ``goodput_of_peak_by_cpu`` compares it with that at the peak: what refusing
    costs, also where others take the processors away.

    The load generator is a process of its own on the same cores: what it takes, the service lacks.
    """
    check_outputs(config)
    with ExitStack() as stack:
        stack.enter_context(interruptible())
        target, method, requests, pid = stack.enter_context(_service(config))
        pool = stack.enter_context(
            ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        )

        def offer(phases: Sequence[tuple[float, float]], in_flight: int = 0) -> tuple[Fates, float]:
            """Return what became of it, and the service's CPU time of the first phase."""
            wanted = Offer(
                target=target,
                method=method,
                requests=requests,
                deadline_s=config.deadline_s,
                in_flight=in_flight,
                phases=phases,
            )
            before_s = cpu_s(pid)
            running = pool.submit(offered.run, wanted)
            wait([running], timeout=phases[0][1])
            spent_s = cpu_s(pid) - before_s
            return running.result(), spent_s

        pool.submit(int).result()  # Its start is none of the first load's.
        peaks = [
            _Peak.of(int(n), *offer([(0.0, config.seconds / 2)], int(n)), config.seconds / 2)
            for n in config.in_flight.split(",")
        ]
        peak = max(peaks, key=lambda found: found.calls_per_s)
        if peak.calls_per_s == 0:
            raise PreconditionError("no call was answered: allow more --deadline-s")
        rate = config.times * peak.calls_per_s
        fates, busy_cpu_s = offer([(rate, config.seconds), (peak.calls_per_s / 2, config.rest_s)])
    results = [
        *(found.measured(config) for found in peaks),
        *_after(config, peak, rate, fates, busy_cpu_s),
    ]
    settings = {key: value for key, value in asdict(config).items() if key not in ("json", "plot")}
    report = Report("overload", machine.describe(packages=("grpcio",)), results, settings)
    publish(report, config, _drawing(fates, peak, rate, config))


@dataclass(frozen=True, slots=True)
class _Peak:
    """What a closed loop got."""

    in_flight: int
    calls_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    """The service's CPU time for an answer."""

    @classmethod
    def of(cls, in_flight: int, fates: Fates, spent_s: float, seconds: float) -> _Peak:
        counts = (fates.fate == Fate.ANSWERED) & (fates.ended_s >= _WARMUP_S)
        counts &= fates.ended_s < seconds
        ms = fates.latency_ms[counts]
        n = int(((fates.fate == Fate.ANSWERED) & (fates.ended_s < seconds)).sum())
        return cls(
            in_flight,
            float(counts.sum() / (seconds - _WARMUP_S)),
            _percent(ms, 50),
            _percent(ms, 99),
            spent_s * 1e3 / max(n, 1),
        )

    def measured(self, config: OverloadConfig) -> Measured:
        extra = {"calls_per_s": self.calls_per_s, "p99_ms": self.p99_ms, "cpu_ms": self.cpu_ms}
        return _line(config, f"closed loop, {self.in_flight} in flight", self.p50_ms, extra)


def _after(
    config: OverloadConfig, peak: _Peak, rate: float, fates: Fates, spent_s: float
) -> Iterator[Measured]:
    seconds = int(rate * config.seconds) / rate
    answered = fates.fate == Fate.ANSWERED
    in_time = answered & (fates.ended_s >= _WARMUP_S) & (fates.ended_s < seconds)
    busy = (fates.due_s >= _WARMUP_S) & (fates.due_s < seconds)
    n_answered = int((answered & (fates.ended_s < seconds)).sum())
    cpu_ms = spent_s * 1e3 / max(n_answered, 1)
    goodput = float(in_time.sum() / (seconds - _WARMUP_S))
    refused_ms = fates.latency_ms[busy & (fates.fate == Fate.REFUSED)]
    answered_ms = fates.latency_ms[busy & answered]
    yield _line(
        config,
        f"open loop, {rate:,.0f} calls/s due",
        _percent(answered_ms, 50),
        {
            "goodput_per_s": goodput,
            "goodput_of_peak": goodput / peak.calls_per_s,
            "cpu_ms": cpu_ms,
            "goodput_of_peak_by_cpu": peak.cpu_ms / cpu_ms,
            "answered_p99_ms": _percent(answered_ms, 99),
            "refused": int((busy & (fates.fate == Fate.REFUSED)).sum()),
            "refused_p50_ms": _percent(refused_ms, 50),
            "refused_p99_ms": _percent(refused_ms, 99),
            "expired": int((busy & (fates.fate == Fate.EXPIRED)).sum()),
            "shed": int((busy & (fates.fate == Fate.SHED)).sum()),
            "failed": int((busy & (fates.fate == Fate.FAILED)).sum()),
            "failures": ", ".join(f"{n} x {what}" for what, n in fates.failures.items()),
            "sent_late_p99_ms": _percent((fates.sent_s - fates.due_s)[busy] * 1e3, 99),
        },
    )
    rest = fates.due_s >= seconds
    end = fates.due_s >= seconds + config.rest_s / 2
    at_rest_ms = _percent(fates.latency_ms[end & answered], 50)
    amiss = rest & (~answered | (fates.latency_ms > max(_SLOW * at_rest_ms, 50.0)))
    recovery_s = float(fates.due_s[amiss].max() - seconds) if amiss.any() else 0.0
    yield _line(
        config,
        f"then {peak.calls_per_s / 2:,.0f} calls/s due",
        at_rest_ms,
        {
            "recovery_s": recovery_s,
            "p99_ms": _percent(fates.latency_ms[end & answered], 99),
            "not_answered": int((rest & ~answered).sum()),
        },
    )


def _line(config: OverloadConfig, case: str, p50_ms: float, extra: dict[str, Any]) -> Measured:
    rows = config.rows if config.what == "search" else 0
    return Measured(
        case=f"{config.what}, {case}", rows=rows, bits=64, k=10, ours_ms=p50_ms, extra=extra
    )


def _percent(values: NDArray[np.float64], percent: float) -> float:
    return float(np.percentile(values, percent)) if values.size else float("nan")


# -- what is asked ---------------------------------------------------------------------------------


@contextmanager
def _service(config: OverloadConfig) -> Iterator[tuple[str, str, list[bytes], int]]:
    """Yield where the service is, the method, what to ask, and its process id, 0 if not known."""
    if config.what == "encode":
        requests = [
            enc.EncodeRequest(image=_png(number)).SerializeToString() for number in range(8)
        ]
        if config.target:
            yield config.target, _ENCODE, requests, 0
            return
        with served("encoder_service", ["--log-level", "error"]) as process:
            yield process.address, _ENCODE, requests, process.pid
        return
    with tempfile.TemporaryDirectory(prefix="hashlens-bench-") as folder:
        arguments = ["--data-dir", str(Path(folder) / "data"), "--log-level", "error"]
        arguments += ["--n-threads", str(config.threads)]
        with (
            served("search_service", arguments) as process,
            Client(process.address, process.address) as client,
        ):
            yield process.address, _SEARCH, _filled(client, config), process.pid


def _filled(client: Client, config: OverloadConfig) -> list[bytes]:
    """Make the collection; return queries to it."""
    data = make_codes("uniform", config.rows, 64, n_queries=_N_QUERIES, seed=config.seed)
    spec = CollectionSpec(
        name=_NAME,
        model_id=_NAME,
        n_bits=64,
        dim=config.dim,
        feature_dtype=FeatureDtype.F16,
        expected_rows=config.rows,
    )
    client.create_collection(_NAME, spec=spec)
    rows = Rows(data, spec, config.seed)
    write(client, rows, 0, config.rows, callers=2)
    features = rows.features(np.arange(_N_QUERIES))
    chosen = convert.options_to_proto(
        SearchOptions(k=10, min_pool=config.min_pool, with_payload=False)
    )
    return [
        spb.SearchRequest(
            collection=_NAME,
            query=convert.query_to_proto(
                Query(
                    embedding=Embedding(
                        code=code.tobytes(), n_bits=64, model_id=_NAME, feature=feature
                    )
                )
            ),
            options=chosen,
        ).SerializeToString()
        for code, feature in zip(data.queries, features, strict=True)
    ]


def _png(seed: int, side: int = 256) -> bytes:
    """Return a picture of noise on a slope; the search side has no library that writes one."""
    slope = np.add.outer(np.arange(side), np.arange(side)) // 4
    noise = np.random.default_rng(seed).integers(0, 64, (side, side, 3))
    pixels = (slope[:, :, np.newaxis] + noise).astype(np.uint8)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    out = BytesIO(b"")
    out.write(b"\x89PNG\r\n\x1a\n")
    for kind, body in (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines, 1)),
        (b"IEND", b""),
    ):
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        out.write(struct.pack(">I", len(body)) + kind + body + checksum)
    return out.getvalue()


# -- the picture -----------------------------------------------------------------------------------


def _drawing(
    fates: Fates, peak: _Peak, rate: float, config: OverloadConfig
) -> Callable[[Report], bytes]:
    def draw(report: Report) -> bytes:
        from matplotlib.figure import Figure

        step_s = 0.5
        edges = np.arange(0.0, config.seconds + config.rest_s + step_s, step_s)
        figure = Figure(figsize=(9.0, 6.0), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for fate, colour in ((Fate.ANSWERED, "#0072B2"), (Fate.REFUSED, "#E69F00")):
            of_it = fates.fate == fate
            counts, _ = np.histogram(fates.ended_s[of_it], edges)
            above.step(
                edges[:-1], counts / step_s, where="post", color=colour, label=fate.name.lower()
            )
            below.plot(
                fates.due_s[of_it],
                fates.latency_ms[of_it],
                ",",
                color=colour,
                label=fate.name.lower(),
            )
        due, _ = np.histogram(fates.due_s, edges)
        above.step(edges[:-1], due / step_s, where="post", color="#999999", label="due")
        above.axhline(peak.calls_per_s, color="#009E73", linestyle="--", label="peak")
        above.set(ylabel="calls a second")
        above.legend(fontsize="small")
        below.set(xlabel="seconds", ylabel="milliseconds since due", yscale="log")
        below.grid(visible=True, alpha=0.3)
        title = f"bench overload, {config.what}: {rate:,.0f} calls/s due, then half of the peak"
        figure.suptitle(f"{title}\n{report.machine.summary()}", fontsize="x-small")
        out = BytesIO()
        figure.savefig(out, format="png", dpi=120)
        return out.getvalue()

    return draw

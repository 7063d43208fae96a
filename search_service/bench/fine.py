"""`hashlens bench fine`: the fine stage on a pool, as f32, f16 and with a sketch, warm and cold."""

from __future__ import annotations

import mmap
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numba
import numpy as np
from numpy.typing import NDArray

from hashlens.config import options, setting
from hashlens.errors import InvalidInputError
from hashlens.types import FeatureDtype
from search_service import fine as stage
from search_service import readahead
from search_service.bench import machine, pagecache
from search_service.bench.command import BenchConfig, check_outputs, publish
from search_service.bench.report import Measured, Report, WrongAnswerError
from search_service.bench.table import Query, Shape, Table, made
from search_service.bench.timing import Times, interleaved
from search_service.cancel import Cancel
from search_service.kernels import euclidean, select
from search_service.sketch import Sketch
from search_service.sketch import row_bytes as sketch_row_bytes

_PEERS = ("faiss", "numpy")
_STRIDE = 7919 * 4096
_COLD_REPEATS = 3
_N_CHECKED = 5


@dataclass(frozen=True, kw_only=True)
class FineConfig(BenchConfig):
    """Options of ``hashlens bench fine``."""

    rows: int = setting(1 << 16, "Rows of the table.")
    dim: int = setting(4096, "Width of the features.")
    pool: int = setting(5000, "Rows of a pool, all of the query's class.")
    k: str = setting("10,1000", "Hits wanted, comma-separated.")
    forms: str = setting("f32,f16", "How features are stored, comma-separated.")
    cold: bool = setting(True, "Read pools from disk as well.")
    dir: Path | None = setting(
        None, "Where the table is written meanwhile; default: the system's temporary folder."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dim", "pool"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is at least 1", field=name)
        if self.rows < 2 * self.pool:
            raise InvalidInputError("rows is at least twice the pool", field="rows")
        if not self.dtypes:
            raise InvalidInputError("forms names one form at least", field="forms")
        if not all(1 <= k <= self.pool for k in self.ks):
            raise InvalidInputError("k is 1 to the size of the pool", field="k")

    @property
    def ks(self) -> list[int]:
        """Return the numbers of hits."""
        try:
            return [int(k) for k in self.k.split(",") if k]
        except ValueError:
            raise InvalidInputError("k is numbers with commas between", field="k") from None

    @property
    def dtypes(self) -> list[FeatureDtype]:
        """Return the forms."""
        known = {dtype.value: dtype for dtype in FeatureDtype}
        names = [name for name in self.forms.split(",") if name]
        if not set(names) <= set(known):
            raise InvalidInputError(f"forms are of {', '.join(known)}", field="forms")
        return [known[name] for name in names]


@click.command()
@options(FineConfig, "bench")
def fine(config: FineConfig) -> None:
    """Measure the fine stage: Euclidean distances of a query to a pool, and the k nearest.

    The table is written in the layout of the store, read through the same mappings, and removed at
    the end. Warm pools lie in the page cache; cold ones were put out of it. Peers answer from the
    same mapped rows: NumPy and faiss (its `knn`) on the gathered rows, as float32.

    With a sketch (one byte per number, in memory) the answer is the same, bit for bit; "int8 alone"
    is the recall without the second look at the stored features that makes it so. "kernel GB/s" is
    without choosing the k nearest, and "share" compares it with reading as many bytes end to end,
    the better quarter of both's rounds. "second looks" are all rows where a sketch would not pay:
    it is left out then. "no prefetch" is what the same kernel takes if nothing asks the disk for
    rows in advance, and "nor advice" if the system reads around them besides.
    """
    check_outputs(config)
    peers = config.peers(_PEERS)
    if config.threads:
        numba.set_num_threads(config.threads)
    memory = machine.Memory()
    results: list[Measured] = []
    shape = Shape(config.rows, config.dim, config.pool, config.seed)
    for dtype in config.dtypes:
        with made(shape, dtype, config.dir) as table:
            _check(table, config)
            results += _warm(table, config, peers, memory)
            if config.cold:
                results += _cold(table, config)
    del memory  # `describe` takes as much once more
    settings = {key: value for key, value in asdict(config).items() if key not in ("json", "plot")}
    settings["dir"] = str(config.dir or tempfile.gettempdir())
    versions = ("faiss-cpu",) if "faiss" in peers else ()
    publish(Report("fine", machine.describe(packages=versions), results, settings), config)


def _warm(
    table: Table, config: FineConfig, peers: list[str], memory: machine.Memory
) -> Iterator[Measured]:
    form = table.snapshot.feature_dtype.value

    n = len(table.queries)

    def turns(work: Callable[[Query], Any], ahead: int = 0) -> Callable[[int], Any]:
        return lambda i: work(table.queries[(i + ahead) % n])

    for query in table.queries:  # into the page cache
        _answer(table, query, 1)
    exact_bytes = config.pool * table.row_bytes
    byte_bytes = config.pool * sketch_row_bytes(config.dim)
    for k in config.ks:
        contenders = {
            "ours": turns(partial(_answer, table, k=k)),
            # Another query than the contender's before it: its pool may still be in a cache.
            "distances": turns(partial(_distances, table), n // 2),
            "memory": lambda i: memory.read(exact_bytes, i * _STRIDE),
            "sketch": turns(partial(_answer, table, k=k, sketch=table.sketch)),
            "bounds": turns(partial(_bounds, table), n // 2),
            "memory of the sketch": lambda i: memory.read(byte_bytes, i * _STRIDE),
            **{name: turns(partial(_PEER[name], table, k=k)) for name in peers},
        }
        times = interleaved(contenders, repeats=config.repeats)
        ms = {name: taken.median_ms for name, taken in times.items()}
        peer_ms = {name: ms[name] for name in peers}
        yield Measured(
            case=f"{form} warm",
            rows=config.pool,
            bits=0,
            k=k,
            ours_ms=ms["ours"],
            peer_ms=peer_ms,
            gb_per_s=exact_bytes / ms["ours"] / 1e6,
            recall=1.0,
            extra=_shares(times["distances"], times["memory"], exact_bytes),
        )
        some = table.queries[:_N_CHECKED]
        looked = [len(_answer(table, query, k, table.sketch)[1]) for query in some]
        read_bytes = float(np.mean(looked)) * table.row_bytes
        if min(looked) < config.pool:
            read_bytes += byte_bytes
        alone = [_recall_alone(table, query, k) for query in some]
        yield Measured(
            case=f"{form} warm, sketch",
            rows=config.pool,
            bits=0,
            k=k,
            ours_ms=ms["sketch"],
            peer_ms={**peer_ms, "no sketch": ms["ours"]},
            gb_per_s=read_bytes / ms["sketch"] / 1e6,
            recall=1.0,
            extra={
                **_shares(times["bounds"], times["memory of the sketch"], byte_bytes),
                "second looks": float(np.mean(looked)),
                "int8 alone": float(np.mean(alone)),
            },
        )


def _shares(kernel: Times, memory: Times, nbytes: int) -> dict[str, float]:
    """Compare a kernel with reading as much end to end."""
    # Both in the better rounds: in the others, somebody else had a CPU.
    kernel_ms, memory_ms = kernel.percentile_ms(25), memory.percentile_ms(25)
    return {"kernel GB/s": nbytes / kernel_ms / 1e6, "share": memory_ms / kernel_ms}


def _cold(table: Table, config: FineConfig) -> Iterator[Measured]:
    form = table.snapshot.feature_dtype.value

    def median_ms(advice: int, work: Callable[[Query], Any]) -> float:
        samples = []
        for query in table.queries[:_COLD_REPEATS]:
            for segment in table.snapshot.features:
                pagecache.advise(segment, advice)
            pagecache.put_out(table.files)
            began_ns = time.perf_counter_ns()
            work(query)
            samples.append((time.perf_counter_ns() - began_ns) / 1e6)
        return float(np.median(samples))

    k = config.ks[-1]
    exact_bytes = config.pool * table.row_bytes
    faulted = {
        "no prefetch": median_ms(mmap.MADV_RANDOM, partial(_kernel, table)),
        "nor advice": median_ms(mmap.MADV_NORMAL, partial(_kernel, table)),
    }
    ours_ms = median_ms(mmap.MADV_RANDOM, partial(_answer, table, k=k))
    yield Measured(
        case=f"{form} cold",
        rows=config.pool,
        bits=0,
        k=k,
        ours_ms=ours_ms,
        peer_ms=faulted,
        gb_per_s=exact_bytes / ours_ms / 1e6,
        recall=1.0,
        extra={"rows/s": config.pool / ours_ms * 1e3},
    )
    for k in config.ks:
        sketch_ms = median_ms(mmap.MADV_RANDOM, partial(_answer, table, k=k, sketch=table.sketch))
        yield Measured(
            case=f"{form} cold, sketch",
            rows=config.pool,
            bits=0,
            k=k,
            ours_ms=sketch_ms,
            peer_ms={**faulted, "no sketch": ours_ms},
            recall=1.0,
            extra={"rows/s": config.pool / sketch_ms * 1e3},
        )


def _answer(
    table: Table, query: Query, k: int, sketch: Sketch | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the `k` nearest rows, best first, ties by row; and those whose distance was taken."""
    rows, bits, distances = stage.rank(
        table.snapshot, query.rows, query.bits, query.feature, k, Cancel(), sketch
    )
    keys = select.euclidean_keys(distances, bits)
    edge = np.partition(keys, k - 1)[k - 1]
    near = np.flatnonzero(keys <= edge)
    return rows[near[np.argsort(keys[near], kind="stable")[:k]]], rows


def _distances(table: Table, query: Query) -> NDArray[np.float32]:
    return stage.distances_to(table.snapshot, query.rows, query.feature, Cancel())


def _bounds(table: Table, query: Query) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return table.sketch.bounds(query.rows, query.feature, Cancel())


def _kernel(table: Table, query: Query) -> NDArray[np.float32]:
    """Compute distances with nothing done about rows on disk."""
    place = readahead.Place.of(table.snapshot)
    out = np.empty(query.rows.shape[0], dtype=np.float32)
    is_half = table.snapshot.feature_dtype is FeatureDtype.F16
    euclidean.distances(
        place.addresses, place.segment_bits, is_half, query.rows, query.feature, out
    )
    return out


def _recall_alone(table: Table, query: Query, k: int) -> float:
    near, _ = _bounds(table, query)
    alone = query.rows[np.argsort(near, kind="stable")[:k]]
    return len(np.intersect1d(alone, _answer(table, query, k)[0])) / k


def _gathered(table: Table, query: Query) -> NDArray[np.float32]:
    features, per_segment = table.snapshot.features, table.snapshot.rows_per_segment
    gathered = np.empty((query.rows.shape[0], table.snapshot.dim), dtype=np.float32)
    ends = np.searchsorted(query.rows, per_segment * np.arange(1, len(features) + 1)).tolist()
    for segment, (lo, hi) in enumerate(zip([0, *ends], ends, strict=False)):
        gathered[lo:hi] = features[segment][query.rows[lo:hi] - segment * per_segment]
    return gathered


def _by_numpy(table: Table, query: Query, k: int) -> Any:
    difference = _gathered(table, query) - query.feature
    squared = np.einsum("ij,ij->i", difference, difference)
    near = np.argpartition(squared, k - 1)[:k]
    return query.rows[near[np.argsort(squared[near])]]


def _by_faiss(table: Table, query: Query, k: int) -> Any:
    import faiss

    faiss.omp_set_num_threads(numba.get_num_threads())
    _, near = faiss.knn(query.feature[np.newaxis], _gathered(table, query), k)
    return query.rows[near[0]]


_PEER = {"numpy": _by_numpy, "faiss": _by_faiss}


def _check(table: Table, config: FineConfig) -> None:
    """Compare with brute force: sums in the order of the definition, and in double precision."""
    for query in table.queries[:_N_CHECKED]:
        gathered = _gathered(table, query)
        lanes = np.zeros((len(gathered), euclidean.LANES), dtype=np.float32)
        for lo in range(0, config.dim, euclidean.LANES):
            part = gathered[:, lo : lo + euclidean.LANES]
            lanes[:, : part.shape[1]] += np.square(part - query.feature[lo : lo + part.shape[1]])
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        want = np.sqrt(lanes[:, 0])
        if _distances(table, query).tobytes() != want.tobytes():
            raise WrongAnswerError("distances differ from the definition's")
        real = np.sqrt(np.square(gathered.astype(np.float64) - query.feature).sum(axis=1))
        if not np.allclose(want, real, rtol=1e-5, atol=0):
            raise WrongAnswerError("distances are far from those in double precision")
        if not (_bounds(table, query)[1] <= want).all():
            raise WrongAnswerError("the sketch's bound is above a distance")
        order = query.rows[np.argsort(want, kind="stable")]
        for k in config.ks:
            for sketch in (None, table.sketch):
                if not np.array_equal(_answer(table, query, k, sketch)[0], order[:k]):
                    raise WrongAnswerError(f"the {k} nearest are not brute force's")

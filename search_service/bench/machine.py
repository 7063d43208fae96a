"""What the numbers were measured on, its memory bandwidth included."""

from __future__ import annotations

import datetime
import mmap
import os
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from numba import types
from numba.np.ufunc.parallel import threading_layer

from hashlens.cli.bench import cpu_name
from search_service.kernels.compile import U64_IN, kernel

_BANDWIDTH_BYTES = 1 << 30
_BUDGET_S = 1.5

_SUMS_OUT = types.Array(types.uint64, 1, "C")


@kernel(types.void(U64_IN, _SUMS_OUT), parallel=True)
def _read_all(values, sums):  # type: ignore[no-untyped-def]
    n, n_parts = values.shape[0], sums.shape[0]
    for part in numba.prange(n_parts):
        block = values[n * part // n_parts : n * (part + 1) // n_parts]
        total = np.uint64(0)
        for i in range(block.shape[0]):
            total += block[i]
        sums[part] = total


class Memory:
    """A gigabyte to read, for what memory gives at best: each thread reads a part end to end.

    That is what hardware looks ahead in best. Explicit prefetches and several streams for each
    thread, 2 to 8 of them, were tried beside it and are not faster.
    """

    def __init__(self) -> None:
        block = mmap.mmap(-1, _BANDWIDTH_BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)  # so that looking up pages costs nothing
        self._values = np.frombuffer(block, dtype=np.uint64)
        self._values[:] = 1
        self._sums = np.zeros(numba.get_num_threads(), dtype=np.uint64)

    @property
    def nbytes(self) -> int:
        """How much there is."""
        return self._values.nbytes

    def read(self, nbytes: int, place: int = 0) -> None:
        """Read some of it, with all of Numba's threads.

        Parameters
        ----------
        nbytes
            How much, `nbytes` of all at most.
        place
            Any number: another one is another part, as far as there are others.
        """
        n = nbytes // 8
        first = place * n % (len(self._values) - n + 1)
        _read_all(self._values[first : first + n], self._sums)
        assert int(self._sums.sum()) == n, "the bandwidth kernel does not read everything"


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine and what runs on it."""

    cpu: str
    n_cpus: int
    n_threads: int
    """Of the kernels, and of the peers."""
    memory_gb: float
    memory_gb_per_s: float
    """Measured: all threads read a gigabyte, the best of several rounds."""
    target: str
    """CPU that Numba compiles for, and the widest vectors it uses."""
    threading_layer: str
    system: str
    versions: dict[str, str]
    date: str

    def to_json(self) -> dict[str, Any]:
        """Return the plain form."""
        return asdict(self)

    def summary(self) -> str:
        """Return one line."""
        return (
            f"{self.cpu}, {self.n_cpus} CPUs, {self.n_threads} threads, {self.target}, "
            f"{self.memory_gb:.0f} GB, memory read at {self.memory_gb_per_s:.1f} GB/s, {self.date}"
        )


def describe(*, packages: tuple[str, ...] = ()) -> Machine:
    """Measure and describe this machine; takes a second or two.

    Parameters
    ----------
    packages
        Distributions whose versions matter beside our own.
    """
    n_threads = numba.get_num_threads()
    rate = memory_gb_per_s()
    return Machine(
        cpu=cpu_name(),
        n_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        n_threads=n_threads,
        memory_gb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        memory_gb_per_s=rate,
        target=_target(),
        threading_layer=threading_layer(),  # type: ignore[no-untyped-call]
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        versions={name: version(name) for name in ("numba", "numpy", "llvmlite", *packages)},
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def memory_gb_per_s() -> float:
    """Measure how fast all of Numba's threads together read memory that no cache holds."""
    memory = Memory()
    best_s = float("inf")
    ends_s = time.perf_counter() + _BUDGET_S
    while (began_s := time.perf_counter()) < ends_s:
        memory.read(memory.nbytes)
        best_s = min(best_s, time.perf_counter() - began_s)
    return memory.nbytes / best_s / 1e9


def _target() -> str:
    """Return what Numba compiles for, by its own settings, not what the CPU could do."""
    name = getattr(numba.config, "CPU_NAME", None) or llvmlite.binding.get_host_cpu_name()
    features = getattr(numba.config, "CPU_FEATURES", None)
    if features is None:
        features = llvmlite.binding.get_host_cpu_features().flatten()
    enabled = set(features.split(","))
    widest = next(
        (word for word in ("avx512vpopcntdq", "avx512f", "avx2", "neon") if f"+{word}" in enabled),
        "baseline",
    )
    return f"{name} ({widest})"

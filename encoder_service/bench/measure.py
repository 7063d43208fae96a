"""The service's speed as a share of the bare loop's."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from encoder_service import openmp
from encoder_service.bench import bare
from encoder_service.bench.bare import Ran, Setup
from encoder_service.bench.command import BUNDLED, EncodeConfig
from encoder_service.bench.drawing import paired_bars
from encoder_service.bench.pictures import Kind, make_pictures
from encoder_service.bench.service import Applied, apply, check, requests_of, serving, spawned
from encoder_service.model.checkpoint import default_checkpoint_path
from hashlens.cli.bench import cpu_name
from hashlens.cli.child import ServiceProcess
from hashlens.cli.processes import interruptible
from hashlens.cpus import usable_cpus

_N_CHECKED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model and one kind of picture; medians over the rounds."""

    model: str
    pictures: str
    callers: int
    bare_images_per_s: float
    service_images_per_s: float
    ratio: float
    """The median of each round's own."""
    bare_one_ms: float
    """Decode and one call of the model with one image."""
    lone_caller_ms: float
    """The same through the service, for a caller who is alone."""
    latency_ratio: float
    p50_ms: float
    p99_ms: float
    """Of all callers together."""
    bare_cpu_ms: float
    server_cpu_ms: float
    client_cpu_ms: float
    """CPU time for an image, of each process; the load generator has the same cores."""
    near_bits: int
    """Bits that differ from the bare loop's, all with H within 1e-4 of 0.5; others fail the run."""


@dataclass(frozen=True, slots=True)
class Report:
    """All cases, and where they were measured."""

    machine: str
    settings: Mapping[str, Any]
    cases: Sequence[Case]

    def to_json(self) -> dict[str, Any]:
        """Return the plain form: the first case's ratio on top, all cases below."""
        first = self.cases[0]
        return {
            "bench": "encode",
            "bare_images_per_s": first.bare_images_per_s,
            "service_images_per_s": first.service_images_per_s,
            "ratio": first.ratio,
            "machine": self.machine,
            "settings": dict(self.settings),
            "results": [asdict(case) for case in self.cases],
        }

    def shown(self) -> RenderableType:
        """Return the table, ready to print."""
        table = Table(box=None, pad_edge=False)
        table.add_column("model, pictures", overflow="fold")
        headings = ("bare /s", "service /s", "ratio", "bare one ms", "lone ms", "x", "p50", "p99")
        for heading in (*headings, "CPU ms: bare", "server", "client"):
            table.add_column(heading, justify="right", no_wrap=True)
        for case in self.cases:
            table.add_row(
                f"{case.model}, {case.pictures}",
                f"{case.bare_images_per_s:.1f}",
                f"{case.service_images_per_s:.1f}",
                f"{case.ratio:.3f}",
                f"{case.bare_one_ms:.2f}",
                f"{case.lone_caller_ms:.2f}",
                f"{case.latency_ratio:.2f}",
                f"{case.p50_ms:.0f}",
                f"{case.p99_ms:.0f}",
                f"{case.bare_cpu_ms:.2f}",
                f"{case.server_cpu_ms:.2f}",
                f"{case.client_cpu_ms:.2f}",
            )
        note = (
            "ratio: images a second of the service by those of the bare loop, round by round. x: a "
            "lone caller's time by that of decoding and one bare call. CPU ms: for an image."
        )
        return Group(f"bench encode on {self.machine}", "", table, "", note)


def drawn(report: Report) -> bytes:
    """Draw images a second, bare and served, and return a PNG.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    return paired_bars(
        f"bench encode\n{report.machine}",
        [
            f"{case.model}, {case.pictures}\n"
            f"ratio {case.ratio:.2f}, alone {case.latency_ratio:.2f}x"
            for case in report.cases
        ],
        (
            ("bare loop", [case.bare_images_per_s for case in report.cases]),
            ("service", [case.service_images_per_s for case in report.cases]),
        ),
        ".0f",
        xscale="log",
        xlabel=f"images a second, {report.cases[0].callers} callers",
    )


def run(config: EncodeConfig) -> Report:
    """Measure all cases.

    Raises
    ------
    HashlensError
        An answer is wrong, a call failed, or the service did not start.
    """
    cases = []
    with prepared(config) as checkpoints:
        for model, path in checkpoints.items():
            with (
                serving(
                    path, config, max_batch=config.max_batch, max_wait_ms=config.max_wait_ms
                ) as server,
                spawned() as loads,
                spawned() as loops,
            ):
                setup = Setup(
                    path,
                    config.threads,
                    config.decode_threads or usable_cpus(),
                    config.max_batch,
                )
                cases += [
                    _case(config, model, kind, setup, server, loads, loops)
                    for kind in kinds(config)
                ]
    return Report(machine(config), settings(config), cases)


def _case(
    config: EncodeConfig,
    model: str,
    kind: Kind,
    setup: Setup,
    server: ServiceProcess,
    loads: ProcessPoolExecutor,
    loops: ProcessPoolExecutor,
) -> Case:
    images = make_pictures(kind, config.n_pictures, config.seed)
    checked = images[:_N_CHECKED]
    near_bits = check(server, checked, loops.submit(bare.answers, setup, checked).result())
    requests = requests_of(images)
    crowds: list[tuple[Ran, Applied]] = []
    singles: list[tuple[Ran, Applied]] = []
    for _ in range(config.repeats):
        for rounds, loop, callers in (
            (crowds, bare.loop, config.callers),
            (singles, bare.one_by_one, 1),
        ):
            ran = loops.submit(loop, setup, images, config.seconds).result()
            applied = apply(loads, server, requests, callers=callers, seconds=config.seconds)
            rounds.append((ran, applied))

    def median(of: Callable[[Ran, Applied], float], rounds: Iterable[tuple[Ran, Applied]]) -> float:
        return statistics.median(of(ran, applied) for ran, applied in rounds)

    return Case(
        model=model,
        pictures=kind,
        callers=config.callers,
        bare_images_per_s=median(lambda ran, _: ran.images_per_s, crowds),
        service_images_per_s=median(lambda _, service: service.loaded.calls_per_s, crowds),
        # Round by round: both of a round meet the same moods of the machine.
        ratio=median(lambda ran, service: service.loaded.calls_per_s / ran.images_per_s, crowds),
        bare_one_ms=median(lambda ran, _: ran.median_ms, singles),
        lone_caller_ms=median(lambda _, service: service.loaded.percentile_ms(50), singles),
        latency_ratio=median(
            lambda ran, service: service.loaded.percentile_ms(50) / ran.median_ms, singles
        ),
        p50_ms=median(lambda _, service: service.loaded.percentile_ms(50), crowds),
        p99_ms=median(lambda _, service: service.loaded.percentile_ms(99), crowds),
        bare_cpu_ms=median(lambda ran, _: ran.cpu_ms, crowds),
        server_cpu_ms=median(lambda _, service: service.server_cpu_ms, crowds),
        client_cpu_ms=median(lambda _, service: service.client_cpu_ms, crowds),
        near_bits=near_bits,
    )


@contextmanager
def prepared(config: EncodeConfig) -> Iterator[dict[str, Path]]:
    """Give the models' checkpoints by name, those of random weights while the block runs."""
    # Read by OpenMP when it is loaded: as the service's own main does, for all processes alike.
    openmp.set_up()
    with interruptible(), tempfile.TemporaryDirectory(prefix="hashlens-bench-") as folder:
        checkpoints = {}
        for model in config.parts("models"):
            if model == BUNDLED:
                checkpoints[model] = default_checkpoint_path()
            elif "." in model or "/" in model:
                checkpoints[Path(model).name] = Path(model)
            else:
                path = checkpoints[model] = Path(folder) / f"{model}.safetensors"
                bare.write_untrained(model, path, config.seed)
        yield checkpoints


def kinds(config: EncodeConfig) -> list[Kind]:
    """Return the pictures that were asked for."""
    known: tuple[Kind, ...] = ("garment", "photo")
    return [kind for kind in known if kind in config.parts("pictures")]


def machine(config: EncodeConfig) -> str:
    """Return one line about where this was measured."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{cpu_name()}, {usable_cpus()} CPUs, {memory_gb:.0f} GB, Python "
        f"{platform.python_version()}, torch {version('torch')}, grpcio {version('grpcio')}, "
        f"pillow {version('pillow')}, {date}"
    )


def settings(config: EncodeConfig) -> dict[str, Any]:
    """Return what was asked for, for who repeats it."""
    return {
        name: value for name, value in asdict(config).items() if name not in ("json", "plot")
    } | {"processes": "server, load generator and bare loop on the same cores"}

"""The service's speed by `max_batch` and `max_wait_ms`: where its defaults come from."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from encoder_service.bench.command import EncodeConfig
from encoder_service.bench.drawing import new_figure, png
from encoder_service.bench.measure import kinds, machine, prepared, settings
from encoder_service.bench.pictures import make_pictures
from encoder_service.bench.service import Applied, apply, requests_of, serving, spawned

MAX_BATCHES = (1, 8, 32, 64)
MAX_WAITS_MS = (0.0, 2.0, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One setting; medians over the rounds."""

    max_batch: int
    max_wait_ms: float
    callers: int
    images_per_s: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Swept:
    """All settings, and where they were measured."""

    machine: str
    settings: Mapping[str, Any]
    points: Sequence[Point]

    def to_json(self) -> dict[str, Any]:
        """Return the plain form."""
        return {
            "bench": "encode --sweep",
            "machine": self.machine,
            "settings": dict(self.settings),
            "results": [asdict(point) for point in self.points],
        }

    def shown(self) -> RenderableType:
        """Return the table, ready to print."""
        table = Table(box=None, pad_edge=False)
        headings = ("max_batch", "max_wait_ms", "callers", "images/s", "p50 ms", "p99 ms")
        for heading in headings:
            table.add_column(heading, justify="right")
        for point in self.points:
            table.add_row(
                str(point.max_batch),
                f"{point.max_wait_ms:g}",
                str(point.callers),
                f"{point.images_per_s:.1f}",
                f"{point.p50_ms:.1f}",
                f"{point.p99_ms:.1f}",
            )
        return Group(f"bench encode --sweep on {self.machine}", "", table)


def run(config: EncodeConfig) -> Swept:
    """Measure the first model with the first kind of picture under every setting.

    All services run at once and are asked in turn, so that a mood of the machine meets them all.
    One that is not asked takes memory, and no CPU.

    Raises
    ------
    HashlensError
        A call failed, or the service did not start.
    """
    crowds = sorted({1, max(config.callers // 8, 1), config.callers})
    found: dict[tuple[int, float, int], list[Applied]] = {}
    requests = requests_of(make_pictures(kinds(config)[0], config.n_pictures, config.seed))
    with ExitStack() as stack:
        path = next(iter(stack.enter_context(prepared(config)).values()))
        loads = stack.enter_context(spawned())
        servers = {
            (max_batch, wait_ms): stack.enter_context(
                serving(path, config, max_batch=max_batch, max_wait_ms=wait_ms)
            )
            for max_batch in MAX_BATCHES
            for wait_ms in MAX_WAITS_MS
        }
        for _ in range(config.repeats):
            for callers in crowds:
                for (max_batch, wait_ms), server in servers.items():
                    applied = apply(
                        loads, server, requests, callers=callers, seconds=config.seconds
                    )
                    found.setdefault((max_batch, wait_ms, callers), []).append(applied)
    points = [
        Point(
            max_batch=max_batch,
            max_wait_ms=wait_ms,
            callers=callers,
            images_per_s=statistics.median(one.loaded.calls_per_s for one in applied),
            p50_ms=statistics.median(one.loaded.percentile_ms(50) for one in applied),
            p99_ms=statistics.median(one.loaded.percentile_ms(99) for one in applied),
        )
        for (max_batch, wait_ms, callers), applied in sorted(
            found.items(), key=lambda item: (item[0][2], item[0][0], item[0][1])
        )
    ]
    return Swept(machine(config), settings(config), points)


def drawn(swept: Swept) -> bytes:
    """Draw images a second and latency by setting, and return a PNG.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    crowds = sorted({point.callers for point in swept.points})
    figure, all_axes = new_figure(len(crowds), f"bench encode\n{swept.machine}", 4.5)
    # Okabe and Ito's colours, told apart with any colour vision.
    colours = dict(zip(MAX_WAITS_MS, ("#0072B2", "#E69F00", "#009E73"), strict=True))
    for axes, callers in zip(all_axes, crowds, strict=True):
        beside = axes.twinx()
        for wait_ms in MAX_WAITS_MS:
            points = [p for p in swept.points if (p.callers, p.max_wait_ms) == (callers, wait_ms)]
            batches = [str(point.max_batch) for point in points]
            style = {"color": colours[wait_ms], "marker": "o", "markersize": 4}
            label = f"wait {wait_ms:g} ms"
            axes.plot(batches, [p.images_per_s for p in points], label=label, **style)
            beside.plot(batches, [p.p50_ms for p in points], linestyle=":", **style)
        axes.set_ylim(bottom=0)
        beside.set_ylim(bottom=0)
        axes.set(title=f"{callers} in flight", xlabel="max_batch")
    all_axes[0].set_ylabel("images a second (lines)")
    beside.set_ylabel("median latency, ms (dotted)")
    all_axes[-1].legend(fontsize="small")
    return png(figure)

"""`hashlens demo`: the whole path on bundled images, measured and shown."""

from __future__ import annotations

import json
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from hashlens.cli.demo_data import load_demo_images
from hashlens.cli.explained import Words
from hashlens.cli.extras import require
from hashlens.cli.ingest import encode_patiently, pipelined
from hashlens.cli.processes import Services, ServicesConfig, interruptible, running
from hashlens.cli.progress import Advance, step
from hashlens.cli.report import (
    SHOWN_ANSWERS,
    STAGES,
    Answer,
    Asked,
    LabelScore,
    Report,
    demo_page,
)
from hashlens.cli.text import console, counted, duration, printable
from hashlens.client import Client
from hashlens.errors import HashlensError
from hashlens.evaluation import precision_at
from hashlens.types import CollectionSpec, Item, Query, SearchOptions, SearchResult

COLLECTION = "demo"
ENLARGE = 4
"""The images are 28 pixels wide; services get them as files of 112, as the model was trained."""

K = 100
MIN_POOL = 1000
"""A fifth of the images: the default would have the fine stage look at all of them."""

SEED = 1
BATCH_ITEMS = 64
WORKERS = 3
KEPT_LOG_LINES = 40

CREDIT = "Images: Fashion-MNIST test split, © 2017 Zalando SE, MIT licence."


@dataclass(frozen=True, slots=True)
class Dataset:
    """The bundled images."""

    images: NDArray[np.uint8]
    """Shape ``[n, 28, 28]``."""
    labels: NDArray[np.uint8]
    """Shape ``[n]``, positions in `classes`."""
    classes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """One query's answer."""

    row: int
    result: SearchResult
    call_ns: int


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/demo"),
    show_default=True,
    help="Directory of report.html and summary.json.",
)
@click.option("--images", "n_images", type=click.IntRange(1), help="Images to store; default all.")
@click.option(
    "--queries",
    "n_queries",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Images held out and searched by.",
)
def demo(out: Path, n_images: int | None, n_queries: int) -> None:
    """Try everything on bundled images.

    Indexes and searches them through both services, prints how well and how fast, and writes a
    report. Everything runs on free loopback ports with its data in a temporary directory; nothing
    but the report is left behind.
    """
    require("encoder", "search", purpose="hashlens demo")
    begun = time.monotonic()
    data = Dataset(*load_demo_images())
    query_rows, stored_rows = split(data.labels, n_queries, n_images)
    log = console(stderr=True)
    with (
        interruptible(),
        _services(log) as services,
        Client(services.search, services.encoder) as client,
    ):
        spec = client.create_collection(COLLECTION, expected_rows=len(stored_rows)).spec
        store(client, spec, data, stored_rows, log)
        measured = search(client, data, query_rows, log)
        explained = explain(client, data, query_rows)
        model = client.model()
    by_label, overall = scores(measured, data)
    report = Report(
        model=model,
        images=len(stored_rows),
        overall=overall,
        by_label=by_label,
        median_ms=medians(measured),
        seconds=time.monotonic() - begun,
    )
    show(report)
    write(report, data, measured, explained, out)
    click.echo(f"report   {printable(str(out / 'report.html'))}")
    click.echo(f"summary  {printable(str(out / 'summary.json'))}")


def split(
    labels: NDArray[np.uint8], n_queries: int, n_images: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose queries and stored images: disjoint, shuffled, the labels balanced in both.

    Parameters
    ----------
    labels
        Shape ``[n]``.
    n_queries
        Rows to hold out.
    n_images
        Rows to store; None for all others.

    Returns
    -------
    query_rows, stored_rows
        int64, shapes ``[n_queries]`` and ``[n_images]``.
    """
    n_left = len(labels) - n_queries
    if n_left < (n_images or 1):
        raise click.UsageError(
            f"{len(labels):,} images are bundled: too few for {n_queries:,} queries and "
            f"{n_images or 1:,} stored"
        )
    shuffled = np.random.default_rng(SEED).permutation(len(labels))
    # How many of the same label come before: sorted by that, every stretch is balanced.
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        of_label = np.flatnonzero(labels[shuffled] == label)
        rank[of_label] = np.arange(len(of_label))
    order = shuffled[np.lexsort((labels[shuffled], rank))].astype(np.int64)
    stop = len(labels) if n_images is None else n_queries + n_images
    return order[:n_queries], order[n_queries:stop]


@contextmanager
def _services(log: Console) -> Iterator[Services]:
    """Start both services on data that are gone afterwards; show their logs if anything fails."""
    lines: deque[str] = deque(maxlen=KEPT_LOG_LINES)
    # Killed in a hurry, the search service leaves a store that takes a moment to end.
    temporary = tempfile.TemporaryDirectory(prefix="hashlens-demo-", ignore_cleanup_errors=True)
    stopped: Advance = lambda n: None  # noqa: E731 - rebound when stopping is a step to show
    try:
        with temporary as folder, ExitStack() as stack:
            config = ServicesConfig(data=Path(folder, "data"), isolated=True)
            with step(log, "Starting both services", 2) as started:
                services = stack.enter_context(
                    running(
                        config,
                        on_line=lambda name, line: lines.append(f"{name:<7} | {line}"),
                        on_serving=lambda name: started(1),
                        on_stopped=lambda name: stopped(1),
                    )
                )
            yield services
            with step(log, "Stopping both services", 2) as stopped:
                stack.close()
    except HashlensError:
        for line in lines:
            log.print(printable(line), soft_wrap=True)
        raise


def picture_bytes(data: Dataset, row: int) -> bytes:
    """Return a bundled image as a file would hold it, every other one a JPEG."""
    from hashlens.cli.images import enlarged

    return enlarged(data.images[row], ENLARGE, "JPEG" if row % 2 else "PNG")


def store(
    client: Client,
    spec: CollectionSpec,
    data: Dataset,
    rows: NDArray[np.int64],
    log: Console,
) -> None:
    """Encode images by the encoder service, and write them by the search service."""

    def work(batch: NDArray[np.int64]) -> int:
        images = [picture_bytes(data, row) for row in batch]
        items = []
        for row, encoded in zip(batch, encode_patiently(client, images, spec), strict=True):
            if isinstance(encoded, HashlensError):
                raise encoded
            facts = {"row": int(row), "label": data.classes[data.labels[row]]}
            items.append(
                Item(
                    id=f"fashion-mnist-test/{row:05d}",
                    embedding=encoded.embedding,
                    payload=json.dumps(facts).encode(),
                )
            )
        return client.upsert(spec.name, items).n_written

    batches = [rows[lo : lo + BATCH_ITEMS] for lo in range(0, len(rows), BATCH_ITEMS)]
    with step(log, "Encoding and storing", len(rows), "images") as advance:
        for n_written in pipelined(work, batches, WORKERS):
            advance(n_written)


def search(client: Client, data: Dataset, rows: NDArray[np.int64], log: Console) -> list[Measured]:
    """Search by image, one query after the other, and time each call."""
    measured = []
    options = SearchOptions(k=K, min_pool=MIN_POOL)
    with step(log, "Searching by image", len(rows), "queries") as advance:
        for row in rows:
            image = picture_bytes(data, row)
            begun = time.perf_counter_ns()
            result = client.search(COLLECTION, image=image, options=options)
            measured.append(Measured(int(row), result, time.perf_counter_ns() - begun))
            advance(1)
    return measured


def explain(client: Client, data: Dataset, rows: NDArray[np.int64]) -> list[SearchResult]:
    """Search again for what the report shows, explained; apart, so that no timing has it in."""
    options = SearchOptions(k=SHOWN_ANSWERS, min_pool=MIN_POOL, with_explanation=True)
    results = []
    for lo in range(0, len(rows), BATCH_ITEMS):
        queries = [Query(image=picture_bytes(data, row)) for row in rows[lo : lo + BATCH_ITEMS]]
        for result in client.search_batch(COLLECTION, queries, options=options):
            if isinstance(result, HashlensError):
                raise result
            results.append(result)
    return results


def answers_of(result: SearchResult, classes: Sequence[str]) -> tuple[Answer, ...]:
    """Return the hits with the labels that were stored with them."""
    words = None if result.explanation is None else Words(result.explanation)
    answers = []
    for hit in result.hits:
        facts = json.loads(hit.payload)
        assert hit.distance is not None
        answer = Answer(facts["row"], classes.index(facts["label"]), hit.distance, hit.hamming_bits)
        if words is not None and hit.explanation is not None:
            answer = replace(answer, seen_as=words.hit(hit), why=words.lines(hit.explanation))
        answers.append(answer)
    return tuple(answers)


def asked_of(row: int, data: Dataset, result: SearchResult) -> Asked:
    """Return a query as the report shows it."""
    asked = Asked(row, int(data.labels[row]), answers_of(result, data.classes))
    if result.explanation is None:
        return asked
    words = Words(result.explanation)
    unsure = "\n".join(words.bit(bit, margin) for bit, margin in words.unsure())
    return replace(asked, seen_as=words.query, unsure=unsure)


def scores(
    measured: Sequence[Measured], data: Dataset
) -> tuple[tuple[LabelScore, ...], LabelScore]:
    """Return precision by label, and over all queries."""
    asked = np.array([data.labels[m.row] for m in measured])
    relevant = np.zeros((len(measured), K), np.bool_)
    for n, m in enumerate(measured):
        found = [answer.label for answer in answers_of(m.result, data.classes)]
        relevant[n, : len(found)] = np.array(found) == asked[n]
    at_10, at_100 = precision_at(relevant, 10), precision_at(relevant, 100)

    def score(name: str, chosen: NDArray[np.bool_]) -> LabelScore:
        return LabelScore(
            name, int(chosen.sum()), float(at_10[chosen].mean()), float(at_100[chosen].mean())
        )

    by_label = tuple(
        score(name, asked == label)
        for label, name in enumerate(data.classes)
        if (asked == label).any()
    )
    return by_label, score("overall", np.ones(len(asked), np.bool_))


def medians(measured: Sequence[Measured]) -> dict[str, float]:
    """Return the median of each stage, in milliseconds."""
    rows = []
    for m in measured:
        timings = m.result.receipt.timings
        encode = timings.encode
        rows.append(
            (
                encode.decode_ns,
                encode.queue_ns,
                encode.inference_ns,
                timings.coarse_ns,
                timings.fine_ns,
                m.call_ns,
            )
        )
    return dict(zip(STAGES, (np.median(rows, axis=0) / 1e6).tolist(), strict=True))


def show(report: Report) -> None:
    """Print the numbers."""
    out = console()
    precision = Table(title="Precision by label", title_justify="left", box=None, pad_edge=False)
    precision.add_column("label")
    for heading in ("queries", "@10", "@100"):
        precision.add_column(heading, justify="right")
    for score in (*report.by_label, report.overall):
        last = score is report.by_label[-1]
        precision.add_row(
            score.name,
            str(score.queries),
            f"{score.precision_at_10:.3f}",
            f"{score.precision_at_100:.3f}",
            style="bold" if score is report.overall else None,
            end_section=last,
        )
    stages = Table(title="Median time per stage", title_justify="left", box=None, pad_edge=False)
    stages.add_column("stage")
    stages.add_column("ms", justify="right")
    stages.add_column("", style="dim")
    for stage, meaning in STAGES.items():
        whole = stage == "whole_call"
        stages.add_row(
            stage.replace("_", " "),
            f"{report.median_ms[stage]:.2f}",
            meaning,
            style="bold" if whole else None,
        )
    out.print()
    out.print(precision)
    out.print()
    out.print(stages)
    out.print()
    out.print(
        f"{counted(report.images, 'image')}, {report.overall.queries:,} queries by image, "
        f"{report.model.backbone} with {report.model.n_bits} bits on {report.model.device}, "
        f"{duration(report.seconds)} in all"
    )
    out.print()


def summary(report: Report) -> dict[str, object]:
    """Return the numbers as summary.json holds them."""
    return {
        "precision_at_10": report.overall.precision_at_10,
        "precision_at_100": report.overall.precision_at_100,
        "images": report.images,
        "queries": report.overall.queries,
        "median_ms": dict(report.median_ms),
        "by_label": {score.name: asdict(score) for score in report.by_label},
        "model": {
            "model_id": report.model.model_id,
            "backbone": report.model.backbone,
            "n_bits": report.model.n_bits,
            "dim": report.model.dim,
            "device": report.model.device,
        },
        "seconds": report.seconds,
    }


def write(
    report: Report,
    data: Dataset,
    measured: Sequence[Measured],
    explained: Sequence[SearchResult],
    out: Path,
) -> None:
    """Write report.html and summary.json."""
    from hashlens.cli.images import png

    asked = [asked_of(m.row, data, result) for m, result in zip(measured, explained, strict=True)]
    out.mkdir(parents=True, exist_ok=True)
    html = demo_page(report, data.classes, asked, lambda row: png(data.images[row]), CREDIT)
    (out / "report.html").write_text(html, "utf-8")
    (out / "summary.json").write_text(json.dumps(summary(report), indent=2) + "\n", "utf-8")

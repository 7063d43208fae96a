"""`hashlens inspect`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from click.core import ParameterSource

from encoder_service.data.config import DataConfig
from encoder_service.inspection import tables
from hashlens.cli.connect import connected, targets
from hashlens.cli.progress import step
from hashlens.cli.text import console
from hashlens.codehealth import WANTED_ROWS, CodeHealth, health_of, verdict
from hashlens.config import options
from hashlens.errors import InvalidInputError, PreconditionError

# torch takes seconds to import, and `hashlens --help` reads this module: so what needs it is
# imported in the functions.
if TYPE_CHECKING:
    from encoder_service.data.types import Split

_COLLECTION_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")

_NO_MARGINS = "A collection keeps codes, not activations: how sure the bits were is not known."


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What both kinds of target take."""

    n_rows: int
    seed: int
    as_json: bool
    plot: Path | None


@click.command()
@click.argument("target", required=False)
@targets
@options(DataConfig, "inspect")
@click.option(
    "--split",
    type=click.Choice(["train", "test"]),
    help="Part of --data to encode.  [default: test, where there is one]",
)
@click.option(
    "--images",
    "n_images",
    type=click.IntRange(0),
    default=10_000,
    show_default=True,
    help="Most images to encode, drawn at random; 0: only what the checkpoint says.",
)
@click.option(
    "--rows",
    "n_rows",
    type=click.IntRange(1),
    default=100_000,
    show_default=True,
    help="Most rows of a collection to look at, drawn at random.",
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of the draws.")
@click.option(
    "--device", default="auto", show_default=True, help="Where the model runs: cpu, cuda, auto."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--plot",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write PNG plots into this folder.",
)
@click.pass_context
def inspect(
    ctx: click.Context,
    target: str | None,
    search_target: str,
    encoder_target: str,
    config: DataConfig,
    split: Split | None,
    n_images: int,
    n_rows: int,
    seed: int,
    device: str,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Show what a checkpoint or a collection holds, and whether its codes are healthy.

    TARGET is a checkpoint file, or the name of a collection (with --search, or where no such file
    is); without it, the checkpoint that comes with the package. A checkpoint's codes are judged on
    the images of --data; without it, on the bundled ones. Labels are not needed.
    """
    settings = _Settings(n_rows=n_rows, seed=seed, as_json=as_json, plot=plot)
    if plot is not None:
        _require_matplotlib()
    says_search = ctx.get_parameter_source("search_target") is ParameterSource.COMMANDLINE
    if target is None and says_search:
        raise click.UsageError("name the collection to inspect on that search service")
    if target is not None and (says_search or _is_collection(target)):
        _inspect_collection(target, search_target, encoder_target, settings)
        return
    _inspect_checkpoint(target, config, split, n_images, device, settings)


def _is_collection(target: str) -> bool:
    path = Path(target)
    if path.exists():
        return False
    if _COLLECTION_NAME.fullmatch(target):
        return True
    raise InvalidInputError(
        f"there is no file {target}. Name a checkpoint, or a collection with --search.",
        field="target",
    )


def _inspect_checkpoint(
    target: str | None,
    config: DataConfig,
    split: Split | None,
    n_images: int,
    device: str,
    settings: _Settings,
) -> None:
    from encoder_service.inspection.model import facts_of, health_of_checkpoint, meanings_of
    from encoder_service.inspection.pictures import open_pictures, some_of
    from encoder_service.model.checkpoint import default_checkpoint_path, load_checkpoint

    path = default_checkpoint_path() if target is None else Path(target)
    checkpoint = load_checkpoint(path)
    facts = facts_of(checkpoint, path)
    meanings = meanings_of(checkpoint)
    health: CodeHealth | None = None
    what = "no images"
    if n_images:
        random = np.random.default_rng(settings.seed)
        source, what = open_pictures(config, split)
        source = some_of(source, n_images, random)
        with step(console(stderr=True), "encode", len(source), "images") as advance:
            told = 0

            def on_progress(done: int, total: int) -> None:
                nonlocal told
                advance(done - told)
                told = done

            health = health_of_checkpoint(
                checkpoint, source, device=device, random=random, on_progress=on_progress
            )
    plots = _plots(health, settings.plot)
    if settings.as_json:
        click.echo(
            _json(
                {
                    **facts,
                    **_judged(health, what),
                    "bits": [
                        {
                            "bit": meaning.bit,
                            "fires_for": [checkpoint.classes[c] for c in meaning.fires_for],
                            "silent_for": [checkpoint.classes[c] for c in meaning.silent_for],
                        }
                        for meaning in meanings
                    ],
                }
            )
        )
        return
    out = console()
    tables.print_facts(out, {"file": str(path), **facts})
    tables.print_bits(out, meanings, checkpoint.classes, health)
    if health is not None:
        out.print(f"Judged by {health.n_rows:,} codes of {what}.")
        tables.print_health(out, health)
    _say_plots(plots)


def _inspect_collection(
    name: str, search_target: str, encoder_target: str, settings: _Settings
) -> None:
    from encoder_service.inspection.collection import read_codes

    random = np.random.default_rng(settings.seed)
    with connected(search_target, encoder_target) as client:
        info = client.collection(name)
        with step(console(stderr=True), "read codes", info.n_items, "rows") as advance:
            packed, n_items = read_codes(
                client, info, max_rows=settings.n_rows, random=random, on_progress=advance
            )
    spec = info.spec
    if not n_items:
        raise PreconditionError(f"collection {name!r} is empty: there are no codes to look at")
    # A pool takes as large a share of the sample as it would of the collection.
    wanted_rows = max(1, round(WANTED_ROWS * len(packed) / n_items))
    health = health_of(packed, spec.n_bits, random=random, wanted_rows=wanted_rows)
    facts: dict[str, Any] = {
        "collection": spec.name,
        "items": n_items,
        "model_id": spec.model_id,
        "n_bits": spec.n_bits,
        "dim": spec.dim,
        "feature_dtype": spec.feature_dtype.value,
        "version": info.version,
        "durability": info.durability,
    }
    all_of = "all" if len(packed) == n_items else f"a sample of {len(packed):,}"
    what = f"{all_of} of the {n_items:,} items in collection {name}"
    plots = _plots(health, settings.plot)
    if settings.as_json:
        click.echo(_json({**facts, **_judged(health, what)}))
        return
    out = console()
    tables.print_facts(out, facts)
    out.print(f"Judged by the codes of {what}. {_NO_MARGINS}")
    tables.print_health(out, health)
    _say_plots(plots)


def _judged(health: CodeHealth | None, what: str) -> dict[str, Any]:
    if health is None:
        return {"health": None, "verdict": None, "judged_by": what}
    return {"health": health.to_json(), "verdict": verdict(health).to_json(), "judged_by": what}


def _require_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise PreconditionError("--plot needs matplotlib: pip install 'hashlens[train]'")


def _plots(health: CodeHealth | None, folder: Path | None) -> list[Path]:
    if health is None or folder is None:
        return []
    from encoder_service.inspection.plots import write_plots

    return write_plots(health, folder)


def _say_plots(paths: list[Path]) -> None:
    for path in paths:
        click.echo(f"wrote {path}", err=True)


def _json(facts: dict[str, Any]) -> str:
    return json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)

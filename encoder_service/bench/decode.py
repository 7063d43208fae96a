"""`hashlens bench decode`: what reducing JPEG files as they are decoded saves and changes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table

from encoder_service.bench.drawing import paired_bars
from encoder_service.bench.pictures import make_photos
from encoder_service.decode import DecodeLimits, decode
from encoder_service.preprocess import Preprocessing
from hashlens.cli.bench import OutputConfig, check_outputs, cpu_name, publish
from hashlens.config import options, setting
from hashlens.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(OutputConfig):
    """Which pictures, and to what size they are brought."""

    sizes: str = setting(
        "640x480,1280x960,1920x1440,4000x3000", "Of the JPEG files, in pixels, comma-separated."
    )
    resize: int = setting(256, "The preprocessing's, in pixels.")
    crop: int = setting(224, "The preprocessing's, in pixels.")
    n_pictures: int = setting(4, "Different pictures of each size.")
    repeats: int = setting(5, "Rounds of which medians are taken.")
    seed: int = setting(1, "Of the pictures.")

    def __post_init__(self) -> None:
        for name in ("n_pictures", "repeats"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is at least 1", field=name)
        if self.seed < 0:
            raise InvalidInputError("seed is 0 or more", field="seed")
        if not 1 <= self.crop <= self.resize <= 4096:
            raise InvalidInputError("1 <= crop <= resize <= 4096 must hold", field="crop")
        self.shapes()

    def shapes(self) -> list[tuple[int, int]]:
        """Return width and height of each size."""
        shapes = []
        for part in filter(None, self.sizes.split(",")):
            sides = part.split("x")
            if len(sides) != 2 or not all(s.isdecimal() and 16 <= int(s) <= 6000 for s in sides):
                raise InvalidInputError(
                    f"{part!r} is no size: say WIDTHxHEIGHT, each 16 to 6000", field="sizes"
                )
            shapes.append((int(sides[0]), int(sides[1])))
        if not shapes:
            raise InvalidInputError("sizes names at least one", field="sizes")
        return shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Pictures of one size; times are for one of them, from the file's bytes to the crop."""

    size: str
    file_bytes: int
    whole_ms: float
    draft_ms: float
    ratio: float
    """How many times as fast the draft is; the median of each round's own."""
    mean_difference: float
    """Between the pixels of both crops, in levels of 255."""


@dataclass(frozen=True, slots=True)
class Report:
    """All sizes, and where they were measured."""

    machine: str
    settings: Mapping[str, Any]
    cases: Sequence[Case]

    def to_json(self) -> dict[str, Any]:
        """Return the plain form."""
        return {
            "bench": "decode",
            "machine": self.machine,
            "settings": dict(self.settings),
            "results": [asdict(case) for case in self.cases],
        }

    def shown(self) -> RenderableType:
        """Return the table, ready to print."""
        table = Table(box=None, pad_edge=False)
        for heading in ("size", "KiB", "whole ms", "draft ms", "x", "difference"):
            table.add_column(heading, justify="left" if heading == "size" else "right")
        for case in self.cases:
            table.add_row(
                case.size,
                f"{case.file_bytes / 1024:,.0f}",
                f"{case.whole_ms:.2f}",
                f"{case.draft_ms:.2f}",
                f"{case.ratio:.2f}",
                f"{case.mean_difference:.2f}",
            )
        note = (
            "From a JPEG file's bytes to the crop, one thread. draft: with jpeg_draft, see "
            "docs/training.md. difference: the mean between the pixels of both, in levels of 255."
        )
        return Group(f"bench decode on {self.machine}", "", table, "", note)


def run(config: DecodeConfig) -> Report:
    """Measure each size, both ways in turn."""
    whole = Preprocessing(resize=config.resize, crop=config.crop)
    draft = replace(whole, jpeg_draft=True)
    rng = np.random.default_rng(config.seed)
    cases = []
    for width, height in config.shapes():
        files = make_photos(config.n_pictures, rng, (width, height))
        pixels = {way: [_crop(data, way) for data in files] for way in (whole, draft)}
        rounds = [(_ms(files, whole), _ms(files, draft)) for _ in range(config.repeats)]
        differences = [
            np.abs(a.astype(np.int16) - b).mean()
            for a, b in zip(pixels[whole], pixels[draft], strict=True)
        ]
        cases.append(
            Case(
                size=f"{width} x {height}",
                file_bytes=sum(map(len, files)) // len(files),
                whole_ms=statistics.median(a for a, _ in rounds),
                draft_ms=statistics.median(b for _, b in rounds),
                ratio=statistics.median(a / b for a, b in rounds),
                mean_difference=float(np.mean(differences)),
            )
        )
    settings = {
        name: getattr(config, name) for name in ("resize", "crop", "n_pictures", "repeats", "seed")
    }
    return Report(cpu_name(), settings, cases)


def drawn(report: Report) -> bytes:
    """Draw both times over the size, and return a PNG.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    return paired_bars(
        f"bench decode\n{report.machine}",
        [f"{case.size}\n{case.ratio:.1f}x" for case in report.cases],
        (
            ("whole", [case.whole_ms for case in report.cases]),
            ("draft", [case.draft_ms for case in report.cases]),
        ),
        ".1f",
        xlabel="a picture, ms",
    )


def _crop(data: bytes, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    return preprocessing.resize_crop(decode(data, DecodeLimits(), preprocessing.least_px))


def _ms(files: Sequence[bytes], preprocessing: Preprocessing) -> float:
    """Return the time for one file, in milliseconds."""
    began_s = time.perf_counter()
    for data in files:
        _crop(data, preprocessing)
    return (time.perf_counter() - began_s) * 1e3 / len(files)


@click.command("decode")
@options(DecodeConfig, "bench")
def decode_command(config: DecodeConfig) -> None:
    """Measure decoding of JPEG files, whole and reduced as they are decoded."""
    check_outputs(config)
    publish(run(config), config, drawn)

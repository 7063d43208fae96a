"""Both services as real processes, shared by the tests of this folder."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hashlens import Client
from hashlens.cli.demo_data import load_demo_images
from tests.support.collector import Collector
from tests.support.observed import Observed
from tests.support.services import ServiceProcess


def to_bytes(pixels: np.ndarray, file_format: str) -> bytes:
    """Upscale a small grey picture four times and encode it."""
    image = Image.fromarray(pixels).resize((112, 112), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, file_format, quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def images() -> list[bytes]:
    """300 real pictures, PNG and JPEG in turn."""
    pixels, _, _ = load_demo_images()
    return [to_bytes(p, ("PNG", "JPEG")[i % 2]) for i, p in enumerate(pixels[:300])]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """The encoder service with the bundled checkpoint."""
    log = tmp_path_factory.mktemp("encoder") / "log"
    with ServiceProcess("encoder_service", log=log) as process:
        yield process


class SearchProcess(ServiceProcess):
    """The search service with its embedded store on one data directory."""

    def __init__(self, folder: Path, encoder: str, *arguments: str) -> None:
        self.data_dir = folder / "data"
        super().__init__(
            "search_service",
            "--data-dir",
            str(self.data_dir),
            "--encoder",
            encoder,
            *arguments,
            log=folder / "log",
        )


@pytest.fixture(scope="module")
def search(
    encoder: ServiceProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SearchProcess]:
    """The search service on a new data directory."""
    with SearchProcess(tmp_path_factory.mktemp("search"), encoder.target) as process:
        yield process


@pytest.fixture
def client(encoder: ServiceProcess, search: SearchProcess) -> Iterator[Client]:
    """A client of both."""
    with Client(search.target, encoder.target) as client:
        yield client


@pytest.fixture(scope="session")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """Both services with all that can be watched of them, and a collector of their spans."""
    folder = tmp_path_factory.mktemp("observed")
    with Collector() as collector, Observed(folder, collector) as both:
        yield both

"""A short form of ``python -m tests.fuzz.images``, and what it has found."""

from __future__ import annotations

import json
import multiprocessing
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from ctypes import c_longlong
from pathlib import Path

import numpy as np
import pytest

from encoder_service.decode import DecodeLimits, decode
from encoder_service.preprocess import Preprocessing
from encoder_service.structure import pixel_limit
from hashlens import Client
from hashlens.errors import InvalidInputError
from tests.fuzz import bombs as made
from tests.fuzz.bombs import bombs, ifd, tiff_frame
from tests.fuzz.corpus import UPRIGHT_TURN, corpus, scene, with_orientation
from tests.fuzz.images import Outcome, _awaited, attack, decode_all, judge, keep
from tests.fuzz.mutations import case
from tests.support.services import ServiceProcess

SEED = 20_261_128


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    log = tmp_path_factory.mktemp("fuzz") / "log"
    with ServiceProcess("encoder_service", log=log) as process:
        yield process
    assert "Traceback" not in log.read_text(errors="replace")


def test_a_case_can_be_made_again() -> None:
    files = corpus()
    first = [case(SEED, number, files) for number in range(200)]
    assert first == [case(SEED, number, files) for number in range(200)]
    assert first != [case(SEED + 1, number, files) for number in range(200)]
    assert len({spoiled.data for spoiled in first}) > 150


def test_spoiled_images_are_decoded_or_refused(tmp_path: Path) -> None:
    outcome = decode_all(1_200, SEED, tmp_path, n_processes=1)
    assert not outcome.failures
    assert outcome.counts["OK"] > 100
    assert outcome.counts["InvalidInputError"] > 400
    assert sum(outcome.counts.values()) == 1_200


def test_spoiled_images_over_the_wire(service: ServiceProcess, tmp_path: Path) -> None:
    outcome, peak = attack(service.target, service.process.pid, range(200), SEED, tmp_path)
    assert not outcome.failures
    assert outcome.counts["OK"] > 10
    assert outcome.counts["INVALID_ARGUMENT"] > 50
    assert outcome.counts["OK"] + outcome.counts["INVALID_ARGUMENT"] == 200
    assert peak.grown_mb < 300


def test_what_takes_too_long_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks for failures can fail."""
    spoiled = case(SEED, 0, corpus())
    assert not judge(spoiled, Outcome(), Preprocessing())
    monkeypatch.setattr("tests.fuzz.images._BASE_CPU_S", -100.0)
    assert "took" in judge(spoiled, Outcome(), Preprocessing())


def test_a_decoder_that_dies_is_found() -> None:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=os._exit, args=(11,))
    process.start()
    sender.close()
    assert _awaited(process, receiver, context.RawValue(c_longlong, -1)) is None
    assert process.exitcode == 11


def test_what_failed_is_kept(tmp_path: Path) -> None:
    spoiled = case(SEED, 3, corpus())
    line = keep(tmp_path, SEED, spoiled, "it broke")
    assert line.startswith(f"image-{SEED}-3: ")
    assert (tmp_path / f"image-{SEED}-3.bin").read_bytes() == spoiled.data
    told = json.loads((tmp_path / f"image-{SEED}-3.json").read_text())
    assert case(told["seed"], told["number"], corpus()) == spoiled


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_variants_of_a_picture_have_one_code(service: ServiceProcess, kind: str) -> None:
    picture = scene(60, 44)
    with Client(service.target, service.target) as client:
        codes = {
            client.encode(with_orientation(picture, orientation, kind)).embedding.code
            for orientation in UPRIGHT_TURN
        }
    assert len(codes) == 1


def test_exif_variants_of_a_jpeg_have_one_code(service: ServiceProcess) -> None:
    # Blocks of eight, so that turning commutes with what JPEG leaves out, and no colour is halved.
    picture = scene(64, 48).convert("L").convert("RGB")
    with Client(service.target, service.target) as client:
        codes = {
            client.encode(with_orientation(picture, orientation, "JPEG")).embedding.code
            for orientation in UPRIGHT_TURN
        }
    assert len(codes) == 1


# --- slow or large by how they are built ---

SMALL_BOMBS = dict(bombs(size_bytes=4 * 2**20, side=2_200))

REFUSED = {
    "png empty chunks": "small pieces",
    "png empty data": "small pieces",
    "png chunks behind": "small pieces",
    "jpeg arithmetic": "arithmetic",
    "jpeg comments": "segments",
    "jpeg apps": "segments",
    "jpeg padding": "small pieces",
    "gif comment blocks": "small pieces",
    "gif extension blocks": "small pieces",
    "bmp rle8 one pixel a line": "run lengths",
    "bmp rle4 nothing": "run lengths",
    "tiff strips": "strips",
    "tiff jpeg scans": "progressive",
    "tiff jpeg arithmetic": "arithmetic",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_slow_by_its_structure_is_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match=REFUSED[name]) as caught:
        decode(SMALL_BOMBS[name], DecodeLimits())
    assert "Save it again" in caught.value.message


def test_scans_are_counted_against_pixels() -> None:
    many = made._jpeg_scans(200, 60)
    assert decode(many, DecodeLimits()).size == (200, 200)
    limit = pixel_limit("JPEG", many)
    assert limit.pixels == 500_000_000 // 60
    assert pixel_limit("JPEG", corpus()["jpeg progressive"]).pixels == float("inf")
    large = made._jpeg_scans(3_000, 60)
    with pytest.raises(InvalidInputError, match="for 60 scans"):
        decode(large, DecodeLimits())


def test_transparency_is_laid_on_white_in_strips_as_in_one() -> None:
    picture = scene(1_500, 1_500)
    picture.putalpha(picture.convert("L").rotate(90))
    layers = np.asarray(picture).astype(np.uint32)
    got = np.asarray(decode(made.encoded(picture, "PNG"), DecodeLimits())).astype(int)
    colour, alpha = layers[..., :3], layers[..., 3:]
    want = (colour * alpha + 255 * (255 - alpha) + 127) // 255
    assert np.abs(got - want.astype(int)).max() <= 1


def test_libtiff_writes_nothing() -> None:
    garbage = ifd(tiff_frame(64, 64, compression=4, bits=1), 512, "<") + b"\1\xa7" * 300
    code = (
        "import sys\n"
        "from encoder_service.decode import DecodeLimits, decode\n"
        "from hashlens.errors import InvalidInputError\n"
        "try:\n"
        "    decode(sys.stdin.buffer.read(), DecodeLimits())\n"
        "except InvalidInputError:\n"
        "    pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=garbage, capture_output=True, timeout=60, check=True
    )
    assert done.stderr == b""


def test_a_directory_beyond_the_file_is_no_strip() -> None:
    with pytest.raises(InvalidInputError, match="damaged"):
        decode(b"II*\0" + struct.pack("<I", 2**32 - 1), DecodeLimits())

"""`hashlens bench pool`: what it counts, what it reads, and that it can fail."""

from __future__ import annotations

import gzip
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from hashlens import codes
from hashlens.cli.main import main
from hashlens.errors import InvalidInputError
from hashlens.types import SearchOptions, SearchResult
from search_service.bench import pool
from search_service.bench.embeddings import Embeddings, read_pictures
from search_service.bench.machine import Machine
from search_service.bench.policies import ORDERS, Coarse, Policy, policies
from search_service.engine import Engine
from search_service.snapshot import Snapshot
from tests.reference import search as slow
from tests.reference.kernels import asymmetric, hamming

N_BITS = 12


def made(n: int, n_test: int) -> Embeddings:
    """Three crowded classes, the training rows first."""
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 3, n).astype(np.uint8)
    prototypes = rng.random((3, N_BITS))
    activations = np.clip(prototypes[labels] + rng.normal(0, 0.15, (n, N_BITS)), 0, 1).astype(
        np.float32
    )
    features = (labels[:, np.newaxis] + rng.standard_normal((n, 5))).astype(np.float16)
    is_test = np.arange(n) >= n - n_test
    return Embeddings(
        codes.pack(activations > 0.5), features, activations, labels, is_test, "a-model"
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pool") / "embeddings.npz"
    made(1400, 1020).save(path)
    return path


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the bandwidth reads a gigabyte, which no test needs."""
    plain = Machine("cpu", 2, 2, 1.0, 1.0, "x", "y", "z", {}, "2026-01-01")
    monkeypatch.setattr(pool, "describe", lambda: plain)


def bench(saved: Path, *arguments: str) -> Any:
    flags = ["--embeddings", str(saved), "--queries", "4", "--repeats", "2", *arguments]
    return CliRunner().invoke(main, ["bench", "pool", *flags])


def test_a_table_of_every_policy_on_both_databases(saved: Path, tmp_path: Path) -> None:
    plot = tmp_path / "pool.png"
    result = bench(saved, "--json", "-", "--plot", str(plot))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert plot.read_bytes().startswith(b"\x89PNG")
    cases = {line["case"]: line for line in report["results"]}
    assert {line["rows"] for line in report["results"]} == {1016, 1396}
    for name, rows in (("test", 1016), ("all", 1396)):
        for policy in policies(rows):
            line = cases[f"{name}: {policy.name}"]
            assert 0 < line["pool"] <= line["pool_p95"] <= rows
            assert line["ours_ms"] > 0
            for depth in policy.depths:
                assert 0 < line[f"recall@{depth}"] <= 1
        assert cases[f"{name}: exhaustive, as an audit's"]["gb_per_s"] > 0
    cut = cases["all: min_pool 1,000, max_pool 1,000"]
    assert (cut["pool"], cut["pool_p95"], cut["cut"]) == (1000, 1000, 1)
    assert set(cut) >= {"age@100", "odds@100", "whole@100", "class@100"}
    assert report["settings"]["queries"] == 4
    assert report["settings"]["distinct_codes"]["all"] > 1


def test_an_engine_that_answers_wrongly_fails_the_run(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Engine.search

    def reversed_hits(self: Engine, *arguments: Any, **named: Any) -> SearchResult:
        result = honest(self, *arguments, **named)
        return replace(result, hits=result.hits[::-1])

    monkeypatch.setattr(Engine, "search", reversed_hits)
    result = bench(saved)
    assert result.exit_code == 1
    assert "the answer is not the nearest of its pool" in result.output


def test_too_few_pictures_and_files_of_another_kind(saved: Path, tmp_path: Path) -> None:
    assert "too few for 100 queries" in bench(saved, "--queries", "100").output
    other = tmp_path / "other.npz"
    np.savez(other, packed=np.zeros(3))
    assert "holds no embeddings" in bench(other).output
    other.write_text("no archive")
    assert "holds no embeddings" in bench(other).output
    nowhere = bench(tmp_path / "no" / "where.npz")
    assert nowhere.exit_code == 2
    assert "there is no folder" in nowhere.output


def test_what_is_saved_is_read(saved: Path) -> None:
    written, read = made(1400, 1020), Embeddings.load(saved)
    for name in ("packed", "features", "activations", "labels", "is_test"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    assert read.model_id == "a-model"
    assert read.features.dtype == np.float16


@pytest.mark.parametrize(
    "options",
    [
        SearchOptions(k=5, min_pool=0),
        SearchOptions(k=5, min_pool=60),
        SearchOptions(k=5, min_pool=5000),
        SearchOptions(k=5, min_pool=60, max_pool=50),
        SearchOptions(k=5, max_hamming_bits=2),
        SearchOptions(k=5, max_hamming_bits=0, max_pool=5),
    ],
)
def test_pools_are_those_of_the_definition(options: SearchOptions) -> None:
    found = made(300, 300)
    snapshot = Snapshot.from_arrays(
        found.packed, n_bits=N_BITS, features=found.features, model_id="a-model"
    )
    stored = [code.tobytes() for code in found.packed]
    policy = Policy("", options)
    for row in range(0, 300, 60):
        query = found.query(row)
        coarse = Coarse.of(snapshot, query)
        bits = [hamming(code, query.code) for code in stored]
        assert coarse.hamming_bits.tolist() == bits
        # Who is within, and of them the first by each order.
        within = [r for r in range(300) if bits[r] <= policy.threshold_bits(coarse)]
        assert query.activations is not None
        weights = slow.bit_weights(query.activations)
        soft = [asymmetric(code, query.code, weights) for code in stored]
        first = {
            "margins": sorted(within, key=lambda r: (bits[r], soft[r], r)),
            "age": sorted(within, key=lambda r: (bits[r], r)),
            "whole": sorted(within, key=lambda r: (soft[r], bits[r], r)),
        }
        for order in ORDERS:
            pool_rows = np.flatnonzero(policy.pool(coarse, order)).tolist()
            if order in first:
                assert pool_rows == sorted(first[order][: options.max_pool])
            else:
                assert len(pool_rows) == min(len(within), options.max_pool or 300)
        assert policy.is_cut(coarse) == (len(within) > (options.max_pool or 300))
        n_wanted = min(300, max(options.k, options.min_pool))
        if options.max_hamming_bits is None:
            assert len(within) >= n_wanted
            nearer = sum(b < policy.threshold_bits(coarse) for b in bits)
            assert nearer < n_wanted


def test_fashion_mnist_in_a_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def write(prefix: str, n: int) -> np.ndarray:
        images = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        header = struct.pack(">IIII", 0x803, n, 28, 28)
        images_file = tmp_path / f"{prefix}-images-idx3-ubyte.gz"
        images_file.write_bytes(gzip.compress(header + images.tobytes()))
        labels_file = tmp_path / f"{prefix}-labels-idx1-ubyte.gz"
        labels_file.write_bytes(gzip.compress(struct.pack(">II", 0x801, n) + labels.tobytes()))
        return images

    train, test = write("train", 30), write("t10k", 20)
    found = read_pictures(tmp_path)
    np.testing.assert_array_equal(found.images, np.concatenate([train, test]))
    assert found.labels.tolist() == [i % 10 for i in range(30)] + [i % 10 for i in range(20)]
    assert found.is_test.tolist() == [False] * 30 + [True] * 20
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8 + 7)))
    with pytest.raises(InvalidInputError, match="does not hold Fashion-MNIST"):
        read_pictures(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_pictures(tmp_path)
    bundled = read_pictures(None)
    assert bundled.images.shape == (5000, 28, 28)
    assert bundled.is_test.all()

"""The benchmarks as a user runs them, on tables too small to measure anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from hashlens.cli.main import main
from search_service import coarse as stage
from search_service import multi_index
from search_service.bench import peers, timing
from search_service.bench.asker import Asker, planted, snapshot_of
from search_service.bench.command import BenchConfig
from search_service.bench.data import make_codes, make_features
from search_service.bench.report import Measured, WrongAnswerError
from search_service.multi_index import MultiIndex

FEW = ["--repeats", "1", "--threads", "1"]


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments])


def results_of(path: Path) -> list[dict[str, Any]]:
    report = json.loads(path.read_text())
    assert report["machine"]["memory_gb_per_s"] > 0
    assert report["machine"]["n_threads"] >= 1
    for result in report["results"]:
        assert {"case", "rows", "bits", "k", "ours_ms", "peer_ms", "ratio", "gb_per_s"} <= set(
            result
        )
        for peer, ms in result["peer_ms"].items():
            assert result["ratio"][peer] == pytest.approx(ms / result["ours_ms"])
    return list(report["results"])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    from search_service.bench import machine

    monkeypatch.setattr(machine, "_BANDWIDTH_BYTES", 1 << 24)


def test_coarse_against_every_peer(tmp_path: Path) -> None:
    path, plot = tmp_path / "found.json", tmp_path / "found.png"
    done = bench(
        "coarse",
        *FEW,
        *("--rows", "3000,70", "--bits", "64,48", "--k", "20", "--batch", "4"),
        *("--codes", "both", "--peer", "all", "--json", str(path), "--plot", str(plot)),
    )
    assert done.exit_code == 0, done.output
    results = results_of(path)
    assert {(r["rows"], r["bits"]) for r in results} == {
        (rows, bits) for rows in (3000, 70) for bits in (64, 48)
    }
    nearest = [r for r in results if r["case"].startswith("nearest")]
    assert len(nearest) == 8
    assert all(set(r["peer_ms"]) == {"faiss", "usearch", "numpy"} for r in nearest)
    small = [r for r in results if "index" in r["case"]]
    assert any("faiss-hash" in r["peer_ms"] or "faiss-multihash" in r["peer_ms"] for r in small)
    assert all(r["scan_to_index"] > 0 for r in small)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "nearest, uniform" in done.output


def test_growth(tmp_path: Path) -> None:
    path, plot = tmp_path / "found.json", tmp_path / "found.png"
    done = bench(
        "growth",
        *FEW,
        *("--from-rows", "100", "--to-rows", "1000", "--k", "5", "--peer", "faiss"),
        *("--json", str(path), "--plot", str(plot)),
    )
    assert done.exit_code == 0, done.output
    assert [r["rows"] for r in results_of(path)] == [100] * 3 + [1000] * 3
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("max_pool", ["0", "50"])
def test_search(max_pool: str) -> None:
    done = bench(
        "search",
        *FEW,
        *("--rows", "500", "--dim", "24", "--k", "10", "--min-pool", "50"),
        *("--max-pool", max_pool, "--peer", "all", "--json", "-"),
    )
    assert done.exit_code == 0, done.output
    (result,) = json.loads(done.stdout)["results"]
    is_cut = max_pool != "0"
    # A cut pool is ours alone: nobody else has an order inside the last ring.
    assert set(result["peer_ms"]) == (set() if is_cut else {"numpy", "faiss"})
    assert result["pool"] == 50 if is_cut else result["pool"] >= 50


def test_a_wrong_answer_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    find_pools = stage.find_pools

    def forgetful(*args: Any, **options: Any) -> list[stage.Pool]:
        pools = find_pools(*args, **options)
        for pool in pools:
            pool.rows[-1] -= 1
        return pools

    monkeypatch.setattr(stage, "find_pools", forgetful)
    done = bench("coarse", *FEW, "--rows", "500", "--k", "5", "--batch", "2", "--no-index")
    assert done.exit_code == 1
    assert "brute force" in done.output


def test_a_wrong_peer_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(name: str, packed: np.ndarray, n_threads: int) -> peers.Peer:
        return peers.Peer(name, nearest=lambda queries, k: np.zeros((len(queries), k)))

    monkeypatch.setattr(peers, "open_peer", wrong)
    done = bench("coarse", *FEW, "--rows", "500", "--k", "5", "--batch", "2", "--peer", "numpy")
    assert done.exit_code == 1
    assert "numpy nearest" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coarse", "--peer", "nobody"], "nobody is no peer here"),
        (["coarse", "--rows", "many"], "comma-separated list of numbers"),
        (["coarse", "--repeats", "0"], "repeats is at least 1"),
        (["coarse", "--json", "/nowhere/at/all.json"], "there is no folder"),
        (["growth", "--from-rows", "10", "--to-rows", "5"], "from_rows is 1 to to_rows"),
        (["nothing"], "No such command"),
    ],
)
def test_wrong_options_are_said_in_one_line(arguments: Sequence[str], message: str) -> None:
    done = bench(*arguments)
    assert done.exit_code != 0
    assert message in done.output
    assert "Traceback" not in done.output


def test_help_lists_every_benchmark_and_imports_none() -> None:
    done = bench("--help")
    assert done.exit_code == 0
    for name in ("coarse", "fine", "search", "growth", "pool", "serve", "ingest", "claim"):
        assert f"\n  {name} " in done.output


def test_peers_are_chosen_by_name() -> None:
    assert BenchConfig(peer="all").peers(("a", "b")) == ["a", "b"]
    assert BenchConfig(peer="b").peers(("a", "b")) == ["b"]
    assert BenchConfig().peers(("a", "b")) == []


def test_turns_alternate_and_the_first_call_of_a_burst_does_not_count() -> None:
    calls: list[tuple[str, int]] = []
    times = timing.interleaved(
        {name: lambda i, name=name: calls.append((name, i)) for name in ("a", "b")},
        repeats=2,
        warmups=1,
    )
    burst = timing.SETTLING + timing.BURST
    assert [name for name, _ in calls] == (["a"] * burst + ["b"] * burst) * 3
    assert [i for name, i in calls if name == "a"] == [i for name, i in calls if name == "b"]
    assert all(len(found.samples_ms) == 2 * timing.BURST for found in times.values())
    assert all(len(found.first_ms) == 2 for found in times.values())
    assert times["a"].percentile_ms(100) >= times["a"].median_ms >= 0


def test_no_round_begins_when_the_time_is_over() -> None:
    times = timing.interleaved({"a": lambda i: None}, repeats=1000, budget_s=0.0)
    assert len(times["a"].samples_ms) == timing.MIN_REPEATS * timing.BURST


def test_trained_codes_are_crowded_and_uniform_ones_are_not() -> None:
    crowded = make_codes("trained", 5000, 48, n_queries=3, seed=1)
    spread = make_codes("uniform", 5000, 48, n_queries=3, seed=1)
    for table in (crowded, spread):
        assert table.packed.shape == (5000, 6)
        assert table.queries.shape == (3, 6)
    pools = [
        Asker(snapshot_of(table), table).pool(0, radius_bits=12).rows.shape[0]
        for table in (crowded, spread)
    ]
    assert 300 < pools[0] < 1000  # about a tenth
    assert pools[1] < 20
    again = make_codes("trained", 5000, 48, n_queries=3, seed=1)
    assert (again.packed == crowded.packed).all()
    odd = make_codes("uniform", 100, 13, n_queries=1, seed=1)
    assert not (odd.packed[:, -1] >> 5).any()


def test_features_are_those_of_the_row_whatever_the_block() -> None:
    classes = np.arange(50, dtype=np.uint8) % 10
    whole = make_features(classes, 16, np.dtype(np.float16), seed=3)
    parts = [
        make_features(classes[lo : lo + 20], 16, np.dtype(np.float16), seed=3, first_row=lo)
        for lo in (0, 20, 40)
    ]
    assert (np.concatenate(parts) == whole).all()
    assert (whole >= 0).all()
    gaps = np.linalg.norm(whole[:, None].astype(float) - whole[None], axis=2)
    same = classes[:, None] == classes[None]
    assert gaps[same].mean() < gaps[~same].mean()


def test_a_planted_neighbour_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_codes("uniform", 2000, 64, n_queries=8, seed=1)
    near = planted(table, 8, seed=2)
    asker, index = Asker(snapshot_of(table), near), MultiIndex().extended(snapshot_of(table))
    for query in range(8):
        pool = asker.pool(query, radius_bits=4)
        assert 3 in pool.hamming_bits
        asker.check_index(index, query, 4)
    monkeypatch.setattr(multi_index, "_MAX_FLIPS", 0)
    with pytest.raises(WrongAnswerError):
        asker.by_index(index, 0, 4)


def test_a_measurement_as_json() -> None:
    plain = Measured(
        case="c", rows=2, bits=8, k=1, ours_ms=2.0, peer_ms={"p": 5.0}, extra={"pool": 3}
    ).to_json()
    assert plain["ratio"] == {"p": 2.5}
    assert plain["pool"] == 3

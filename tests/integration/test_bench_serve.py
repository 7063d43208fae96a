"""`hashlens bench serve`, small: real processes, and answers that have to be right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from hashlens.traffic import Load, run
from hashlens.types import Embedding, Receipt, SearchResult
from search_service.bench import serve
from search_service.bench.answers import check_hits
from search_service.bench.data import make_codes
from search_service.bench.report import WrongAnswerError
from search_service.engine import Engine
from search_service.snapshot import Snapshot

QUICK = ["--rows", "600", "--repeats", "1", "--seconds", "0.5", "--k", "5", "--in-flight", "2"]


def test_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    ran = CliRunner().invoke(
        serve.serve, [*QUICK, "--dim", "4", "--rates", "50", "--json", str(out)]
    )
    assert ran.exit_code == 0, ran.output
    report = json.loads(out.read_text())
    results = {result["case"]: result for result in report["results"]}
    assert list(results) == [
        f"{form}, {load}"
        for load in ("2 in flight", "50 calls/s due")
        for form in ("echo", "plain", "packed")
    ]
    for case, result in results.items():
        assert result["calls_per_s"] > 0
        assert result["ours_ms"] <= result["p95_ms"] <= result["p99_ms"]
        assert ("echo" in result["ratio"]) == (not case.startswith("echo"))


@pytest.mark.parametrize(
    "wrong", [["--k", "0"], ["--rates", "fast"], ["--seconds", "0"], ["--peer", "nobody"]]
)
def test_options_are_checked_first(wrong: list[str]) -> None:
    ran = CliRunner().invoke(serve.serve, [*QUICK, *wrong])
    assert ran.exit_code != 0


@pytest.mark.parametrize("harm", ["none", "order", "distance", "missing", "unknown"])
def test_wrong_answers_are_noticed(harm: str) -> None:
    data = make_codes("uniform", 500, 16, n_queries=1, seed=1)
    ids = [serve._id_of(row) for row in range(500)]
    snapshot = Snapshot.from_arrays(data.packed, n_bits=16, ids=ids)
    query = Embedding(code=data.queries[0].tobytes(), n_bits=16, model_id="")
    answer = Engine().search(snapshot, query)
    hits = list(answer.hits)
    if harm == "order":
        hits[2], hits[3] = hits[3], hits[2]
    elif harm == "distance":
        hits[0] = type(hits[0])(hits[0].id, hits[0].hamming_bits + 1, None)
    elif harm == "missing":
        hits.pop()
    elif harm == "unknown":
        hits[0] = type(hits[0])("item-000000009x", hits[0].hamming_bits, None)
    found = SearchResult(tuple(hits), answer.receipt)
    assert isinstance(answer.receipt, Receipt)
    column = np.array([item_id.encode() for item_id in ids])

    def check() -> None:
        check_hits(found, query, 10, 10, data, None, column)

    if harm == "none":
        check()
    else:
        with pytest.raises(WrongAnswerError):
            check()


def test_calls_that_fail_are_counted() -> None:
    with pytest.raises(Exception, match="UNAVAILABLE"):
        run(Load(method="/x.X/Y", target="127.0.0.1:1", requests=[b""], seconds=0.1, in_flight=1))

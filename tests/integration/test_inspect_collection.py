"""`hashlens inspect COLLECTION` against a running search service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from encoder_service.inspection.command import inspect
from hashlens import Client, CollectionSpec, Embedding, Item, codes
from hashlens.codehealth import health_of, summary
from hashlens.errors import NotFoundError, PreconditionError
from tests.integration.conftest import SearchProcess

N = 2500
N_BITS = 20
MODEL = "a-model"


@pytest.fixture(scope="module")
def packed(search: SearchProcess) -> np.ndarray:
    """Codes of the collection "inspected", in the order of writing."""
    bits = np.random.default_rng(0).random((N, N_BITS)) < np.linspace(0.0, 0.6, N_BITS)
    stored = codes.pack(bits)
    with Client(search.target, search.target) as client:
        spec = CollectionSpec(name="inspected", model_id=MODEL, n_bits=N_BITS, dim=0)
        client.create_collection("inspected", spec=spec)
        items = [
            Item(id=f"{i:04}", embedding=Embedding(code.tobytes(), N_BITS, MODEL))
            for i, code in enumerate(stored)
        ]
        client.upsert("inspected", items)
        client.delete("inspected", ["0000"])
        client.collection("inspected")
    return stored[1:]


def run(search: SearchProcess, *arguments: object) -> Result:
    given = [*map(str, arguments), "--search", search.target, "--encoder", search.target]
    return CliRunner().invoke(inspect, given)


def facts_of(search: SearchProcess, *arguments: object) -> dict[str, Any]:
    result = run(search, *arguments, "--json")
    assert result.exit_code == 0, result.exception
    plain: dict[str, Any] = json.loads(result.stdout)
    return plain


def test_a_collection_is_judged_by_its_codes(search: SearchProcess, packed: np.ndarray) -> None:
    facts = facts_of(search, "inspected")
    assert (facts["items"], facts["n_bits"], facts["model_id"]) == (N - 1, N_BITS, MODEL)
    expected = health_of(packed, N_BITS, random=np.random.default_rng(0), n_queries=N)
    health = facts["health"]
    assert health["fire_rates"] == expected.fire_rates.tolist()
    assert health["dead_bit_positions"] == [0]
    exact = ("distinct_codes", "effective_codes", "collision_share", "correlation_max")
    assert {name: health[name] for name in exact} == {
        name: summary(expected)[name] for name in exact
    }
    # Pools are of a thousand rows drawn as queries.
    assert health["automatic_pool_mean"] == pytest.approx(expected.automatic_pools.mean(), rel=0.05)
    assert health["margin_histogram"] is None
    assert "all of the 2,499 items" in facts["judged_by"]


def test_a_sample_stands_for_the_whole(search: SearchProcess, packed: np.ndarray) -> None:
    facts = facts_of(search, "inspected", "--rows", 500)
    assert facts["items"] == N - 1
    assert facts["health"]["n_rows"] == 500
    # A pool takes the same share of the sample as of the table.
    assert facts["health"]["wanted_rows"] == 200
    rates = codes.unpack(packed, N_BITS).mean(axis=0)
    assert np.abs(np.array(facts["health"]["fire_rates"]) - rates).max() < 0.1
    assert facts == facts_of(search, "inspected", "--rows", 500)
    assert facts != facts_of(search, "inspected", "--rows", 500, "--seed", 2)


def test_tables_and_plots(search: SearchProcess, packed: np.ndarray, tmp_path: Path) -> None:
    result = run(search, "inspected", "--plot", tmp_path)
    assert result.exit_code == 0, result.exception
    assert "keeps codes, not activations" in result.stdout
    assert "These codes are " in result.stdout
    assert {path.stem for path in tmp_path.iterdir()} == {
        "fire_rates",
        "correlations",
        "pools",
        "buckets",
    }


def test_what_is_not_there_or_empty_is_said_to_be(search: SearchProcess) -> None:
    assert isinstance(run(search, "nowhere").exception, NotFoundError)
    with Client(search.target, search.target) as client:
        spec = CollectionSpec(name="empty", model_id=MODEL, n_bits=N_BITS, dim=0)
        client.create_collection("empty", spec=spec)
    error = run(search, "empty").exception
    assert isinstance(error, PreconditionError)
    assert "empty" in error.message

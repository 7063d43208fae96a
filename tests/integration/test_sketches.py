"""A service that keeps sketches, while items come and go: the answers are brute force's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hashlens import Client, CollectionSpec, Embedding, Item
from hashlens.types import FeatureDtype, SearchOptions
from tests.integration.conftest import SearchProcess
from tests.reference.kernels import euclidean
from tests.support.services import wait_until

DIM, N_BITS, MODEL = 192, 8, "a-model"
CODE = b"\x00"


@pytest.fixture(scope="module")
def sketching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SearchProcess]:
    folder = tmp_path_factory.mktemp("sketching")
    # No image is sent, so nobody answers at the encoder's address.
    options = ("--sketch-memory-mb", "64", "--log-level", "info")
    with SearchProcess(folder, "127.0.0.1:1", *options) as process:
        yield process


def item(item_id: str, feature: np.ndarray) -> Item:
    embedding = Embedding(code=CODE, n_bits=N_BITS, model_id=MODEL, feature=feature)
    return Item(id=item_id, embedding=embedding)


def test_answers_stay_exact_while_items_come_and_go(sketching: SearchProcess) -> None:
    rng = np.random.default_rng(4)
    spec = CollectionSpec("sketched", MODEL, N_BITS, DIM, FeatureDtype.F16)
    stored: dict[str, np.ndarray] = {}
    log: Path = sketching.data_dir.parent / "log"

    def write(client: Client, ids: list[str]) -> None:
        features = np.maximum(rng.standard_normal((len(ids), DIM)), 0).astype(np.float16)
        features[1::5] = features[0]  # ties
        stored.update(zip(ids, features, strict=True))
        client.upsert("sketched", [item(*pair) for pair in zip(ids, features, strict=True)])

    def check(client: Client) -> None:
        for feature in (stored["0"], rng.random(DIM).astype(np.float16)):
            query = Embedding(code=CODE, n_bits=N_BITS, model_id=MODEL, feature=feature)
            options = SearchOptions(k=5, max_hamming_bits=8)
            found = client.search("sketched", embedding=query, options=options)
            want = sorted(
                (float(euclidean(row, feature.astype(np.float32))), i) for i, row in stored.items()
            )[:5]
            assert [(hit.distance, hit.id) for hit in found.hits] == want
            assert found.receipt.exact
            assert found.receipt.pool_size == len(stored)

    def made(rows: int) -> bool:
        return f"has {rows} of {rows} rows" in log.read_text()

    with Client(sketching.target, "127.0.0.1:1") as client:
        client.create_collection("sketched", spec=spec)
        write(client, [str(i) for i in range(400)])
        check(client)
        wait_until(lambda: made(400), within_s=60, what="a sketch of what is there")
        check(client)
        client.delete("sketched", ["17"])
        del stored["17"]
        write(client, [str(i) for i in range(390, 500)])  # ten of them again
        check(client)  # with a sketch of the first rows only
        wait_until(lambda: made(510), within_s=60, what="a sketch of all rows")
        check(client)

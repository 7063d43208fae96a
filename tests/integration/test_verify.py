"""`Verify` through the client and the command line, on a running service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import numpy as np
import pytest
from click.testing import CliRunner, Result

from hashlens import AsyncClient, Client, CollectionSpec, Embedding, FeatureDtype, Item
from hashlens.cli.main import main
from tests.integration.conftest import SearchProcess

NAME, NOBODY = "checked", "127.0.0.1:1"
SPEC = CollectionSpec(NAME, "m", 20, 16, FeatureDtype.F16)
N = 2000
# No checkpoint trims the log, and nobody else finds the damage.
SETTINGS = ("--checkpoint-interval-s", "3600", "--scrub-mb-per-s", "0")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SearchProcess]:
    with SearchProcess(tmp_path_factory.mktemp("verify"), NOBODY, *SETTINGS) as process:
        rng = np.random.default_rng(1)
        features = rng.standard_normal((N, 16)).astype(np.float16)
        items = [
            Item(
                id=f"i{i}",
                embedding=Embedding(
                    code=rng.bytes(2) + b"\x05", n_bits=20, model_id="m", feature=features[i]
                ),
            )
            for i in range(N)
        ]
        with Client(process.target, NOBODY) as client:
            client.create_collection(NAME, spec=SPEC)
            client.upsert(NAME, items)
            client.delete(NAME, ["i0", "i1"])
            client.collection(NAME)  # They are in the files, whoever asks.
        yield process


def command(service: SearchProcess, *arguments: str) -> Result:
    targets = ["--search", service.target, "--encoder", NOBODY]
    return CliRunner().invoke(main, ["verify", NAME, *targets, *arguments])


def test_nothing_differs(service: SearchProcess) -> None:
    async def ask() -> bytes:
        async with AsyncClient(service.target, NOBODY) as client:
            return (await client.verify(NAME)).digest

    with Client(service.target, NOBODY) as client:
        found = client.verify(NAME)
        assert found.differences == ()
        assert found.version == N + 2
        assert found.n_catalog_items == found.n_array_items == N - 2
        assert asyncio.run(ask()) == found.digest
    shown = command(service)
    assert shown.exit_code == 0
    assert f"nothing differs · digest {found.digest.hex()}" in shown.stdout


@pytest.mark.parametrize(
    ("name", "where", "says"),
    [
        ("features-{}.s00000.f16", 5 * 32 + 3, "i5: its feature does not match its checksum"),
        ("ids-{}.bin", 60, "ids-{}.bin: does not match its checksum"),
    ],
)
def test_a_flipped_byte_is_found_and_mended(
    service: SearchProcess, name: str, where: int, says: str
) -> None:
    files = service.data_dir / "collections" / NAME
    (rows,) = files.glob("rows-*.rec")
    generation = rows.name[5:-4]
    with (files / name.format(generation)).open("r+b") as file:
        file.seek(where)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes((byte ^ 1,)))
    shown = command(service)
    assert shown.exit_code == 1
    assert says.format(generation) in shown.stdout
    # The log still has every feature: the service makes no checkpoint that trims it.
    shown = command(service, "--repair", "--json")
    assert shown.exit_code == 0
    told = json.loads(shown.stdout)
    assert told["n_repaired"] == told["n_differences"] >= 1
    assert command(service).exit_code == 0
    with Client(service.target, NOBODY) as client:
        info = client.collection(NAME)
        assert (info.n_items, info.n_missing_features) == (N - 2, 0)
        assert client.search(NAME, id="i5", k=1).hits[0].id == "i5"

"""The contract as it is generated, committed and offered."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

from hashlens import AsyncClient, Client
from hashlens.v1 import encoder_service_pb2, search_service_pb2

ROOT = Path(__file__).parents[2]


def test_generated_code_is_what_the_protos_generate_and_they_lint() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "protos" / "generate.py", "--check"],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_services_have_the_methods_of_the_design() -> None:
    encoder = encoder_service_pb2.DESCRIPTOR.services_by_name["EncoderService"]
    search = search_service_pb2.DESCRIPTOR.services_by_name["SearchService"]
    assert {m.name for m in encoder.methods} == {
        "Encode",
        "EncodeBatch",
        "EncodeStream",
        "GetModel",
    }
    assert {m.name for m in search.methods} == {
        "CreateCollection",
        "GetCollection",
        "ListCollections",
        "DropCollection",
        "Upsert",
        "UpsertStream",
        "Delete",
        "GetItems",
        "Search",
        "SearchBatch",
        "StreamBall",
        "Audit",
        "Verify",
        "Compact",
    }


STREAMS = {"stream_ball", "encode_stream", "upsert_stream"}
"""Verbs that return an iterator, which the asynchronous client's caller iterates asynchronously."""


def signature_of(method: object) -> str:
    """As the synchronous client would have it, which takes and gives without await."""
    assert callable(method)
    text = str(inspect.signature(method)).replace("AsyncGenerator[", "Generator[")
    return re.sub(r"AsyncIterable\[\w+\] \| ", "", text)


def test_both_clients_have_the_same_verbs_and_signatures() -> None:
    def verbs(client: type) -> dict[str, str]:
        return {
            name: signature_of(method)
            for name, method in inspect.getmembers(client, inspect.isfunction)
            if not name.startswith("_")
        }

    assert verbs(Client) == verbs(AsyncClient)
    asynchronous = {
        name
        for name in verbs(AsyncClient)
        if inspect.iscoroutinefunction(getattr(AsyncClient, name))
    }
    assert asynchronous == set(verbs(AsyncClient)) - STREAMS

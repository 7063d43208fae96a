"""Call data for ghz: a collection to search in, and the messages to send.

Run by run.sh, with an environment that has Hashlens and Pillow. What is there already, and made for
the model that the encoder serves now, is left as it is.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import click
import numpy as np
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import Message
from numpy.typing import NDArray
from PIL import Image

from encoder_service.bench.pictures import Kind, make_pictures
from hashlens import Client, Embedding, Item, codes, convert
from hashlens.cli.connect import connected, targets
from hashlens.errors import HashlensError, NotFoundError
from hashlens.packed_items import PackedItems
from hashlens.v1 import encoder_service_pb2 as enc
from hashlens.v1 import search_service_pb2 as spb

FORM = 1
"""Raised when what is written here changes, so that older data are made anew."""

SEARCHED, WRITTEN = "ghz", "ghz-upsert"
"""What searches ask, and what Upsert writes to: were they one, the rows that writes leave behind
would make the searches of one run slower than those of the next."""

SEED = 7
K = 10
N_BASE = 256
N_MESSAGES = 512
N_BATCHES = 64
BATCH_QUERIES = 32
UPSERT_ITEMS = 32

FLIP_SHARE = 0.03
"""Share of a code's bits that differ between an item and the picture it was made of."""
NOISE = 0.1
"""The same of its feature, by the feature's standard deviation."""

MIXED = (((28, 28), 96), ((640, 480), 24), ((1600, 1200), 6), ((4000, 3000), 2))
"""Sizes of images in pixels, and how many there are of each: a few are a camera's."""


def rows_near(base: Sequence[Embedding], n: int, seed: int) -> list[Embedding]:
    """Return n embeddings, each near one of a real picture."""
    rng = np.random.default_rng(seed)
    n_bits = base[0].n_bits
    bits = np.stack([codes.unpack(np.frombuffer(e.code, np.uint8), n_bits) for e in base])
    chosen = rng.integers(0, len(base), n)
    packed = codes.pack(bits[chosen] ^ (rng.random((n, n_bits)) < FLIP_SHARE))
    features: list[NDArray[np.generic] | None] = [None] * n
    if base[0].feature is not None:
        stacked = np.stack([e.feature for e in base if e.feature is not None])
        spread = NOISE * float(stacked.astype(np.float32).std())
        noise = rng.normal(0, spread, (n, stacked.shape[1]))
        features = list((stacked[chosen] + noise).astype(stacked.dtype))
    return [
        Embedding(code=code.tobytes(), n_bits=n_bits, model_id=base[0].model_id, feature=feature)
        for code, feature in zip(packed, features, strict=True)
    ]


def mixed_images(seed: int) -> list[bytes]:
    """Return JPEG files of `MIXED` sizes, shuffled."""
    images: list[bytes] = []
    for i, ((width, height), n) in enumerate(MIXED):
        kind: Kind = "garment" if width == 28 else "photo"
        for data in make_pictures(kind, n, seed + i):
            with Image.open(io.BytesIO(data)) as picture:
                out = io.BytesIO()
                picture.resize((width, height)).save(out, "JPEG", quality=85)
            images.append(out.getvalue())
    return [images[i] for i in np.random.default_rng(seed).permutation(len(images))]


def delimited(messages: Iterable[Message]) -> bytes:
    """Return messages as ghz's ``--binary-file`` wants several: the length of each before it."""
    parts = []
    for message in messages:
        data = message.SerializeToString()
        length = len(data)
        while length > 0x7F:
            parts.append(bytes([length & 0x7F | 0x80]))
            length >>= 7
        parts += [bytes([length]), data]
    return b"".join(parts)


def protoset() -> bytes:
    """Return what the services are made of, with all imports: reflection may be off."""
    found: dict[str, FileDescriptor] = {}

    def add(file: FileDescriptor) -> None:
        for dependency in file.dependencies:
            add(dependency)
        found[file.name] = file

    add(spb.DESCRIPTOR)
    files = descriptor_pb2.FileDescriptorSet()
    for file in found.values():
        file.CopyToProto(files.file.add())
    return files.SerializeToString()


def fill(client: Client, rows: Sequence[Embedding]) -> None:
    """Make both collections anew, and write the rows into the one that is searched."""
    for name in (SEARCHED, WRITTEN):
        # What is there is of another model, or has other rows.
        with suppress(NotFoundError):
            client.drop_collection(name)
        client.create_collection(name, expected_rows=max(len(rows), 1000))
    client.upsert(SEARCHED, (Item(id=row_id(i), embedding=row) for i, row in enumerate(rows)))


def row_id(row: int) -> str:
    """Return the id of an item."""
    return f"row-{row:07d}"


def call_data(
    base: Sequence[Embedding], garments: Sequence[bytes], n_items: int
) -> dict[str, bytes]:
    """Return the files, by name."""
    queries = rows_near(base, N_MESSAGES, SEED + 1)
    options = spb.SearchOptions(k=K)

    def search(query: spb.Query) -> spb.SearchRequest:
        return spb.SearchRequest(collection=SEARCHED, query=query, options=options)

    def by_embedding(embedding: Embedding) -> spb.Query:
        return spb.Query(embedding=convert.embedding_to_proto(embedding))

    batched = rows_near(base, N_BATCHES * BATCH_QUERIES, SEED + 2)
    batches = [batched[i : i + BATCH_QUERIES] for i in range(0, len(batched), BATCH_QUERIES)]
    written = rows_near(base, N_BATCHES * UPSERT_ITEMS, SEED + 3)
    items = [Item(id=row_id(i), embedding=row) for i, row in enumerate(written)]
    writes = [
        PackedItems.of(items[i : i + UPSERT_ITEMS]) for i in range(0, len(items), UPSERT_ITEMS)
    ]
    ids = np.random.default_rng(SEED + 4).integers(0, n_items, N_MESSAGES)
    by_id = [
        {"collection": SEARCHED, "query": {"id": row_id(int(i))}, "options": {"k": K}} for i in ids
    ]
    return {
        "hashlens.protoset": protoset(),
        "encode.binpb": delimited(enc.EncodeRequest(image=image) for image in garments),
        "encode-mixed.binpb": delimited(
            enc.EncodeRequest(image=image) for image in mixed_images(SEED)
        ),
        "search-by-embedding.binpb": delimited(search(by_embedding(query)) for query in queries),
        "search-by-image.binpb": delimited(search(spb.Query(image=image)) for image in garments),
        "search-by-id.json": json.dumps(by_id).encode(),
        "search-batch.binpb": delimited(
            spb.SearchBatchRequest(
                collection=SEARCHED, queries=map(by_embedding, batch), options=options
            )
            for batch in batches
        ),
        "upsert.binpb": delimited(
            spb.UpsertRequest(collection=WRITTEN, packed=convert.packed_items_to_proto(packed))
            for packed in writes
            if packed is not None
        ),
    }


def encoded(client: Client, images: Sequence[bytes]) -> list[Embedding]:
    """Return the images' embeddings."""
    embeddings = []
    for result in client.encode_batch(images):
        if isinstance(result, HashlensError):
            raise result
        embeddings.append(result.embedding)
    return embeddings


def is_filled(client: Client, model_id: str, n_items: int) -> bool:
    """Tell whether both collections are there, of this model and with their items."""
    try:
        written, searched = client.collection(WRITTEN), client.collection(SEARCHED)
    except NotFoundError:
        return False
    models = {written.spec.model_id, searched.spec.model_id}
    return models == {model_id} and searched.n_items == n_items


@click.command(help=__doc__)
@targets
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--items", "n_items", default=20_000, show_default=True, help="Rows to search in.")
def main(encoder_target: str, search_target: str, output: Path, n_items: int) -> None:
    """Make what is missing."""
    with connected(search_target, encoder_target) as client:
        model_id = client.model().model_id
        made = {"form": FORM, "items": n_items, "model_id": model_id}
        note = output / "made.json"
        filled = is_filled(client, model_id, n_items)
        if filled and note.exists() and json.loads(note.read_text()) == made:
            return
        garments = make_pictures("garment", N_BASE, SEED)
        base = encoded(client, garments)
        if not filled:
            fill(client, rows_near(base, n_items, SEED))
    output.mkdir(parents=True, exist_ok=True)
    for name, data in call_data(base, garments, n_items).items():
        (output / name).write_bytes(data)
    # Last, so that it vouches for the rest.
    note.write_text(json.dumps(made))
    click.echo(f"call data for {n_items} items are in {output}", err=True)


if __name__ == "__main__":
    main()

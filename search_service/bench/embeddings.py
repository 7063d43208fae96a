"""Real codes and features: pictures through an encoder service, and a file that keeps them."""

from __future__ import annotations

import gzip
import tempfile
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashlens import codes
from hashlens.cli.demo_data import load_demo_images
from hashlens.cli.extras import require
from hashlens.cli.ingest import encode_patiently, pipelined
from hashlens.cli.processes import ServicesConfig, running
from hashlens.cli.progress import step
from hashlens.cli.text import console, printable
from hashlens.client import Client
from hashlens.client.wire import spec_for
from hashlens.errors import HashlensError, InvalidInputError
from hashlens.types import Embedding, FeatureDtype

_ENLARGE = 4
"""As in training: the pictures are 28 pixels wide and reach the service as files of 112."""

_BATCH_ITEMS = 64
_WORKERS = 3
_KEPT_LOG_LINES = 40


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """Labelled grey pictures, those of the training split first."""

    images: NDArray[np.uint8]
    """Shape ``[n, 28, 28]``."""
    labels: NDArray[np.uint8]
    """Shape ``[n]``."""
    is_test: NDArray[np.bool_]
    """Shape ``[n]``: whether no training has seen it."""


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """What a model makes of `Pictures`, row by row."""

    packed: NDArray[np.uint8]
    """Codes: shape ``[n, n_bytes]``."""
    features: NDArray[Any]
    """F7: float16 or float32, shape ``[n, dim]``."""
    activations: NDArray[np.float32]
    """H: shape ``[n, n_bits]``."""
    labels: NDArray[np.uint8]
    is_test: NDArray[np.bool_]
    model_id: str

    @property
    def n_bits(self) -> int:
        """Code length."""
        return int(self.activations.shape[1])

    def query(self, row: int) -> Embedding:
        """Return a row as a query, with its activations."""
        return Embedding(
            code=self.packed[row].tobytes(),
            n_bits=self.n_bits,
            model_id=self.model_id,
            feature=self.features[row],
            activations=self.activations[row],
        )

    def save(self, path: Path) -> None:
        """Write an .npz; a file that is there is replaced when the new one is complete."""
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            np.savez(
                file,
                packed=self.packed,
                features=self.features,
                activations=self.activations,
                labels=self.labels,
                is_test=self.is_test,
                model_id=np.array(self.model_id),
            )
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Embeddings:
        """Read what `save` wrote; InvalidInputError for anything else."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(
                    packed=arrays["packed"],
                    features=arrays["features"],
                    activations=arrays["activations"],
                    labels=arrays["labels"],
                    is_test=arrays["is_test"],
                    model_id=str(arrays["model_id"]),
                )
        except (ValueError, KeyError, OSError) as error:
            raise InvalidInputError(
                f"{path} holds no embeddings of this benchmark: {error}", field="embeddings"
            ) from None


def read_pictures(folder: Path | None) -> Pictures:
    """Read Fashion-MNIST.

    Parameters
    ----------
    folder
        Of its four ``.gz`` files, as Debian's package dataset-fashion-mnist has them; None for the
        5,000 test pictures that come with Hashlens.
    """
    if folder is None:
        images, labels, _ = load_demo_images()
        return Pictures(images, labels, np.ones(len(labels), dtype=np.bool_))
    images_of, labels_of = [], []
    for prefix in ("train", "t10k"):
        # IDX: a header of four bytes and four more for each axis, then the bytes themselves.
        labels = np.frombuffer(_unpacked(folder / f"{prefix}-labels-idx1-ubyte.gz"), np.uint8)[8:]
        images = np.frombuffer(_unpacked(folder / f"{prefix}-images-idx3-ubyte.gz"), np.uint8)[16:]
        if images.size != 28 * 28 * labels.size:
            raise InvalidInputError(f"{folder} does not hold Fashion-MNIST", field="pictures")
        images_of.append(images.reshape(-1, 28, 28))
        labels_of.append(labels)
    is_test = np.repeat([False, True], [len(labels) for labels in labels_of])
    return Pictures(np.concatenate(images_of), np.concatenate(labels_of), is_test)


def _unpacked(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInputError(
            f"{path} cannot be read: {error}. Install Debian's package dataset-fashion-mnist, or "
            "leave --pictures out.",
            field="pictures",
        ) from None


def encode(pictures: Pictures) -> Embeddings:
    """Encode pictures by an encoder service with the bundled checkpoint, started for the purpose.

    Takes some milliseconds for each.
    """
    require("encoder", "search", purpose="encoding pictures")
    with _encoder() as client:
        return encode_by(client, pictures)


def encode_by(client: Client, pictures: Pictures) -> Embeddings:
    """Encode pictures by the encoder service of a client."""
    from hashlens.cli.images import enlarged  # Pillow, which files of embeddings do without

    model = client.model()
    spec = spec_for("none", model, FeatureDtype.F16, 1)

    def work(rows: range) -> list[Embedding]:
        # Lossless and lossy in turn, as pictures come.
        images = [
            enlarged(pictures.images[row], _ENLARGE, "JPEG" if row % 2 else "PNG") for row in rows
        ]
        found = []
        for encoded in encode_patiently(client, images, spec, with_activations=True):
            if isinstance(encoded, HashlensError):
                raise encoded
            found.append(encoded.embedding)
        return found

    n = len(pictures.labels)
    batches = [range(lo, min(lo + _BATCH_ITEMS, n)) for lo in range(0, n, _BATCH_ITEMS)]
    features = np.empty((n, model.dim), dtype=np.float16)
    activations = np.empty((n, model.n_bits), dtype=np.float32)
    packed = np.empty((n, codes.n_bytes(model.n_bits)), dtype=np.uint8)
    row = 0
    with step(console(stderr=True), "Encoding", n, "pictures") as advance:
        for embeddings in pipelined(work, batches, _WORKERS):
            for embedding in embeddings:
                packed[row] = np.frombuffer(embedding.code, dtype=np.uint8)
                features[row] = embedding.feature
                activations[row] = embedding.activations
                row += 1
            advance(len(embeddings))
    return Embeddings(
        packed, features, activations, pictures.labels, pictures.is_test, model.model_id
    )


@contextmanager
def _encoder() -> Iterator[Client]:
    """Start the services, show their logs if anything fails."""
    lines: deque[str] = deque(maxlen=_KEPT_LOG_LINES)
    try:
        with tempfile.TemporaryDirectory(
            prefix="hashlens-bench-", ignore_cleanup_errors=True
        ) as folder:
            config = ServicesConfig(data=Path(folder, "data"), isolated=True)
            with (
                running(
                    config, on_line=lambda name, line: lines.append(f"{name:<7} | {line}")
                ) as services,
                Client(services.search, services.encoder) as client,
            ):
                yield client
    except HashlensError:
        for line in lines:
            console(stderr=True).print(printable(line), soft_wrap=True)
        raise
